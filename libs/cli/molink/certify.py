"""`molink certify`: is what the running pipeline says what the whole model would say?

Asks the gateway for greedy answers to a built-in set of prompts, one at a time and then many at once, and has
plain transformers on this machine answer the same prompt tokens with the whole model. Prints a verdict with the
first differing token, and how close the whole model's own decision was there.
"""

from __future__ import annotations

import asyncio
import os
from dataclasses import dataclass
from typing import Annotated, Any

import httpx
import orjson
import typer
from rich.console import Console

from molink.openai_stream import ApiError, response_error
from molink.sample import NO_CHAT_TEMPLATE
from molink.status import fetch
from molink.supervisor import python_command
from molink_common.errors import MolinkError
from molink_common.folders import cache_folder
from molink_common.messages import ClusterState

_ANSWER_TIMEOUT_S = 600.0
_REFERENCE_TIMEOUT_S = 3600.0

PROMPTS = (
    "What is the capital of France?",
    "List three uses of copper.",
    "Why is the sky blue?",
    "Write one sentence about the sea.",
    "Count from one to ten.",
    "Translate 'good morning' into Spanish.",
    "What does a heart do?",
    "Name a fruit that is red.",
    "Explain what a bicycle is to a child.",
    "What is 12 plus 30?",
    "Give me a title for a story about a lighthouse.",
    "Which is larger, the Sun or the Moon?",
    "Write a Python function that adds two numbers.",
    "What do bees make?",
    "Describe winter in five words.",
    "Who wrote Hamlet?",
    "How do I boil an egg?",
    "What is the opposite of silence?",
    "Tell me something surprising about octopuses, in two or three sentences, and say why it surprises people.",
    "Summarize: The train was late because of snow, so the travellers waited in the station and drank tea.",
)


@dataclass(frozen=True, slots=True)
class Answer:
    """One greedy answer of the pipeline."""

    prompt_tokens: tuple[int, ...]
    tokens: tuple[int, ...]


def certify(
    gateway: Annotated[str, typer.Option(help="Address of a gateway.")] = "http://127.0.0.1:8000",
    model: Annotated[str, typer.Option(help="The whole model: demo, a folder, a GGUF file, a hub id.")] = "demo",
    prompts: Annotated[int, typer.Option(min=1, max=len(PROMPTS), help="How many of the built-in prompts.")] = 20,
    new_tokens: Annotated[int, typer.Option(min=1, max=512, help="Tokens of each answer.")] = 48,
    concurrency: Annotated[int, typer.Option(min=1, max=64, help="Requests at once in the second round.")] = 16,
    device: Annotated[str, typer.Option(help="Where the whole model runs.")] = "cpu",
    as_json: Annotated[bool, typer.Option("--json", help="End with one JSON object.")] = False,
    api_key: Annotated[
        str | None, typer.Option(envvar=["MOLINK_API_KEY", "OPENAI_API_KEY"], help="Key for the gateway.")
    ] = None,
) -> None:
    """Compare the running pipeline with the whole model on this machine. Exit code 0 only if identical."""
    state = ClusterState.model_validate_json(fetch(gateway, api_key))
    if not state.ready or not state.pipelines or state.card is None:
        raise MolinkError(f"no pipeline is ready: {state.reason}")
    pipeline = state.pipelines[0]
    console = Console(stderr=as_json)
    console.print(f"{len(pipeline.stages)} stages in {pipeline.dtype}; {prompts} prompts, {new_tokens} tokens each")
    alone, together = asyncio.run(
        _answers(gateway, api_key, state.card.name, prompts, new_tokens, concurrency, console)
    )
    cases = [
        {"prompt": one.prompt_tokens, "answers": [one.tokens, other.tokens]}
        for one, other in zip(alone, together, strict=True)
    ]
    console.print("asking the whole model …")
    lines = asyncio.run(_whole_model({"cases": cases}, model, pipeline.dtype.value, device))
    verdict = {"stages": len(pipeline.stages), "dtype": pipeline.dtype.value, **judge(lines)}
    _show(verdict, console)
    if as_json:
        print(orjson.dumps(verdict).decode())
    if not verdict["identical"]:
        raise typer.Exit(1)


def judge(lines: list[dict[str, Any]]) -> dict[str, Any]:
    """The verdict over what the comparison says of each prompt (see `molink_stage_worker.reference`)."""
    differing = [
        {"prompt": PROMPTS[index], "round": name, **answer}
        for index, line in enumerate(lines)
        for name, answer in zip(("alone", "together"), line["answers"], strict=True)
        if answer["first_differing"] is not None
    ]
    return {
        "identical": not differing,
        "prompts": len(lines),
        "differing": len({one["prompt"] for one in differing}),
        "differences": differing,
    }


def _show(verdict: dict[str, Any], console: Console) -> None:
    for one in verdict["differences"]:
        console.print(
            f"differs at token {one['first_differing']} ({one['round']}): {one['token']} instead of "
            f"{one['whole_model_token']}, margin {one['margin']:.4f}: {one['prompt']}",
            highlight=False,
            markup=False,
        )
    same = verdict["prompts"] - verdict["differing"]
    word = "identical" if verdict["identical"] else "NOT identical"
    console.print(f"{word}: {same} of {verdict['prompts']} prompts give the whole model's tokens, alone and together")


async def _answers(
    gateway: str, api_key: str | None, model: str, count: int, new_tokens: int, concurrency: int, console: Console
) -> tuple[list[Answer], list[Answer]]:
    """Both rounds: one request at a time, then `concurrency` at once."""
    headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
    async with httpx.AsyncClient(base_url=gateway, headers=headers, timeout=_ANSWER_TIMEOUT_S) as client:
        console.print("asking the pipeline, one at a time …")
        alone = [await _answer(client, model, prompt, new_tokens) for prompt in PROMPTS[:count]]
        console.print(f"asking the pipeline, {concurrency} at once …")
        gate = asyncio.Semaphore(concurrency)

        async def one(prompt: str) -> Answer:
            async with gate:
                return await _answer(client, model, prompt, new_tokens)

        together = await asyncio.gather(*(one(prompt) for prompt in PROMPTS[:count]))
    return alone, list(together)


async def _answer(client: httpx.AsyncClient, model: str, prompt: str, new_tokens: int) -> Answer:
    fixed = {"model": model, "temperature": 0, "max_tokens": new_tokens, "ignore_eos": True, "return_token_ids": True}
    chat = {**fixed, "messages": [{"role": "user", "content": prompt}]}
    try:
        content = await _post(client, "/v1/chat/completions", chat)
        return Answer(tuple(content["prompt_token_ids"]), tuple(content["choices"][0]["token_ids"]))
    except ApiError as error:
        if error.code != NO_CHAT_TEMPLATE:
            raise
    choice = (await _post(client, "/v1/completions", {**fixed, "prompt": prompt}))["choices"][0]
    return Answer(tuple(choice["prompt_token_ids"]), tuple(choice["token_ids"]))


async def _post(client: httpx.AsyncClient, path: str, body: dict[str, Any]) -> dict[str, Any]:
    try:
        answer = await client.post(path, json=body)
    except httpx.TransportError as error:
        raise MolinkError(f"the gateway did not answer: {error or type(error).__name__}") from error
    if answer.status_code != httpx.codes.OK:
        raise response_error(answer.status_code, answer.content)
    content: dict[str, Any] = answer.json()
    return content


async def _whole_model(cases: dict[str, Any], model: str, dtype: str, device: str) -> list[dict[str, Any]]:
    """What the comparison with the whole model says of each case. It runs in a process of its own."""
    flags = ("--model", model, "--dtype", dtype, "--device", device, "--cache", str(cache_folder()))
    command = python_command("molink_stage_worker.reference", *flags)
    process = await asyncio.create_subprocess_exec(
        *command,
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        env={**os.environ, "TRANSFORMERS_VERBOSITY": "error", "HF_HUB_DISABLE_PROGRESS_BARS": "1"},
    )
    try:
        async with asyncio.timeout(_REFERENCE_TIMEOUT_S):
            out, errors = await process.communicate(orjson.dumps(cases))
    finally:
        if process.returncode is None:
            process.kill()
    if process.returncode != 0:
        last_words = errors.decode(errors="replace").strip().splitlines()[-1:]
        raise MolinkError("the whole model could not be asked: " + (last_words[0] if last_words else "no reason given"))
    return [orjson.loads(line) for line in out.splitlines()]
