"""Answers that must follow a JSON schema: whether they do, and what the masks cost.

    python -m bench.structured            both parts, as text
    python -m bench.structured --json     the same, and one JSON object as the last line

Validity: seeded schemas of many shapes, one request each at temperature 1 (`strict`), through the whole system. Every
answer that ends by itself is checked with the `jsonschema` package, formats included; one that `max_tokens` cut off is
counted apart. Cost: tokens a second of concurrent streams of a fixed length without a grammar, with one that lets
nearly everything pass, and with a JSON schema, in turns on the same system.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jsonschema

from bench.json_schemas import Schema, json_schemas
from bench.load import StreamResult, chat_prompts, stream_chat
from bench.system import RunningSystem, running_system

_LOOSE = {"structured_outputs": {"regex": r"(.|\n)*"}}
"""Each token of text may come at any place; there is a mask all the same."""
_LIST: Schema = {"type": "array", "items": {"type": "string", "maxLength": 40}, "minItems": 100}
"""Goes on longer than any of the measured streams."""


async def main(arguments: argparse.Namespace) -> dict[str, Any]:
    report: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        flags = ["--workers", str(arguments.workers), "--model", arguments.model, "--dtype", arguments.dtype]
        async with running_system(Path(folder) / "up.log", [*flags, "--threads", "1"]) as system:
            await stream_chat(system.port, _request(chat_prompts(1)[0], max_tokens=8) | _strict({"type": "object"}))
            if "cost" in arguments.parts:
                report["cost"] = await _cost(system, arguments)
                print(_cost_text(report["cost"], arguments), flush=True)
            if "validity" in arguments.parts:
                report["validity"] = await _validity(system, arguments)
                print(_validity_text(report["validity"]), flush=True)
    return report


async def _validity(system: RunningSystem, arguments: argparse.Namespace) -> dict[str, Any]:
    schemas = json_schemas(arguments.schemas, arguments.seed)[arguments.skip :]
    slots = asyncio.Semaphore(arguments.concurrency)

    async def ask(number: int, schema: Schema) -> tuple[str, str]:
        body = _request(_question(schema), max_tokens=arguments.max_tokens, seed=number) | _strict(schema)
        async with slots:
            return _judged(await stream_chat(system.port, body), schema)

    started = time.perf_counter()
    verdicts = await asyncio.gather(*(ask(arguments.skip + n, schema) for n, schema in enumerate(schemas)))
    counts = Counter(verdict for verdict, _ in verdicts)
    return {
        "schemas": len(schemas),
        "seed": arguments.seed,
        "valid": counts["valid"],
        "invalid": counts["invalid"],
        "cut": counts["cut"],
        "refused": counts["refused"],
        "seconds": round(time.perf_counter() - started, 1),
        "problems": [
            {"schema": arguments.skip + n, "verdict": verdict, "why": why}
            for n, (verdict, why) in enumerate(verdicts)
            if verdict != "valid"
        ],
    }


def _judged(stream: StreamResult, schema: Schema) -> tuple[str, str]:
    """valid, invalid, cut (by `max_tokens`) or refused, and why."""
    if stream.error is not None or stream.status != 200:
        return "refused", f"{stream.status}: {stream.error}"
    if stream.finish_reason == "length":
        return "cut", stream.text[:200]
    try:
        jsonschema.Draft202012Validator(schema, format_checker=jsonschema.Draft202012Validator.FORMAT_CHECKER).validate(
            json.loads(stream.text)
        )
    except (ValueError, jsonschema.ValidationError) as error:
        return "invalid", f"{str(error).splitlines()[0]} in {stream.text[:200]!r}"
    return "valid", ""


async def _cost(system: RunningSystem, arguments: argparse.Namespace) -> dict[str, Any]:
    """In turns, so that what slows the machine for a while slows all kinds alike."""
    kinds: dict[str, dict[str, Any]] = {"none": {}, "loose": _LOOSE, "json_schema": _strict(_LIST)}
    rates: dict[str, list[float]] = {kind: [] for kind in kinds}
    for form in kinds.values():
        await _rate(system, form, arguments)
    for turn in range(arguments.runs):
        for kind in (list(kinds), list(kinds)[::-1])[turn % 2]:
            rates[kind].append(await _rate(system, kinds[kind], arguments))
    middle = {kind: statistics.median(values) for kind, values in rates.items()}
    return {
        "concurrency": arguments.concurrency,
        "new_tokens": arguments.new_tokens,
        "tokens_per_s": {kind: round(value, 1) for kind, value in middle.items()},
        "all_tokens_per_s": {kind: [round(value, 1) for value in values] for kind, values in rates.items()},
        "cost": {kind: round(1 - middle[kind] / middle["none"], 4) for kind in kinds if kind != "none"},
        # the fastest runs are those that the rest of the machine disturbed least
        "cost_of_fastest": {kind: round(1 - max(rates[kind]) / max(rates["none"]), 4) for kind in kinds},
    }


async def _rate(system: RunningSystem, form: dict[str, Any], arguments: argparse.Namespace) -> float:
    """Tokens a second; every stream must have the same length, or kinds could not be compared."""
    started = time.perf_counter()
    streams = await asyncio.gather(
        *(
            stream_chat(system.port, _request(messages, arguments.new_tokens, seed=n) | {"ignore_eos": True} | form)
            for n, messages in enumerate(chat_prompts(arguments.concurrency))
        )
    )
    took_s = time.perf_counter() - started
    for stream in streams:
        if stream.error is not None or stream.completion_tokens != arguments.new_tokens:
            raise RuntimeError(f"a stream of {stream.completion_tokens} tokens: {stream.status} {stream.error}")
    return sum(stream.completion_tokens for stream in streams) / took_s


def _request(messages: list[dict[str, str]], max_tokens: int, seed: int = 0) -> dict[str, object]:
    return {"model": "demo", "messages": messages, "max_tokens": max_tokens, "temperature": 1.0, "seed": seed}


def _strict(schema: Schema) -> dict[str, Any]:
    return {
        "response_format": {
            "type": "json_schema",
            "json_schema": {"name": "answer", "strict": True, "schema": schema},
        }
    }


def _question(schema: Schema) -> list[dict[str, str]]:
    return [{"role": "user", "content": f"Answer with an example of a JSON object with {', '.join(_names(schema))}."}]


def _names(schema: Schema) -> list[str]:
    return list(schema["properties"])


def _validity_text(part: dict[str, Any]) -> str:
    lines = [
        f"{part['schemas']} schemas: {part['valid']} answers valid, {part['invalid']} invalid, {part['cut']} cut by "
        f"max_tokens, {part['refused']} refused, in {part['seconds']} s"
    ]
    lines += [f"  schema {one['schema']} {one['verdict']}: {one['why']}" for one in part["problems"][:20]]
    return "\n".join(lines)


def _cost_text(part: dict[str, Any], arguments: argparse.Namespace) -> str:
    rows = [
        f"  {kind:12} {rate:7.1f} tokens/s"
        + (
            f"  cost {part['cost'][kind]:.1%}, of the fastest runs {part['cost_of_fastest'][kind]:.1%}"
            if kind in part["cost"]
            else ""
        )
        for kind, rate in part["tokens_per_s"].items()
    ]
    return "\n".join([f"{part['concurrency']} concurrent, median of {arguments.runs}:", *rows])


def parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.structured", description=__doc__)
    parser.add_argument("--json", action="store_true", help="one JSON object as the last line")
    parser.add_argument("--parts", type=lambda text: text.split(","), default=["cost", "validity"])
    parser.add_argument("--schemas", type=int, default=200)
    parser.add_argument("--skip", type=int, default=0, help="the first so many schemas, to go on with the rest")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--max-tokens", type=int, default=1024)
    parser.add_argument("--concurrency", type=int, default=16)
    parser.add_argument("--new-tokens", type=int, default=48)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--model", default="demo")
    parser.add_argument("--dtype", default="bfloat16")
    return parser.parse_args(argv)


if __name__ == "__main__":
    chosen = parse(sys.argv[1:])
    outcome = asyncio.run(main(chosen))
    if chosen.json:
        print(json.dumps(outcome))
