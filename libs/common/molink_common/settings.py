"""Settings: read once, from flags and environment; what is not known is refused.

A service describes its settings as a subclass of `ServiceSettings` (pydantic). Each field is a flag
(``--nats-url``) and an environment variable (``MOLINK_NATS_URL``); a flag wins. An unknown flag, a variable
below ``MOLINK_`` that no part of MoLink knows, and a value that does not fit raise `SettingsError` with the
setting's name and the fix.
"""

from __future__ import annotations

import difflib
import types
import typing
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal, NoReturn, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from pydantic_core import PydanticUndefined

from molink_common.bus import BusSettings
from molink_common.errors import SettingsError

ENVIRONMENT_PREFIX = "MOLINK_"

#: Variables that belong to some part of MoLink. A service ignores those of the others, so that one
#: environment file serves all; whatever is in none of them is a typing error.
KNOWN_VARIABLES: set[str] = {
    "MOLINK_CACHE",
    "MOLINK_PIP",
    # `molink chat` and `molink status`
    "MOLINK_API_KEY",
    # `molink worker`, which starts a site's broker before the worker's own settings are read
    "MOLINK_HUB",
    # the gateway
    "MOLINK_HOST",
    "MOLINK_PORT",
    "MOLINK_GATEWAY_ID",
    "MOLINK_MAX_BODY_BYTES",
    "MOLINK_MAX_STREAMS",
    "MOLINK_BODY_TIMEOUT_S",
    "MOLINK_QUEUE_TIMEOUT_S",
    "MOLINK_STALL_TIMEOUT_S",
    "MOLINK_GAP_TIMEOUT_S",
    "MOLINK_STOP_GRACE_S",
    "MOLINK_RESUMABLE_STREAMS",
    "MOLINK_SIGN_OF_LIFE_S",
    "MOLINK_REQUIRE_KEYS",
    "MOLINK_CORS_ORIGINS",
    # the scheduler
    "MOLINK_REDIS_URL",
    "MOLINK_REDIS_CONNECT_TIMEOUT_S",
    "MOLINK_MODEL",
    "MOLINK_STAGES",
    "MOLINK_DTYPE",
    "MOLINK_MAX_SEQUENCES",
    "MOLINK_TTFT_TARGET_S",
    "MOLINK_KV_TOKENS",
    "MOLINK_MIN_KV_TOKENS",
    "MOLINK_BLOCK_SIZE",
    "MOLINK_STAGE_OVERHEAD_BYTES",
    "MOLINK_SETTLE_S",
    "MOLINK_PIPELINE_WAIT_S",
    "MOLINK_MICRO_BATCHES",
    "MOLINK_SCHEDULING",
    "MOLINK_ASSUMED_LINK_MBIT",
    "MOLINK_LINK_CODEC",
    "MOLINK_SPECULATION",
    # the stage worker
    "MOLINK_WORKER_ID",
    "MOLINK_SITE",
    "MOLINK_DEVICE",
    "MOLINK_MEMORY",
    "MOLINK_THREADS",
    "MOLINK_STEP_TOKENS",
    "MOLINK_MAX_RUNNING",
    "MOLINK_JOURNAL",
    "MOLINK_PREFIX_CACHE",
    "MOLINK_DRAIN_TIMEOUT_S",
}


class ServiceSettings(BaseModel):
    """What every service has."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    nats_url: Annotated[str, Field(description="address of NATS; several with commas")] = "nats://127.0.0.1:4222"
    nats_user: Annotated[str | None, Field(description="user for NATS")] = None
    nats_password: Annotated[str | None, Field(description="password for NATS", repr=False)] = None
    nats_credentials_file: Annotated[str | None, Field(description="NATS .creds file (JWT and nkey)")] = None
    nats_connect_timeout_s: Annotated[float, Field(gt=0, description="how long to wait for NATS at start-up")] = 30.0
    log_level: Annotated[Literal["debug", "info", "warning", "error"], Field(description="least level logged")] = "info"
    log_style: Annotated[Literal["json", "text"], Field(description="form of a log line")] = "json"
    otlp_endpoint: Annotated[
        str | None,
        Field(description="OTLP/HTTP collector for traces, e.g. http://jaeger:4318; none: no traces"),
    ] = None
    trace_share: Annotated[float, Field(ge=0, le=1, description="share of requests that are traced")] = 1.0

    def bus_settings(self) -> BusSettings:
        """How this service reaches NATS."""
        return BusSettings(
            url=self.nats_url,
            connect_timeout_s=self.nats_connect_timeout_s,
            user=self.nats_user,
            password=self.nats_password,
            credentials_file=self.nats_credentials_file,
        )


S = TypeVar("S", bound=BaseModel)


def flag_of(field: str) -> str:
    """``nats_url`` → ``--nats-url``."""
    return "--" + field.replace("_", "-")


def variable_of(field: str) -> str:
    """``nats_url`` → ``MOLINK_NATS_URL``."""
    return ENVIRONMENT_PREFIX + field.upper()


def read_settings(kind: type[S], arguments: Sequence[str], environment: Mapping[str, str], *, program: str) -> S:
    """The settings that flags and environment describe.

    Raises:
        SettingsError: with one sentence that names the setting and what would be right.
        SystemExit: after printing help for ``--help``.
    """
    if any(argument in ("-h", "--help") for argument in arguments):
        _print_help(kind, program)
    values: dict[str, Any] = _from_environment(kind, environment)
    values.update(_from_flags(kind, arguments))
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
        field = str(first["loc"][0]) if first["loc"] else ""
        shown = "" if "password" in field else f" (got {first['input']!r})"
        raise SettingsError(f"{flag_of(field)} / {variable_of(field)}: {first['msg']}{shown}") from error


def _from_environment(kind: type[BaseModel], environment: Mapping[str, str]) -> dict[str, Any]:
    own = {variable_of(field): field for field in kind.model_fields}
    values: dict[str, Any] = {}
    for name, text in environment.items():
        if name in own:
            values[own[name]] = _parse(kind, own[name], text)
        elif name.startswith(ENVIRONMENT_PREFIX) and name not in KNOWN_VARIABLES:
            raise SettingsError(f"unknown setting {name} in the environment{_suggest(name, {*own, *KNOWN_VARIABLES})}")
    return values


def _from_flags(kind: type[BaseModel], arguments: Sequence[str]) -> dict[str, Any]:
    own = {flag_of(field): field for field in kind.model_fields}
    values: dict[str, Any] = {}
    rest = list(arguments)
    while rest:
        argument = rest.pop(0)
        flag, has_value, text = argument.partition("=")
        negated = flag.startswith("--no-") and "--" + flag[5:] in own
        field = own.get("--" + flag[5:] if negated else flag)
        if field is None:
            what = "flag" if argument.startswith("-") else "argument"
            raise SettingsError(f"unknown {what} {flag}{_suggest(flag, own)}")
        if _is_switch(kind, field) and not has_value:
            values[field] = not negated
        elif negated:
            raise SettingsError(f"{flag} is no switch; give {flag_of(field)} a value")
        elif has_value:
            values[field] = _parse(kind, field, text)
        elif rest and not (rest[0].startswith("--") and rest[0].partition("=")[0] in own):
            values[field] = _parse(kind, field, rest.pop(0))
        else:
            raise SettingsError(f"{flag} needs a value")
    return values


def _kinds_of(kind: type[BaseModel], field: str) -> tuple[Any, ...]:
    annotation = kind.model_fields[field].annotation
    is_union = typing.get_origin(annotation) in (typing.Union, types.UnionType)
    return typing.get_args(annotation) if is_union else (annotation,)


def _is_switch(kind: type[BaseModel], field: str) -> bool:
    return bool in _kinds_of(kind, field)


def _parse(kind: type[BaseModel], field: str, text: str) -> Any:
    """Text as the field's kind wants it: lists are separated by commas, an empty text means none."""
    kinds = _kinds_of(kind, field)
    if text == "" and type(None) in kinds:
        return None
    if any(typing.get_origin(one) in (tuple, list) for one in kinds):
        return [part.strip() for part in text.split(",") if part.strip()]
    return text


def _suggest(name: str, known: Mapping[str, object] | set[str]) -> str:
    close = difflib.get_close_matches(name, list(known), n=1)
    return f"; did you mean {close[0]}?" if close else f"; known are {', '.join(sorted(known))}"


def _print_help(kind: type[BaseModel], program: str) -> NoReturn:
    lines = [f"usage: {program} [flags]", ""]
    if kind.__doc__:
        lines += [kind.__doc__.strip().splitlines()[0], ""]
    for field, info in kind.model_fields.items():
        default = "required" if info.default is PydanticUndefined else f"default {info.default}"
        lines.append(f"  {flag_of(field):28} {info.description or ''} ({default}; {variable_of(field)})")
    print("\n".join(lines))
    raise SystemExit(0)
