"""`molink gateway | scheduler | worker`: hand all arguments on to the service's own `main`.

A worker may ask for its site's broker (``--hub``), which is no business of the worker's own.
"""

from __future__ import annotations

import importlib
import os
from dataclasses import dataclass

import typer

from molink import site_worker
from molink_common.errors import MolinkError
from molink_common.folders import cache_folder
from molink_common.memory import begin_again_with_memory_environment


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


def run_worker(service: Service, arguments: list[str]) -> int:
    """The worker's exit code; it talks to its site's broker if ``--hub`` or ``MOLINK_HUB`` asks for one.

    Raises:
        MolinkError: something it needs is not installed, or the site's broker cannot run.
    """
    if any(argument in ("-h", "--help") for argument in arguments):
        print(f"molink worker takes one flag more than the worker itself, whose flags follow:\n\n{site_worker.HELP}\n")
        return run_service(service, arguments)
    begin_again_with_memory_environment()
    choice, rest = site_worker.site_choice(arguments, os.environ)
    if choice is None:
        return run_service(service, rest)
    with site_worker.use_site_broker(choice, cache_folder()) as url:
        return run_service(service, [*rest, "--nats-url", url])


def register(app: typer.Typer) -> None:
    """Add one command for each service. Flags and ``--help`` are the service's own."""
    for service in SERVICES:
        _register_one(app, service)


def _register_one(app: typer.Typer, service: Service) -> None:
    passed_on = {"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []}

    @app.command(name=service.command, help=service.help, context_settings=passed_on)
    def command(context: typer.Context) -> None:
        run = run_worker if service.command == "worker" else run_service
        raise typer.Exit(run(service, list(context.args)))
