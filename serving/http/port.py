"""The listening socket of a server. Imports little: a port that is taken is told at once."""

from __future__ import annotations

import errno
import socket

from configs.schema import Settings
from serving.http.connections import Listener
from serving.http.server_file import SERVER_FILE, remove_stale

BACKLOG = 2048
"""Connections that may wait to be accepted, as in uvicorn."""

_ADVICE = {
    errno.EADDRINUSE: "stop the process that listens there, or choose another port (0 for a free "
    "one)",
    errno.EACCES: "choose a port from 1024 on, or let this user bind lower ones",
}
_NOT_HERE = "server.host must be an address of this machine; 0.0.0.0 and :: are all of them"


def bind(settings: Settings) -> socket.socket:
    """A listening socket on the configured address, so that no other process can take it.

    Removes a ``server.json`` that a killed server left behind.

    Raises:
        OSError: the address is in use, or not this machine's; the message names the setting.
    """
    host, port = settings.server.host, settings.server.port
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    # Without the protocol asyncio leaves Nagle's algorithm on: answers wait 40 ms for an ACK.
    bound = Listener(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        bound.bind((host, port))
        super(Listener, bound).listen(
            BACKLOG
        )  # two sockets may be bound to one port until one of them listens
    except OSError as error:
        bound.close()
        raise OSError(
            f"cannot bind server.host {host} and server.port {port}: {error.strerror}; "
            f"{_ADVICE.get(error.errno or 0, _NOT_HERE)}"
        ) from error
    # A killed server could not remove it, and this one is not reachable under that address.
    remove_stale(settings.run_dir / SERVER_FILE)
    return bound
