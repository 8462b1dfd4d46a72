"""uvicorn as every process of a server runs it: with a drain, and guarded against its clients."""

from __future__ import annotations

import asyncio
import math
import socket
from collections.abc import Callable
from http import HTTPStatus
from types import FrameType
from typing import Any

import h11
import uvicorn
from fastapi import FastAPI
from starlette.types import Message, Scope, Send
from uvicorn.protocols.http.flow_control import FlowControl
from uvicorn.protocols.http.h11_impl import H11Protocol, RequestResponseCycle

from configs.schema import Settings
from serving.http.boundary import MAX_HEAD_BYTES
from serving.http.connections import ACCEPTS, is_near_limit
from serving.http.context import of_app
from serving.http.drain import Drain, Inflight, announced
from serving.http.errors import ApiError, invalid
from serving.http.port import bind
from serving.http.streaming import WRITE

HEADER_S = 10.0
"""Time from the first byte of a request to the end of its headers."""
KEEP_ALIVE_S = 75
"""Idle connections stay open longer than clients keep theirs in a pool (the openai client 5 s,
common load balancers 60 s). The client must close first: a request sent while the server closes is
lost."""


def serve(
    app: FastAPI,
    inbox: Inflight,
    settings: Settings,
    bound: socket.socket | None = None,
    has_failed: Callable[[], bool] = lambda: False,
) -> int:
    """Answer requests in this process until a signal arrives.

    Args:
        bound: socket from ``bind``, for a caller that wants to fail early if the port is taken.
        has_failed: whether the engine cannot go on, which ends the server.

    Returns:
        Exit code: 0 after a drain, 1 when a second signal cut it short, or the engine failed.

    Raises:
        OSError: the address cannot be bound.
    """
    listener = bind(settings) if bound is None else bound
    drain = Drain(inbox, settings.server.drain_s, has_failed)
    with announced(listener, settings, of_app(app).server.model.model_name) as announce:
        DrainingServer(http_config(app), drain, announce).run(sockets=[listener])
    return drain.exit_code


def http_config(app: FastAPI) -> uvicorn.Config:
    """How every process speaks HTTP."""
    return uvicorn.Config(
        app,
        http=GuardedProtocol,
        ws="none",
        lifespan="on",
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,
        timeout_keep_alive=KEEP_ALIVE_S,
        h11_max_incomplete_event_size=MAX_HEAD_BYTES,
        backlog=ACCEPTS,
    )


class DrainingServer(uvicorn.Server):
    """uvicorn's server, drained before its shutdown."""

    def __init__(self, config: uvicorn.Config, drain: Drain, announce: Callable[[], None]) -> None:
        super().__init__(config)
        self._drain = drain
        self._announce = announce

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self._announce()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        self._drain.on_signal(sig, frame)
        if self._drain.is_forced:
            self.should_exit = self.force_exit = True

    async def on_tick(self, counter: int) -> bool:
        """Called ten times a second. Returns True to end the main loop."""
        if await super().on_tick(counter):
            return True
        left_s = self._drain.tick()
        if left_s is None:
            return False
        self.config.timeout_graceful_shutdown = math.ceil(left_s)
        return True


def _is_chunked(scope: Scope, start: Message) -> bool:
    """Whether h11 sends this body in chunks: its length is not known, and the client knows them."""
    if scope["http_version"] != "1.1" or scope["method"] == "HEAD":
        return False
    return all(name != b"content-length" for name, _ in start["headers"])


def _too_many_connections() -> ApiError:
    return ApiError(
        503,
        "The server holds as many connections as it may open files (ulimit -n); retry shortly.",
        code="too_many_connections",
        headers={"Retry-After": "1"},
    )


class _Behind:
    """A transport that writes some bytes together with the first that it is given."""

    def __init__(self, first: bytes, transport: asyncio.Transport) -> None:
        self._first = first
        self._transport = transport

    def write(self, data: bytes) -> None:
        if data:
            self._transport.write(self._first + data)
            self._first = b""

    def close(self) -> None:
        self._transport.close()


def _chunk(data: bytes) -> bytes:
    """A part of a chunked body, not empty: that would be its end."""
    return b"%x\r\n%b\r\n" % (len(data), data)


class _Body:
    """``send`` of a response. Parts of a chunked body need none of what h11 does: it checks that a
    response has begun, and writes the length before them."""

    def __init__(
        self,
        cycle: RequestResponseCycle,
        flow: FlowControl,
        transport: asyncio.Transport,
        scope: Scope,
        send: Send,
    ) -> None:
        self._cycle, self._flow, self._transport = cycle, flow, transport
        self._scope, self._send = scope, send
        self._is_chunked = False
        """It has begun, in chunks."""

    def write(self, data: bytes) -> bool:
        """See ``serving.http.streaming.Write``."""
        if not self._is_chunked or self._flow.write_paused or self._cycle.disconnected:
            return False
        self._transport.write(_chunk(data))
        return True

    async def send(self, message: Message) -> None:
        """See ASGI."""
        cycle, data = self._cycle, message.get("body")
        if data and self._is_chunked:
            if self._flow.write_paused and not cycle.disconnected:
                await self._flow.drain()
            chunk = _chunk(data)
            if message.get("more_body"):
                if not cycle.disconnected:
                    self._transport.write(chunk)
                return
            cycle.transport = _Behind(chunk, self._transport)  # type: ignore[assignment]
            message = {"type": "http.response.body", "body": b"", "more_body": False}
        await self._send(message)
        cycle.transport = self._transport
        if message["type"] == "http.response.start":
            self._is_chunked = _is_chunked(self._scope, message)


class GuardedProtocol(H11Protocol):
    """uvicorn's HTTP/1.1 with a time limit on headers, without which a client that never finishes a
    request line holds its socket forever, and with a limit on connections. Events of streams go to
    the transport without h11, which takes longer over one than all else."""

    _header_timer: asyncio.TimerHandle | None = None

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        whole_app = self.app

        async def app(scope: Any, receive: Any, send: Any) -> None:
            body = _Body(self.cycle, self.flow, self.transport, scope, send)
            # The cycle has the other scope: it would be garbage for the collector to find.
            scope = {**scope, "extensions": {WRITE: body.write}}
            await whole_app(scope, receive, body.send)

        self.app = app

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._watch_headers()
        if is_near_limit(transport.get_extra_info("socket").fileno()):
            self._send_refusal(_too_many_connections())
            transport.close()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._watch_headers()

    def _unsupported_upgrade_warning(self) -> None:
        """Nothing: the request is answered as if it had not asked (RFC 9110, Section 7.8), and
        uvicorn's advice to install something would not change that."""

    def send_400_response(self, msg: str) -> None:
        """Refuse malformed HTTP in the usual error format, unless a response has begun."""
        if self.cycle is not None and not self.cycle.response_complete:
            self.cycle.disconnected = True
            self.cycle.message_event.set()
        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            self._send_refusal(invalid(msg, code="invalid_http"))
        self.transport.close()

    def _send_refusal(self, error: ApiError) -> None:
        body = error.body.model_dump_json().encode()
        headers = [
            ("Content-Type", "application/json"),
            ("Content-Length", str(len(body))),
            ("Connection", "close"),
            *(error.headers or {}).items(),
        ]
        reason = HTTPStatus(error.status).phrase.encode()
        response = h11.Response(status_code=error.status, headers=headers, reason=reason)
        for event in (response, h11.Data(data=body), h11.EndOfMessage()):
            self.transport.write(self.conn.send(event) or b"")

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        self._stop_watch()

    def _watch_headers(self) -> None:
        """Keep one timer running while a request's headers are incomplete."""
        is_waiting = self.conn.their_state is h11.IDLE and not self.transport.is_closing()
        if not is_waiting:
            self._stop_watch()
        elif self._header_timer is None:
            self._header_timer = self.loop.call_later(HEADER_S, self.transport.close)

    def _stop_watch(self) -> None:
        if self._header_timer is not None:
            self._header_timer.cancel()
            self._header_timer = None
