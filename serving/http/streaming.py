"""Outputs on their way to a client's socket; who brings them never waits for the client.

Outputs are put into a ``Mailbox``. If the response waits for one, and the socket has room, its
event is written at once: to wake the response's task would take as long as all else. Otherwise the
response takes all that came: a client that reads slowly gets fewer and larger chunks. A mailbox
holds at most one output for each token of its requests, so memory is bounded by ``max_tokens``.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

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
        self.at_once: Callable[[Arrival], bool] | None = None
        """Takes an output while the reader waits; False: the reader is to have it."""

    def put(self, output: Output) -> None:
        """Pass an output on, or add it and let the reader go on."""
        arrival = Arrival(time.perf_counter(), output)
        if self._waiting is None or self._waiting.done():
            self._arrivals.append(arrival)
        elif self.at_once is None or not self.at_once(arrival):
            self._arrivals.append(arrival)
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
WRITE = "slipstream.write"
"""ASGI extension: a ``Write`` for the body of this response."""
Write = Callable[[bytes], bool]
"""Writes a part of a body at once. False: it was not written, because the client reads slowly, has
left, or does not know chunks; send it as usual."""


class Events(Protocol):
    """Server-sent events of one response."""

    @property
    def is_over(self) -> bool:
        """Nothing follows what ``next`` has returned."""

    async def next(self) -> bytes:
        """One event or several. Not to be called once it is over, or has raised."""

    def write_with(self, write: Write) -> None:
        """Write events as soon as they are there, from now on, while somebody waits in ``next``.
        What is not written that way comes from ``next``."""


class EventStream(Response):
    """Server-sent events; ``on_close`` is called on every end of the response.

    The response ends early if the client disconnects or reads nothing for ``stall_s``. The
    connection is then dropped, because a finished stream would look complete.
    """

    media_type = "text/event-stream"

    def __init__(
        self,
        events: Events,
        request: Request,
        on_close: Callable[[], None],
        stall_s: float = STALL_S,
    ) -> None:
        super().__init__(headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
        del self.headers["content-length"]
        self._events = events
        self._request_id: str = request.state.request_id
        self._on_close = on_close
        self._stall_s = stall_s
        self._since_s: float | None = None
        """When a message was begun that is not sent yet; the loop's clock."""
        self._sending: asyncio.Task[Any] | None = None
        self._watch: asyncio.TimerHandle | None = None
        self._is_given_up = False

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        sending = asyncio.current_task()
        assert sending is not None
        leaving = asyncio.create_task(until_disconnect(receive))
        leaving.add_done_callback(self._give_up)
        self._sending = sending
        self._watch_for(self._stall_s)
        try:
            await self._send_all(scope, send)
        except asyncio.CancelledError:
            if not self._is_given_up or sending.uncancel() > 0:  # somebody else cancelled it
                raise
        finally:
            self._on_close()
            leaving.remove_done_callback(self._give_up)
            leaving.cancel()
            if self._watch is not None:
                self._watch.cancel()

    def _give_up(self, _: object = None) -> None:
        """End the response before its end."""
        assert self._sending is not None
        self._is_given_up = True
        self._sending.cancel()

    def _watch_for(self, left_s: float) -> None:
        self._watch = asyncio.get_running_loop().call_later(left_s, self._look)

    def _look(self) -> None:
        """Give up if the client has read nothing for ``stall_s``; otherwise look again when that
        can be the case. A timer for each event would be a twentieth of its price."""
        now_s = asyncio.get_running_loop().time()
        left_s = self._stall_s - (0.0 if self._since_s is None else now_s - self._since_s)
        if left_s > 0:
            self._watch_for(left_s)
            return
        logger.warning(
            "request %s: the client read nothing for %.0f s, request cancelled",
            self._request_id,
            self._stall_s,
        )
        self._give_up()

    async def _send_all(self, scope: Scope, send: Send) -> None:
        clock = asyncio.get_running_loop().time
        start: dict[str, Any] = {
            "type": "http.response.start", "status": self.status_code, "headers": self.raw_headers
        }  # fmt: skip
        self._since_s = clock()
        await send(start)
        self._since_s = None
        events, is_over = self._events, False
        if (write := scope.get("extensions", {}).get(WRITE)) is not None:
            events.write_with(write)
        while not is_over:
            try:
                data = await events.next()
                is_over = events.is_over
            except Exception as error:  # the status is already sent: it becomes the last event
                log_failure(self._request_id, error)
                data, is_over = event(internal(self._request_id).body.model_dump_json()), True
            self._since_s = clock()
            await send({"type": "http.response.body", "body": data, "more_body": not is_over})
            self._since_s = None
