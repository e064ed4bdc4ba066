"""lm-evaluation-harness on a few local tasks: once against the server, once against the whole model in transformers.

    CLIENT_BASE_URL=http://127.0.0.1:8000/v1 python tests/clients/lm_eval/run.py [CHECK …]

The scores must be the same. Prompts go as token ids with `echo` and `logprobs`, answers are generated greedily; the
tokenizer and the whole model are those that the server's machine has converted. The harness has a virtual environment
of its own, which borrows torch and transformers from the one that this program runs in. It reads no hub.

Beside the variables of `reporting` there is CLIENT_REFERENCE: which model transformers loads (`demo` if unset), in the
type that the server computes in. In float32 (`molink up --dtype float32`) the scores are the same to the last question;
in bfloat16 the likeliest two words may change places where they are as good as equally likely.
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import sysconfig
import tempfile
import urllib.request
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent.parent
sys.path.insert(0, str(ROOT))

from tests.clients.reporting import API_KEY, BASE_URL, MODEL, Checks, same  # noqa: E402  behind its path

ENVIRONMENT = ROOT / ".clients" / "lm-eval"
PYTHON = ENVIRONMENT / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
CHOICES, WORDS, SERIES = "molink_choices", "molink_words", "molink_series"
_TIMEOUT_S = 1500.0
_EXACT = "float32"
_NEAR, _NEAR_IN_SHORT_TYPES = 1e-3, 0.5
"""How far apart the log probabilities of an answer may be; in bfloat16 every other batch rounds differently."""
_SCORE_IN_SHORT_TYPES = 0.1
"""How far apart the scores may be."""


@dataclass(frozen=True, slots=True)
class Evaluation:
    """What the harness found with one model."""

    scores: dict[str, dict[str, float]]
    """By task and metric."""
    samples: dict[str, list[dict[str, Any]]]
    """By task, in the order of the documents."""

    def responses(self, task: str) -> list[Any]:
        """What the model said of each document: for choices and words pairs of log probability and whether greedy."""
        return [sample["filtered_resps"] for sample in self.samples[task]]


class Harness:
    """Runs the command `lm_eval`, at most once for each model."""

    @cached_property
    def served(self) -> Evaluation:
        """Against the server."""
        settings = {
            "model": MODEL,
            "base_url": f"{BASE_URL.rstrip('/')}/completions",
            "tokenizer": str(self._folder),
            "tokenizer_backend": "huggingface",
            "tokenized_requests": "True",
            "num_concurrent": "4",
            "max_retries": "3",
        }
        return self._run("local-completions", settings)

    @cached_property
    def whole(self) -> Evaluation:
        """The whole model in transformers."""
        settings = {"pretrained": str(self._folder), "dtype": self.dtype}
        return self._run("hf", settings, "--device", "cpu", "--batch_size", "1")

    @property
    def dtype(self) -> str:
        """In which type the server computes."""
        return str(self._status["pipelines"][0]["dtype"])

    @cached_property
    def _status(self) -> dict[str, Any]:
        url = f"{BASE_URL.rstrip('/').removesuffix('/v1')}/molink/status"
        request = urllib.request.Request(url, headers={"Authorization": f"Bearer {API_KEY}"})
        with urllib.request.urlopen(request, timeout=30) as answer:
            status: dict[str, Any] = json.load(answer)
        return status

    @cached_property
    def _folder(self) -> Path:
        """The model as this machine has converted it, with its tokenizer."""
        reference = os.environ.get("CLIENT_REFERENCE", "demo")
        command = [sys.executable, "-m", "molink_stage_worker.models", reference]
        done = subprocess.run(command, capture_output=True, text=True, timeout=_TIMEOUT_S, check=False)
        told = json.loads(done.stdout.splitlines()[-1])
        if "folder" not in told:
            raise RuntimeError(f"there is no model to compare with: {told.get('error')}")
        same(told["card"]["fingerprint"], self._status["card"]["fingerprint"], f"the model {reference}")
        return Path(told["folder"])

    def _run(self, kind: str, settings: dict[str, str], *more: str) -> Evaluation:
        make_environment()
        with tempfile.TemporaryDirectory() as folder:
            command = [
                str(PYTHON), "-m", "lm_eval", "run", "--model", kind,
                "--model_args", ",".join(f"{name}={value}" for name, value in settings.items()),
                "--tasks", ",".join((CHOICES, WORDS, SERIES)),
                "--include_path", str(HERE / "tasks"), "--output_path", folder, "--log_samples", *more,
            ]  # fmt: skip
            environment = {
                **os.environ,
                "OPENAI_API_KEY": API_KEY,
                "HF_HOME": str(Path(folder) / "hub"),
                "HF_HUB_OFFLINE": "1",
                "HF_DATASETS_OFFLINE": "1",
                "TOKENIZERS_PARALLELISM": "false",
            }
            done = subprocess.run(
                command, cwd=HERE, env=environment, capture_output=True, text=True, timeout=_TIMEOUT_S, check=False
            )
            if done.returncode != 0:
                raise RuntimeError(f"lm_eval with {kind} failed: {(done.stderr or done.stdout).strip()[-1500:]}")
            return read_evaluation(Path(folder))


def make_environment() -> None:
    """Unless it is there: the harness, and a path to the torch and the transformers of this Python."""
    pins, mark = HERE / "requirements.txt", ENVIRONMENT / ".complete"
    wanted = hashlib.sha256(pins.read_bytes() + sys.version.encode()).hexdigest()
    if mark.exists() and mark.read_text() == wanted:
        return
    print(f"installing what {pins} pins into {ENVIRONMENT}", flush=True)
    subprocess.run([sys.executable, "-m", "venv", "--clear", "--without-pip", str(ENVIRONMENT)], check=True)
    own = subprocess.run(
        [str(PYTHON), "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"],
        capture_output=True,
        text=True,
        check=True,
    )
    (Path(own.stdout.strip()) / "borrowed.pth").write_text(sysconfig.get_path("purelib") + "\n")
    install = [sys.executable, "-m", "pip", "--python", str(PYTHON), "install", "--quiet", "--no-compile"]
    subprocess.run([*install, "--no-warn-script-location", "--requirement", str(pins)], check=True, timeout=_TIMEOUT_S)
    mark.write_text(wanted)


def read_evaluation(folder: Path) -> Evaluation:
    """What `lm_eval` has written to `folder`."""
    (results,) = folder.rglob("results_*.json")
    scores = {
        task: {name: value for name, value in found.items() if isinstance(value, float) and "stderr" not in name}
        for task, found in json.loads(results.read_text())["results"].items()
    }
    samples: dict[str, list[dict[str, Any]]] = {}
    for task in scores:
        (path,) = folder.rglob(f"samples_{task}_*.jsonl")
        lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        samples[task] = sorted(lines, key=lambda line: int(line["doc_id"]))
    return Evaluation(scores, samples)


harness = Harness()
checks = Checks("lm-eval")


def compare_log_probabilities(task: str) -> str:
    """Raise unless every answer is about as likely here as there."""
    pairs = [
        (float(here[0]), float(there[0]))
        for mine, other in zip(harness.served.responses(task), harness.whole.responses(task), strict=True)
        for here, there in zip(mine, other, strict=True)
    ]
    farthest = max(abs(here - there) for here, there in pairs)
    near = _NEAR if harness.dtype == _EXACT else _NEAR_IN_SHORT_TYPES
    if farthest > near:
        raise AssertionError(f"log probabilities differ by up to {farthest:.2g}, more than {near}")
    return f"{len(pairs)} log probabilities differ by {farthest:.2g} at most, in {harness.dtype}"


def compare_scores(task: str, metric: str) -> str:
    """Raise unless the scores are the same."""
    here, there = harness.served.scores[task][metric], harness.whole.scores[task][metric]
    if harness.dtype == _EXACT or abs(here - there) > _SCORE_IN_SHORT_TYPES:
        same(here, there, f"{metric} in {harness.dtype}")
    return f"{metric.partition(',')[0]} {here:.4f}, of the whole model {there:.4f}"


@checks.add
def multiple_choice_has_the_same_score() -> str:
    """Which of four answers is the likeliest, as text and by its length."""
    scores = [compare_scores(CHOICES, metric) for metric in ("acc,none", "acc_norm,none")]
    return "; ".join([*scores, compare_log_probabilities(CHOICES)])


@checks.add
def greedy_words_have_the_same_score() -> str:
    """Whether greedy decoding would say the last word of a sentence; its perplexity is only near."""
    near = [scores[WORDS]["perplexity,none"] for scores in (harness.served.scores, harness.whole.scores)]
    told = "perplexity {:.4f}, of the whole model {:.4f}".format(*near)
    return "; ".join([compare_scores(WORDS, "acc,none"), told, compare_log_probabilities(WORDS)])


@checks.add
def generated_answers_have_the_same_score() -> str:
    """The next word of a series, generated up to a stop string."""
    if harness.dtype == _EXACT:
        same(harness.served.responses(SERIES), harness.whole.responses(SERIES), "what was generated")
    return compare_scores(SERIES, "exact_match,stripped")


if __name__ == "__main__":
    checks.run()
