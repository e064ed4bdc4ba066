"""Every NATS subject, in one place.

A worker publishes and subscribes only below its own ``worker.<id>`` and below the pipelines that it is part
of; that is what NATS permissions can enforce. ``*`` forms are for those who listen to all of a kind.

    molink.v1.scheduler.submit            gateway → scheduler   request: SubmitSequence → Admitted | Refused
    molink.v1.scheduler.resume            gateway → scheduler   request: ResumeSequence → Resumed | Failed
    molink.v1.scheduler.cancel            gateway → scheduler   CancelSequence
    molink.v1.scheduler.responses         gateway → schedulers  request: KeepResponse, AskResponse, DropResponse
    molink.v1.scheduler.join              worker → scheduler    request: JoinPool → Welcome | Failed
    molink.v1.scheduler.status            anybody → scheduler   request: AskState → ClusterState
    molink.v1.scheduler.state             scheduler → all       ClusterState, every second and on change
    molink.v1.scheduler.keys              gateway → scheduler   request: AskKeys → Keys
    molink.v1.scheduler.keys.change       operator → scheduler  request: AddKey | RevokeKey → Done | Failed
    molink.v1.worker.<w>.heartbeat        worker → scheduler    Heartbeat
    molink.v1.worker.<w>.control          scheduler → worker    request: AssignStage, PreloadStages, ReleaseStage
    molink.v1.worker.<w>.head             scheduler → head      request: StartSequence | StopSequence → Done | Failed
    molink.v1.worker.<w>.files            gateway → worker      request: FetchFile → FileChunk | Failed
    molink.v1.gateway.<g>.alive           gateway → scheduler   GatewayAlive
    molink.v1.gateway.<g>.failures        scheduler → gateway   SequenceFailed
    molink.v1.gateway.<g>.streams         gateway → gateways    ResumeSequence: this stream is served here from now on
    molink.v1.pipeline.<p>.stage.<k>      stage k-1 → stage k   activation frames of class decode (see wire)
    molink.v1.pipeline.<p>.stage.<k>.bulk stage k-1 → stage k   pieces of frames of class bulk (see pieces)
    molink.v1.pipeline.<p>.stage.<k>.acks stage k → stage k-1   what has arrived
    molink.v1.pipeline.<p>.tokens         tail → head, gateways, scheduler   StepTokens
    molink.v1.broker.disconnects          NATS → scheduler      its own JSON, for each client connection that ended
"""

from __future__ import annotations

from molink_common import PROTOCOL_VERSION

_ROOT = f"molink.v{PROTOCOL_VERSION}"

SUBMIT = f"{_ROOT}.scheduler.submit"
RESUME = f"{_ROOT}.scheduler.resume"
CANCEL = f"{_ROOT}.scheduler.cancel"
RESPONSES = f"{_ROOT}.scheduler.responses"
JOIN = f"{_ROOT}.scheduler.join"
STATUS = f"{_ROOT}.scheduler.status"
STATE = f"{_ROOT}.scheduler.state"
KEYS = f"{_ROOT}.scheduler.keys"
CHANGE_KEYS = f"{_ROOT}.scheduler.keys.change"
ALL_HEARTBEATS = f"{_ROOT}.worker.*.heartbeat"
ALL_GATEWAYS_ALIVE = f"{_ROOT}.gateway.*.alive"
ALL_GATEWAY_STREAMS = f"{_ROOT}.gateway.*.streams"
ALL_TOKENS = f"{_ROOT}.pipeline.*.tokens"
BROKER_DISCONNECTS = f"{_ROOT}.broker.disconnects"


def heartbeat(worker: str) -> str:
    """Where a worker says that it lives."""
    return f"{_ROOT}.worker.{worker}.heartbeat"


def control(worker: str) -> str:
    """Where a worker takes orders from the scheduler."""
    return f"{_ROOT}.worker.{worker}.control"


def head(worker: str) -> str:
    """Where the worker that is the head of a pipeline takes sequences."""
    return f"{_ROOT}.worker.{worker}.head"


def files(worker: str) -> str:
    """Where a worker hands out the model's tokenizer files."""
    return f"{_ROOT}.worker.{worker}.files"


def gateway_alive(gateway: str) -> str:
    """Where a gateway says that it lives."""
    return f"{_ROOT}.gateway.{gateway}.alive"


def gateway_failures(gateway: str) -> str:
    """Where a gateway hears that one of its sequences cannot be finished."""
    return f"{_ROOT}.gateway.{gateway}.failures"


def gateway_streams(gateway: str) -> str:
    """Where a gateway says that it has taken a stream up: whoever served it before ends its answer."""
    return f"{_ROOT}.gateway.{gateway}.streams"


def stage(pipeline: int, index: int) -> str:
    """Where the stage `index` of a pipeline receives activations."""
    return f"{_ROOT}.pipeline.{pipeline}.stage.{index}"


def stage_bulk(pipeline: int, index: int) -> str:
    """Where the stage `index` receives pieces of bulk frames, over a connection of their own."""
    return f"{stage(pipeline, index)}.bulk"


def stage_acks(pipeline: int, index: int) -> str:
    """Where the stage `index` says what has arrived; the stage before it listens."""
    return f"{stage(pipeline, index)}.acks"


def tokens(pipeline: int) -> str:
    """Where a pipeline's tail publishes tokens, once for all who need them."""
    return f"{_ROOT}.pipeline.{pipeline}.tokens"
