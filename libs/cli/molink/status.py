"""`molink status`: workers, layer map, KV use and running sequences of a system that runs."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated

import httpx
import orjson
import typer
from pydantic import ValidationError
from rich.console import Console
from rich.table import Table

from molink.memory import show_size
from molink.openai_stream import response_error
from molink_common.errors import MolinkError
from molink_common.messages import (
    ClusterState,
    HeadReport,
    LinkCodec,
    LinkReport,
    PipelineState,
    StageCostReport,
    WorkerState,
)

_TIMEOUT_S = 5.0


def status(
    gateway: Annotated[str, typer.Option(help="Address of a gateway.")] = "http://127.0.0.1:8000",
    as_json: Annotated[bool, typer.Option("--json", help="Print the state as one JSON object.")] = False,
    api_key: Annotated[
        str | None, typer.Option(envvar=["MOLINK_API_KEY", "OPENAI_API_KEY"], help="Key for the gateway.")
    ] = None,
) -> None:
    """Show workers and why they have their role, the layer map, KV use and running sequences."""
    content = fetch(gateway, api_key)
    if as_json:
        print(orjson.dumps(orjson.loads(content), option=orjson.OPT_INDENT_2).decode())
        return
    try:
        state = ClusterState.model_validate_json(content)
    except ValidationError as error:
        raise MolinkError(f"{gateway} is no gateway of this version: {error.errors()[0]['msg']}") from error
    show(state, Console())


def fetch(gateway: str, api_key: str | None) -> bytes:
    """The gateway's answer to ``GET /molink/status``.

    Raises:
        MolinkError: nothing answers, or something else than a gateway does.
    """
    headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
    try:
        answer = httpx.get(gateway.rstrip("/") + "/molink/status", headers=headers, timeout=_TIMEOUT_S)
    except (httpx.TransportError, httpx.InvalidURL) as error:
        raise MolinkError(
            f"no gateway answers at {gateway} ({error or type(error).__name__}); start one, or set --gateway"
        ) from error
    if answer.status_code != httpx.codes.OK:
        raise response_error(answer.status_code, answer.content)
    return answer.content


def show(state: ClusterState, console: Console) -> None:
    """Print the state as tables."""
    card = state.card
    model = f"{card.name}, {card.num_layers} layers" if card is not None else "no model yet"
    ready = "ready" if state.ready else f"not ready: {state.reason}"
    console.print(f"{model} · {ready} · {state.sequences} of {state.max_sequences} sequences", highlight=False)
    console.print(_workers_table(state.workers))
    if state.pipelines:
        console.print(_pipelines_table(state.pipelines))
    links = _links_table(state)
    if links is not None:
        console.print(links)


def _workers_table(workers: tuple[WorkerState, ...]) -> Table:
    table = Table(title="workers", title_justify="left", expand=False)
    for column in ("worker", "device", "memory used / offered", "last heard", "role", "why"):
        table.add_column(column, overflow="fold")
    for worker in workers:
        memory = f"{show_size(worker.rss_bytes)} / {show_size(worker.memory_bytes)}"
        silent = f"{worker.silent_s:.1f} s"
        table.add_row(worker.worker, worker.device, memory, silent, worker.role, worker.reason)
    return table


def _pipelines_table(pipelines: tuple[PipelineState, ...]) -> Table:
    table = Table(title="layer map", title_justify="left", expand=False)
    for column in ("pipeline", "layers", "KV blocks used", "sequences", "steps under way", "plan"):
        table.add_column(column, overflow="fold")
    for pipeline in pipelines:
        table.add_row(
            f"{pipeline.pipeline} (epoch {pipeline.epoch}, {'ready' if pipeline.ready else 'not ready'})",
            "\n".join(_layer_lines(pipeline)),
            _kv_use(pipeline.head, pipeline.block_size),
            _queue(pipeline.head),
            _under_way(pipeline),
            _plan(pipeline),
        )
    return table


def _layer_lines(pipeline: PipelineState) -> Iterator[str]:
    for worker, (first, last) in zip(pipeline.stages, pipeline.layers, strict=True):
        yield f"{first} to {last - 1}: {worker}"


def _kv_use(head: HeadReport | None, block_size: int) -> str:
    if head is None or head.num_blocks == 0:
        return "unknown"
    used = head.num_blocks - head.free_blocks
    use = f"{used} of {head.num_blocks} ({used / head.num_blocks:.0%}), {block_size} tokens each"
    return f"{use}\n{_prefix_use(head)}" if head.prefix_queries_tokens else use


def _prefix_use(head: HeadReport) -> str:
    share = head.prefix_hits_tokens / head.prefix_queries_tokens
    return f"{head.cached_blocks} free hold earlier texts; {share:.0%} of {head.prefix_queries_tokens} tokens found"


def _queue(head: HeadReport | None) -> str:
    return "unknown" if head is None else f"{head.running} running, {head.waiting} waiting"


def _under_way(pipeline: PipelineState) -> str:
    return "unknown" if pipeline.head is None else str(pipeline.head.steps_under_way)


def _plan(pipeline: PipelineState) -> str:
    head, policy = pipeline.head, pipeline.policy
    if head is None:
        return "unknown"
    how = "fixed" if policy.micro_batches is not None else str(policy.scheduling)
    prompts = "in steps of their own" if head.separate_prefill else "with decode"
    if head.riding_tokens:
        prompts = f"{prompts}, short ones with decode"
    cycle = "" if head.cycle_s is None else f", a token every {head.cycle_s * 1e3:.0f} ms"
    plan = f"{head.micro_batches} micro-batches ({how}){cycle}; prompts {prompts}, {head.chunk_tokens} tokens a chunk"
    return f"{plan}{_guesses(head)}"


def _guesses(head: HeadReport) -> str:
    if not head.drafted_tokens:
        return ""
    return f"; {head.drafted_tokens} tokens guessed, {head.accepted_tokens / head.drafted_tokens:.0%} rightly"


def _links_table(state: ClusterState) -> Table | None:
    """What each stage costs and what its link to the next one carries, as measured. None before there are two."""
    table = Table(title="stages and links", title_justify="left", expand=False)
    for column in ("stage", "a step takes", "link to the next", "round trip", "rate", "window", "codec"):
        table.add_column(column, overflow="fold")
    workers = {worker.worker: worker for worker in state.workers}
    for pipeline in state.pipelines:
        costs = pipeline.head.costs if pipeline.head is not None else ()
        for index, name in enumerate(pipeline.stages):
            stage = workers[name].stage if name in workers else None
            cost = _cost(costs[index]) if index < len(costs) else "not measured yet"
            link = _link_cells(stage.link) if stage is not None and stage.link is not None else [""] * 5
            table.add_row(f"{index}: {name}", cost, *link)
    return table if table.row_count > 1 else None


def _cost(cost: StageCostReport) -> str:
    per_token, per_sequence = cost.per_token_s * 1e3, cost.per_sequence_s * 1e3
    return f"{cost.fixed_s * 1e3:.1f} ms + {per_token:.2f} ms a token + {per_sequence:.2f} ms a sequence"


def _link_cells(link: LinkReport) -> list[str]:
    return [
        f"{show_size(link.sent_bytes)} sent, {show_size(link.queued_bytes)} waiting",
        "not measured yet" if link.round_trip_s is None else f"{link.round_trip_s * 1e3:.1f} ms",
        "not measured yet" if link.rate_bytes_per_s is None else f"{link.rate_bytes_per_s * 8 / 1e6:.1f} Mbit/s",
        show_size(link.window_bytes) if link.window_bytes else "none",
        _codec(link),
    ]


def _codec(link: LinkReport) -> str:
    automatic = ", chosen by measurement" if link.codec is LinkCodec.AUTO else ""
    return f"{link.present_codec} ({link.exactness}{automatic}): {link.share_left:.0%} of the bytes"
