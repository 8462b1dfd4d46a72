"""Outputs on their way to a client's socket; who brings them never waits for the client.

Outputs are put into a ``Mailbox``. The response takes all that came: a client that reads slowly
gets fewer and larger chunks. A mailbox holds at most one output for each token of its requests, so
memory is bounded by ``max_tokens``.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Callable
from typing import Any, NamedTuple

from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from serving.http.errors import internal, log_failure, logger
from serving.requests import Output

STALL_S = 30.0
"""A client that reads nothing for this long is dropped and its requests are cancelled."""


class Arrival(NamedTuple):
    """One output and when it came."""

    at_s: float
    """``time.perf_counter()``."""
    output: Output


class Mailbox:
    """Outputs for one response. All methods are for the event loop's thread."""

    def __init__(self) -> None:
        self._arrivals: list[Arrival] = []
        self._waiting: asyncio.Future[None] | None = None
        """Of the reader, while there is nothing to take."""

    def put(self, output: Output) -> None:
        """Add an output, and let the reader go on."""
        self._arrivals.append(Arrival(time.perf_counter(), output))
        if self._waiting is not None and not self._waiting.done():
            self._waiting.set_result(None)

    async def take(self) -> list[Arrival]:
        """All outputs since the last call; waits for at least one. For one reader."""
        while not self._arrivals:
            self._waiting = asyncio.get_running_loop().create_future()
            await self._waiting
        taken, self._arrivals = self._arrivals, []
        return taken


async def until_disconnect(receive: Receive) -> None:
    """Return when the client has disconnected. The body must have been read."""
    while (await receive())["type"] != "http.disconnect":
        pass


def event(data: str) -> bytes:
    """One server-sent event."""
    return b"data: " + data.encode() + b"\n\n"


DONE = event("[DONE]")


class EventStream(Response):
    """Server-sent events; ``on_close`` is called on every end of the response.

    The response ends early if the client disconnects or reads nothing for ``stall_s``. The
    connection is then dropped, because a finished stream would look complete.
    """

    media_type = "text/event-stream"

    def __init__(
        self,
        events: AsyncGenerator[bytes],
        request: Request,
        on_close: Callable[[], None],
        stall_s: float = STALL_S,
    ) -> None:
        """
        Args:
            events: none of them empty. A generator, which is at its end once it has failed.
        """
        super().__init__(headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
        del self.headers["content-length"]
        self._events = events
        self._request_id: str = request.state.request_id
        self._on_close = on_close
        self._stall_s = stall_s
        self._since_s: float | None = None
        """When a message was begun that is not sent yet; the loop's clock."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        tasks = [
            asyncio.create_task(self._send_all(send)),
            asyncio.create_task(until_disconnect(receive)),
        ]
        try:
            await self._until_over(tasks)
        finally:
            self._on_close()
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _until_over(self, tasks: list[asyncio.Task[None]]) -> None:
        """Wait until one of them is done, or the client has read nothing for ``stall_s``: a timer
        for each event would be a twentieth of its price."""
        clock, left_s = asyncio.get_running_loop().time, self._stall_s
        while left_s > 0:
            done, _ = await asyncio.wait(tasks, timeout=left_s, return_when=asyncio.FIRST_COMPLETED)
            if done:
                return
            waited_s = 0.0 if self._since_s is None else clock() - self._since_s
            left_s = self._stall_s - waited_s
        logger.warning(
            "request %s: the client read nothing for %.0f s, request cancelled",
            self._request_id,
            self._stall_s,
        )

    async def _send_all(self, send: Send) -> None:
        clock = asyncio.get_running_loop().time
        start: dict[str, Any] = {
            "type": "http.response.start", "status": self.status_code, "headers": self.raw_headers
        }  # fmt: skip
        self._since_s = clock()
        await send(start)
        self._since_s = None
        is_whole = False
        while not is_whole:
            try:
                data = await anext(self._events, b"")
            except Exception as error:  # the status is already sent: it becomes the last event
                log_failure(self._request_id, error)
                data = event(internal(self._request_id).body.model_dump_json())
            is_whole = not data
            self._since_s = clock()
            await send({"type": "http.response.body", "body": data, "more_body": not is_whole})
            self._since_s = None
