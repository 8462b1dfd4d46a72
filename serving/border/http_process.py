"""A process that speaks HTTP for the engine's process.

SIGINT and SIGTERM are blocked in it, because they concern the server, whose process tells it when
to end. It ends by itself when that process is gone.

Exit code 0: told to end. 1: the engine's process is gone, or something failed.
"""

from __future__ import annotations

import asyncio
import gc
import logging
import math
import os
import socket
from dataclasses import replace
from pathlib import Path

import typer
import uvicorn

from configs.logs import set_up_logging
from configs.schema import Settings
from serving.border.http_side import RemoteServer, Wire
from serving.border.messages import (
    Welcome,
)
from serving.framing import ProtocolError
from serving.http.app import create_app
from serving.http.connections import Listener
from serving.http.drain import LAST_WORDS_S
from serving.http.tallies import Tallies
from serving.http.uvicorn_server import http_config
from serving.requests import EngineGoneError
from targets.tokenizer import served_tokenizer

log = logging.getLogger("serving.border")


class HttpServer(uvicorn.Server):
    """uvicorn's server, ended by the engine's process."""

    def __init__(self, config: uvicorn.Config, wire: Wire, server: RemoteServer) -> None:
        super().__init__(config)
        self._wire = wire
        self._server = server

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        _spare_the_collector()
        if not self._wire.is_gone:
            self._server.ready()

    async def on_tick(self, counter: int) -> bool:
        """Called ten times a second. Returns True to end the main loop."""
        if await super().on_tick(counter):
            return True
        left_s = LAST_WORDS_S if self._wire.is_gone else self._wire.close_s
        if left_s is None:
            return False
        if self._wire.close_s is None:  # a process that is killed cannot say so itself
            log.critical(
                "the engine's process is gone, or has ended its connection to this one: requests "
                "end with an error, and this HTTP process ends. If the log says nothing else, the "
                "engine's process was killed, e.g. by the system, out of memory: start it again"
            )
        self.config.timeout_graceful_shutdown = math.ceil(left_s)
        return True


def _spare_the_collector() -> None:
    """Hide from the garbage collector what lives as long as the process: most of it are modules.

    At 6,000 events a second, it took a quarter of the process's time to traverse them again and
    again.
    """
    gc.collect()
    gc.freeze()


def main(listener: int, border: int, tallies: int, num_rows: int, row: int) -> None:
    """Serve HTTP for the process at the other end of BORDER.

    Args:
        listener: descriptor of the listening socket.
        border: descriptor of the socket to the engine's process.
        tallies: descriptor of the memory of ``Tallies``, which has so many rows.
        row: the row of this process.
    """
    # What these processes start inherits none of them.
    for descriptor in (listener, border, tallies):
        os.set_inheritable(descriptor, False)
    shared = Tallies.mapped(tallies, num_rows, row)
    try:
        code = asyncio.run(_serve(Listener(fileno=listener), border, shared))
    except EngineGoneError:
        code = 1
    except ProtocolError as error:
        log.error("%s", error)
        code = 1
    raise typer.Exit(code)


async def _serve(listener: Listener, border: int, tallies: Tallies) -> int:
    wire, welcome = await Wire.over(socket.socket(fileno=border))
    settings = Settings.model_validate_json(welcome.settings)
    set_up_logging(settings.log_level)
    server = await asyncio.to_thread(_server, wire, welcome, settings.target_cache)
    config = http_config(create_app(server, settings, tallies))
    # Connections that each turn of the loop takes: a process that takes all that wait leaves none
    # to the others.
    config.backlog = 1
    await HttpServer(config, wire, server).serve(sockets=[listener])
    return 1 if wire.is_gone else 0


def _server(wire: Wire, welcome: Welcome, cache: Path | None) -> RemoteServer:
    tokenizer = served_tokenizer(Path(welcome.tokenizer), cache)
    return RemoteServer(wire, replace(welcome.model, tokenizer=tokenizer), welcome.can_swap)
