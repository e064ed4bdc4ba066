"""`molink gateway | scheduler | worker`: hand all arguments on to the service's own `main`."""

from __future__ import annotations

import importlib
from dataclasses import dataclass

import typer

from molink_common.errors import MolinkError


@dataclass(frozen=True, slots=True)
class Service:
    """A service that this distribution can run."""

    command: str
    package: str
    extra: str
    help: str


SERVICES = (
    Service("gateway", "molink_gateway", "gateway", "Run a gateway: the OpenAI-compatible HTTP endpoint."),
    Service("scheduler", "molink_scheduler", "scheduler", "Run a scheduler: layer map, admission, recovery."),
    Service("worker", "molink_stage_worker", "stage-worker", "Run a stage worker: lends this machine to a pool."),
)


class MissingExtra(MolinkError):
    """A package that only one service needs is not installed. The message says how to install it."""


def run_service(service: Service, arguments: list[str]) -> int:
    """The service's exit code.

    Raises:
        MissingExtra: what it needs is not installed.
    """
    try:
        module = importlib.import_module(f"{service.package}.__main__")
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] == service.package:
            raise  # our own fault, not a missing extra
        raise MissingExtra(
            f"molink {service.command} needs {error.name}: pip install 'molink[{service.extra}]'"
        ) from error
    return int(module.main(arguments))


def register(app: typer.Typer) -> None:
    """Add one command for each service. Flags and ``--help`` are the service's own."""
    for service in SERVICES:
        _register_one(app, service)


def _register_one(app: typer.Typer, service: Service) -> None:
    passed_on = {"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []}

    @app.command(name=service.command, help=service.help, context_settings=passed_on)
    def command(context: typer.Context) -> None:
        raise typer.Exit(run_service(service, list(context.args)))
