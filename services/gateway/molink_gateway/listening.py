"""The socket that the gateway listens on: opened first of all, so that a taken port is known at once."""

from __future__ import annotations

import socket

from molink_common.errors import SettingsError


def listen(host: str, port: int) -> socket.socket:
    """A listening socket.

    Raises:
        SettingsError: the port is taken or the address is not of this machine.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        opened = socket.socket(family, kind, protocol)
    except OSError as error:
        raise SettingsError(f"--host: cannot listen on {host}: {error}") from error
    try:
        opened.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        opened.bind(address)
        opened.listen(2048)
        opened.setblocking(False)
    except OSError as error:
        opened.close()
        raise SettingsError(
            f"--port: cannot listen on {host}:{port}: {error.strerror}. Stop what uses it, or choose another port."
        ) from error
    return opened
