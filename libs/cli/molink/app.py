"""The `molink` command: every subcommand is registered here, from the module that has its name."""

from __future__ import annotations

from typing import Annotated

import typer

from molink import broker, certify, chat, down, keys, run_service, status, up
from molink_common import __version__

app = typer.Typer(
    name="molink",
    help="Serve one large language model across machines that could not serve it alone.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

app.command(name="up")(up.up)
app.command(name="down")(down.down)
app.command(name="status")(status.status)
app.command(name="chat")(chat.chat)
app.add_typer(keys.app, name="keys")
app.command(name="certify")(certify.certify)
run_service.register(app)
app.command(name="broker")(broker.broker)


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"molink {__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version.", callback=_print_version, is_eager=True)
    ] = False,
) -> None:
    """Serve one large language model across machines that could not serve it alone."""
