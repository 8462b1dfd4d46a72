"""An engine behind the border between processes, without a second process."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path

from configs.schema import Settings
from serving.border.engine_side import Line, welcome_for
from serving.border.http_side import RemoteServer, Wire
from serving.border.in_process import Desk
from serving.service import Service


@asynccontextmanager
async def across_the_border(service: Service) -> AsyncIterator[RemoteServer]:
    """The service as an HTTP process sees it: through messages over a socket."""
    own, other = socket.socketpair()
    desk = Desk(service)
    with ThreadPoolExecutor(2) as slowly:
        line = Line(own, desk, welcome_for(desk, Settings(), Path()), slowly)
        line.start()
        try:
            wire, welcome = await Wire.over(other)
            model = replace(welcome.model, tokenizer=service.model.tokenizer)
            yield RemoteServer(wire, model, welcome.can_swap)
        finally:
            await asyncio.to_thread(line.end)
