"""The entry of the `molink` command. Exit codes: 0, 1 for what went wrong, 2 for wrong usage."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from molink_common.errors import MolinkError, SettingsError


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line; ends the process."""
    from molink.app import app  # noqa: PLC0415  errors of imports are reported like all others

    try:
        app(args=None if arguments is None else list(arguments))
    except SettingsError as error:
        print(f"molink: {error}", file=sys.stderr)
        sys.exit(2)
    except MolinkError as error:
        print(f"molink: {error}", file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    main()
