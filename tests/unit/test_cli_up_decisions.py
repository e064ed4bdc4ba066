"""What `molink up` decides before and while it starts: commands, memory, and whether to go on waiting."""

from __future__ import annotations

from pathlib import Path

import pytest

from molink.memory import parse_size, share_for_each, show_size, weight_bytes, what_is_lacking
from molink.parts import Kind, Part
from molink.plan import UpOptions, service_parts
from molink.readiness import hopeless, news, still_missing
from molink_common.errors import SettingsError
from molink_common.memory import MEMORY_ENVIRONMENT
from molink_common.messages import ClusterState, Dtype, ModelCard, StagePhase, StageReport, WorkerState

CARD = ModelCard(
    name="tiny",
    aliases=("demo",),
    fingerprint="f",
    family="llama",
    packed=True,
    num_layers=2,
    hidden_size=8,
    vocabulary_size=16,
    context_length=64,
    checkpoint_dtype="float32",
    layer_parameters=(1_000_000, 1_000_000),
    embedding_parameters=500_000,
    output_parameters=500_000,
    kv_scalars_per_token=(16, 16),
)


def parts_of(options: UpOptions, memory_bytes: int = 1 << 30) -> list[Part]:
    return service_parts(
        options, nats_url="nats://n", redis_url="redis://r", worker_memory_bytes=memory_bytes, logs=Path("/logs")
    )


def flags_of(part: Part) -> dict[str, str]:
    rest = list(part.command[3:])
    return dict(zip(rest[::2], rest[1::2], strict=True))


def test_the_scheduler_forms_one_pipeline_over_all_workers() -> None:
    scheduler, gateway, *workers = parts_of(UpOptions(workers=3, model="owner/name"))
    assert flags_of(scheduler)["--stages"] == "3"
    assert flags_of(scheduler)["--model"] == "owner/name"
    assert gateway.kind is Kind.GATEWAY
    assert [worker.name for worker in workers] == ["worker 1", "worker 2", "worker 3"]
    assert len({worker.log for worker in workers}) == 3
    assert len({flags_of(worker)["--worker-id"] for worker in workers}) == 3


def test_fewer_stages_than_workers_when_asked_for() -> None:
    scheduler, *_ = parts_of(UpOptions(workers=3, stages=2))
    assert flags_of(scheduler)["--stages"] == "2"


def test_every_service_gets_the_servers_and_the_collector() -> None:
    parts = parts_of(UpOptions(otlp_endpoint="http://jaeger:4318"))
    assert all(flags_of(part)["--nats-url"] == "nats://n" for part in parts)
    assert all(flags_of(part)["--otlp-endpoint"] == "http://jaeger:4318" for part in parts)
    assert not any("--otlp-endpoint" in flags_of(part) for part in parts_of(UpOptions()))


def test_workers_get_their_share_and_their_threads() -> None:
    *_, worker = parts_of(UpOptions(workers=1, threads=4), memory_bytes=1234)
    assert flags_of(worker)["--memory"] == "1234B"
    assert worker.environment["OMP_NUM_THREADS"] == "4"
    assert worker.environment.items() >= MEMORY_ENVIRONMENT.items()


def test_a_gateway_on_all_addresses_is_reached_on_loopback() -> None:
    assert UpOptions(host="0.0.0.0", port=81).url == "http://127.0.0.1:81"
    assert UpOptions(host="192.0.2.7", port=81).url == "http://192.0.2.7:81"


@pytest.mark.parametrize(
    ("text", "size"),
    [("1024", 1024), ("800MiB", 800 << 20), ("1.5G", 3 << 29), ("2 gb", 2 << 30), ("1T", 1 << 40), ("7K", 7 << 10)],
)
def test_sizes(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "0", "-1G", "1.5X", "G", "1e9", "nan"])
def test_what_is_no_size(text: str) -> None:
    with pytest.raises(SettingsError, match="--memory"):
        parse_size(text)


def test_sizes_for_people() -> None:
    assert show_size(311 << 20) == "311 MiB"
    assert show_size(3 << 29) == "1.5 GiB"


def test_too_little_memory_is_said_with_numbers() -> None:
    assert weight_bytes(CARD, Dtype.BFLOAT16) == 6_000_000
    assert what_is_lacking(CARD, Dtype.BFLOAT16, per_worker=3_000_000, workers=2) is None
    assert what_is_lacking(CARD, Dtype.FLOAT32, per_worker=6_000_000, workers=2) is None
    lacking = what_is_lacking(CARD, Dtype.FLOAT32, per_worker=5_999_999, workers=2)
    assert lacking is not None
    assert "tiny" in lacking
    assert "--dtype bfloat16" in lacking
    assert "11 MiB" in lacking


def test_workers_share_less_than_everything() -> None:
    assert share_for_each(800, 2) == 350


def worker(
    name: str, *, phase: StagePhase | None = None, role: str = "stage 0 of pipeline 1", **more: str
) -> WorkerState:
    stage = None
    if phase is not None:
        stage = StageReport(
            pipeline=1,
            epoch=1,
            index=0,
            first_layer=0,
            last_layer=15,
            phase=phase,
            progress=0.4,
            problem=more.get("problem"),
        )
    return WorkerState(
        worker=name,
        site="here",
        device="cpu",
        device_name="cpu",
        memory_bytes=1,
        rss_bytes=1,
        silent_s=0.1,
        role=role,
        reason=more.get("reason", "because"),
        stage=stage,
    )


def state(*workers: WorkerState, ready: bool = False) -> ClusterState:
    return ClusterState(ready=ready, reason="ready" if ready else "stages are loading", workers=workers)


NAMES = {"a": "worker 1", "b": "worker 2"}


def test_only_what_changed_on_our_workers_is_news() -> None:
    stranger = worker("elsewhere", phase=StagePhase.LOADING)
    first = state(worker("a", phase=StagePhase.LOADING), worker("b", role="preparing"), stranger)
    second = state(worker("a", phase=StagePhase.READY), worker("b", phase=StagePhase.LOADING))
    assert news(None, first, NAMES) == [("worker 1", "loading layers 0 to 14")]
    assert news(first, first, NAMES) == []
    assert news(first, second, NAMES) == [("worker 1", "layers 0 to 14 ready"), ("worker 2", "loading layers 0 to 14")]


def test_a_worker_of_ours_that_cannot_serve_ends_the_waiting() -> None:
    assert hopeless(state(worker("a", phase=StagePhase.LOADING)), NAMES) is None
    assert hopeless(state(worker("a", role="preparing")), NAMES) is None
    unfit = worker("a", role="unfit", reason="no such model")
    assert hopeless(state(unfit), NAMES) == "worker 1 cannot serve: no such model"
    assert hopeless(state(unfit), {}) is None
    failed = hopeless(state(worker("a", phase=StagePhase.FAILED, problem="out of memory")), NAMES)
    assert failed == "worker 1 cannot load its layers: out of memory"


def test_what_is_missing_names_everything_that_is_not_ready() -> None:
    assert still_missing(None, NAMES) == "the scheduler says nothing yet"
    text = still_missing(state(worker("a", phase=StagePhase.LOADING)), NAMES)
    assert text == "worker 2 has not joined; worker 1 is loading 40%"
    assert still_missing(state(worker("a", phase=StagePhase.READY)), {"a": "worker 1"}) == "stages are loading"
