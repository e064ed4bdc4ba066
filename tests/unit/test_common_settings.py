"""Flags and environment: read once, unknown ones refused with a hint."""

from __future__ import annotations

from typing import Annotated

import pytest
from pydantic import Field

from molink_common.errors import SettingsError
from molink_common.settings import ServiceSettings, read_settings


class Example(ServiceSettings):
    """An example."""

    port: Annotated[int, Field(ge=1, le=65535, description="where to listen")] = 8000
    names: Annotated[tuple[str, ...], Field(description="names")] = ()
    verbose: Annotated[bool, Field(description="say more")] = False


def read(*arguments: str, **environment: str) -> Example:
    return read_settings(Example, arguments, environment, program="example")


def test_a_flag_wins_over_the_environment() -> None:
    assert read(MOLINK_PORT="1").port == 1
    assert read("--port", "2", MOLINK_PORT="1").port == 2
    assert read("--port=3").port == 3


def test_switches_and_lists() -> None:
    assert read("--verbose").verbose is True
    assert read("--no-verbose", MOLINK_VERBOSE="1").verbose is False
    assert read("--names", "a, b").names == ("a", "b")


@pytest.mark.parametrize(
    ("arguments", "environment", "said"),
    [
        (["--prt", "1"], {}, "did you mean --port"),
        (["8000"], {}, "unknown argument 8000"),
        (["--port"], {}, "--port needs a value"),
        (["--port", "--verbose"], {}, "--port needs a value"),
        (["--port", "x"], {}, "--port / MOLINK_PORT"),
        (["--port", "99999"], {}, "65535"),
        (["--no-port", "1"], {}, "no switch"),
        ([], {"MOLINK_PROT": "1"}, "did you mean MOLINK_PORT"),
    ],
)
def test_what_is_wrong_is_named(arguments: list[str], environment: dict[str, str], said: str) -> None:
    with pytest.raises(SettingsError, match=said):
        read(*arguments, **environment)


def test_a_password_is_not_shown() -> None:
    settings = read(MOLINK_NATS_PASSWORD="secret")
    assert "secret" not in repr(settings)
    assert settings.bus_settings().password == "secret"


def test_help_names_every_setting(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        read("--help")
    printed = capsys.readouterr().out
    assert "--port" in printed
    assert "MOLINK_NATS_URL" in printed
