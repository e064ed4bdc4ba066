"""`llm`, Simon Willison's command line, with the model named in extra-openai-models.yaml."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from tests.clients.reporting import API_KEY, BASE_URL, MODEL, TIMEOUT_S, Checks

checks = Checks("llm")

MODELS = f"""
- model_id: molink
  model_name: {MODEL}
  api_base: {BASE_URL}
  api_key_name: molink
  supports_schema: true
  supports_tools: true
- model_id: molink-completion
  model_name: {MODEL}
  api_base: {BASE_URL}
  api_key_name: molink
  completion: true
- model_id: molink-responses
  model_name: {MODEL}
  api_base: {BASE_URL}
  api_key_name: molink
  responses: true
"""

_PROGRAM = Path(sys.executable).with_name("llm")
_home = tempfile.TemporaryDirectory(prefix="molink-llm-")
Path(_home.name, "extra-openai-models.yaml").write_text(MODELS)


def _llm(*arguments: str) -> str:
    """What it prints; its own folder holds the models, the key and its log."""
    done = subprocess.run(
        [str(_PROGRAM), *arguments],
        env=os.environ | {"LLM_USER_PATH": _home.name},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
        check=False,
    )
    if done.returncode != 0:
        raise AssertionError(f"llm {' '.join(arguments)} failed: {done.stderr.strip()[-500:]}")
    return done.stdout.strip()


@checks.add
def models() -> str:
    _llm("keys", "set", "molink", "--value", API_KEY)
    told = [line for line in _llm("models").splitlines() if "molink" in line]
    assert len(told) == 3, told
    return "; ".join(told)


@checks.add
def prompt() -> str:
    text = _llm("-m", "molink", "Name the capital of France.", "-o", "temperature", "0", "-o", "max_tokens", "24")
    assert text
    return text


@checks.add
def prompt_without_a_stream() -> str:
    text = _llm("-m", "molink", "--no-stream", "--system", "Be brief.", "Say hello.", "-o", "max_tokens", "12")
    assert text
    return text


@checks.add
def conversation_and_its_log() -> str:
    _llm("-m", "molink", "My name is Ann.", "-o", "max_tokens", "12")
    text = _llm("-m", "molink", "-c", "What is my name?", "-o", "max_tokens", "12")
    logged = json.loads(_llm("logs", "list", "--json", "-n", "1"))[0]
    assert logged["input_tokens"] and logged["output_tokens"], logged
    return f"{text} ({logged['input_tokens']} tokens in, {logged['output_tokens']} out)"


@checks.add
def schema() -> str:
    wanted = {
        "type": "object",
        "properties": {
            "name": {"type": "string", "maxLength": 20},
            "age": {"type": "integer", "minimum": 0, "maximum": 120},
        },
        "required": ["name", "age"],
        "additionalProperties": False,
    }
    text = _llm("-m", "molink", "--schema", json.dumps(wanted), "Invent a dog.", "-o", "max_tokens", "100")
    dog = json.loads(text)
    assert isinstance(dog["name"], str) and 0 <= dog["age"] <= 120, dog
    return text


@checks.add
def tools() -> str:
    return _llm("-m", "molink", "-T", "llm_version", "What version of llm is this?", "-o", "max_tokens", "40")


@checks.add
def completion() -> str:
    text = _llm("-m", "molink-completion", "1, 2, 3, 4,", "-o", "max_tokens", "6", "-o", "temperature", "0")
    assert text
    return text


@checks.add
def responses() -> str:
    text = _llm("-m", "molink-responses", "Name the capital of France.", "-o", "max_tokens", "32")
    assert text
    return text


if __name__ == "__main__":
    checks.run()
