"""The scheduler's settings: flags and ``MOLINK_…`` variables."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from molink_common.messages import Dtype, LinkCodec, PipelinePolicy, Scheduling, Speculation
from molink_common.settings import ServiceSettings


class SchedulerSettings(ServiceSettings):
    """The scheduler: keeps the layer map and the sequences' state, admits, places, recovers."""

    redis_url: Annotated[str, Field(description="address of Redis", repr=False)] = "redis://127.0.0.1:6379/0"
    redis_connect_timeout_s: Annotated[float, Field(gt=0, description="how long to wait for Redis at start-up")] = 30.0
    model: Annotated[str, Field(min_length=1, description="what to serve: demo, a folder, a GGUF file, a hub id")] = (
        "demo"
    )
    stages: Annotated[
        Literal["auto"] | Annotated[int, Field(ge=1)],
        Field(description="stages of a pipeline; auto: every fit worker holds one"),
    ] = "auto"
    pipelines: Annotated[
        Literal["auto"] | Annotated[int, Field(ge=1)],
        Field(description="most pipelines side by side; auto: as many as idle workers can hold the whole model"),
    ] = "auto"
    standbys: Annotated[
        int, Field(ge=0, description="fit workers that hold no stage, for when one is lost, where the model fits so")
    ] = 0
    dtype: Annotated[
        Literal["auto"] | Dtype,
        Field(description="float32, bfloat16, float16; auto: bfloat16 where every worker is best at it"),
    ] = "auto"
    max_sequences: Annotated[int, Field(ge=1, le=4096, description="most sequences admitted at the same time")] = 256
    ttft_target_s: Annotated[
        float,
        Field(ge=0, description="a request whose first token is predicted to come later is refused; 0: none is"),
    ] = 20.0
    kv_tokens: Annotated[int, Field(ge=1, description="most tokens that the KV blocks hold")] = 131072
    min_kv_tokens: Annotated[int, Field(ge=1, description="least KV room, in tokens, that a placement leaves")] = 2048
    block_size: Annotated[int, Field(ge=1, le=4096, description="tokens a KV block")] = 16
    stage_overhead_bytes: Annotated[
        int, Field(ge=0, description="part of each worker's memory that is kept for activations")
    ] = 64 * 1024 * 1024
    worker_silent_s: Annotated[
        float, Field(ge=1, le=60, description="how long a worker's heartbeats may be missing until it is lost")
    ] = 1.75
    settle_s: Annotated[float, Field(ge=0, description="how long the set of workers must be stable")] = 1.0
    pipeline_wait_s: Annotated[float, Field(gt=0, description="how long sequences wait for a lost pipeline")] = 60.0
    micro_batches: Annotated[
        Literal["auto"] | Annotated[int, Field(ge=1, le=256)],
        Field(description="micro-batches under way in a pipeline; auto: planned from what is measured"),
    ] = "auto"
    scheduling: Annotated[
        Scheduling,
        Field(description="adaptive; plain and published are the baselines it is compared with"),
    ] = Scheduling.ADAPTIVE
    assumed_link_mbit: Annotated[
        float, Field(gt=0, description="link speed that scheduling 'published' plans with; else not looked at")
    ] = 100.0
    link_codec: Annotated[
        LinkCodec,
        Field(
            description="auto: raw, or lossless where the measured link is slow enough; raw, lossless or int8, "
            "on links between sites, and raw within a site"
        ),
    ] = LinkCodec.AUTO
    speculation: Annotated[
        Speculation,
        Field(description="lookup: guess tokens from a text's own repetitions and verify several at once; off"),
    ] = Speculation.OFF

    def policy(self) -> PipelinePolicy:
        """What a pipeline's stages must agree on."""
        return PipelinePolicy(
            scheduling=self.scheduling,
            micro_batches=None if self.micro_batches == "auto" else self.micro_batches,
            assumed_link_bytes_per_s=self.assumed_link_mbit * 1e6 / 8,
            speculation=self.speculation,
        )
