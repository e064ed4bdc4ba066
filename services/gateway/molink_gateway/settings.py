"""What can be set on a gateway."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from molink_common.messages import PeerId
from molink_common.settings import ServiceSettings


class GatewaySettings(ServiceSettings):
    """The OpenAI-compatible HTTP door."""

    host: Annotated[str, Field(description="address to listen on; 0.0.0.0 is all")] = "127.0.0.1"
    port: Annotated[int, Field(ge=0, le=65535, description="port to listen on; 0 takes a free one")] = 8000
    require_keys: Annotated[
        Literal["auto", "always", "once-added"],
        Field(
            description="who needs an API key. always: everybody; once-added: everybody, once there is a key; auto: "
            "like once-added where the gateway listens on this machine alone, else like always"
        ),
    ] = "auto"
    cors_origins: Annotated[
        tuple[Annotated[str, Field(pattern=r"^(\*|[a-z][a-z0-9+.-]*://[^/\s]+)$")], ...],
        Field(description="web pages that may ask from a browser: https://one.example,https://two.example or *"),
    ] = ()
    gateway_id: Annotated[PeerId | None, Field(description="name of this gateway in the pool; none: made up")] = None
    max_body_bytes: Annotated[int, Field(ge=1024, description="largest request body")] = 8 * 1024 * 1024
    max_streams: Annotated[int, Field(ge=1, description="most requests open at a time; more get 429")] = 1024
    body_timeout_s: Annotated[float, Field(gt=0, description="longest wait for a request's body")] = 60.0
    queue_timeout_s: Annotated[float, Field(gt=0, description="longest wait for a first token")] = 600.0
    stall_timeout_s: Annotated[float, Field(gt=0, description="longest wait for a further token")] = 120.0
    gap_timeout_s: Annotated[float, Field(gt=0, description="longest wait for a token that was overtaken")] = 30.0
    stop_grace_s: Annotated[float, Field(ge=0, description="time that open requests get to finish at the end")] = 5.0
    sign_of_life_s: Annotated[float, Field(gt=0, description="a stream silent for this long sends a comment")] = 10.0
    resumable_streams: Annotated[
        bool,
        Field(description="every stream can be taken up again, as if each request asked; then it outlives its client"),
    ] = False
