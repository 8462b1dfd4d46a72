"""The server process from its first request to its exit.

On SIGTERM or SIGINT, /ready turns 503 and no new requests are admitted, while the listener stays
open so that load balancers can see it. Requests in flight get at most ``server.drain_s`` to finish;
then the process exits with 0. A second signal ends them at once: each is told so, and the process
exits with 1. A third one waits for no client. An engine that cannot go on ends the server with 1.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import math
import socket
import time
from collections.abc import Callable, Iterator
from http import HTTPStatus
from types import FrameType
from typing import Protocol

import h11
import uvicorn
from fastapi import FastAPI
from uvicorn.protocols.http.h11_impl import H11Protocol

from configs.schema import Settings
from serving.http.boundary import MAX_HEAD_BYTES
from serving.http.connections import ACCEPTS, Listener, is_near_limit
from serving.http.context import of_app
from serving.http.errors import ApiError, invalid, logger
from serving.http.server_file import SERVER_FILE, ServerFile, remove_stale

HEADER_S = 10.0
"""Time from the first byte of a request to the end of its headers."""
KEEP_ALIVE_S = 75
"""Idle connections stay open longer than clients keep theirs in a pool (the openai client 5 s,
common load balancers 60 s). The client must close first: a request sent while the server closes is
lost."""
LAST_WORDS_S = 2.0
"""Time to answer clients whose requests were cancelled at the end of the drain."""
BACKLOG = 2048
"""Connections that may wait to be accepted, as in uvicorn."""


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


@contextlib.contextmanager
def announced(
    listener: socket.socket, settings: Settings, model_name: str
) -> Iterator[Callable[[], None]]:
    """What to call once the server answers: it writes ``server.json``, which is removed when the
    block ends."""
    host, port = listener.getsockname()[:2]
    file = ServerFile(settings.run_dir, host, port, model_name)

    def announce() -> None:
        file.start()
        shown = f"[{host}]" if ":" in host else host
        logger.info("ready: serving %s at http://%s:%d", model_name, shown, port)

    try:
        yield announce
    finally:
        file.stop()


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


class Inflight(Protocol):
    """The requests of the engine, as ``serving.engine.inbox.Inbox``."""

    def drain(self) -> None:
        """Admit no new requests; those in flight continue."""

    def cancel_all(self) -> None:
        """End those in flight."""

    def num_inflight(self) -> int:
        """Requests submitted and not finished."""


class Drain:
    """From the first signal to the moment when only responses are left."""

    def __init__(
        self, inbox: Inflight, drain_s: float, has_failed: Callable[[], bool] = lambda: False
    ) -> None:
        """
        Args:
            has_failed: whether the engine cannot go on, which ends the server at once.
        """
        self._inbox = inbox
        self._drain_s = drain_s
        self._has_failed = has_failed
        self._num_signals = 0
        self._is_closing = False
        """Nothing is in flight any more but responses that clients are reading."""
        self._deadline_s: float | None = None
        """End of the drain on the monotonic clock; ``None`` before it begins."""
        self.is_forced = False
        """Told to end without waiting for any client: by a signal that came when it was closing
        already, or by a third one."""
        self.has_failed = False
        """The engine could not go on, or ``fail`` was called."""

    def on_signal(self, sig: int, frame: FrameType | None) -> None:
        """Only sets flags: it interrupts the main thread anywhere, and the interrupted code may
        hold the locks that a longer call needs."""
        self._num_signals += 1
        if self._num_signals > (1 if self._is_closing else 2):
            self.is_forced = True

    @property
    def is_cut_short(self) -> bool:
        """Told to end before all requests had."""
        return self._num_signals > 1

    @property
    def exit_code(self) -> int:
        return 1 if self.is_cut_short or self.has_failed else 0

    def fail(self) -> None:
        """End the server: clients cannot be served any more."""
        self.has_failed = True

    def tick(self) -> float | None:
        """To be called ten times a second. Returns ``None`` until the listener is to be closed,
        then the seconds that responses may still take."""
        if self._has_failed() and not self.has_failed:
            logger.critical("the engine cannot go on: the server ends; its log above says why")
            self.fail()
        if self.has_failed:
            self._inbox.drain()
            self._is_closing = True
            return LAST_WORDS_S
        if self._num_signals == 0:
            return None
        if self._deadline_s is None:
            self._deadline_s = self._begin()
        return self._left(self._deadline_s)

    def _begin(self) -> float:
        self._inbox.drain()
        logger.warning(
            "draining: %d requests in flight get up to %.0f s; a second signal stops immediately",
            self._inbox.num_inflight(),
            self._drain_s,
        )
        return time.monotonic() + self._drain_s

    def _left(self, deadline_s: float) -> float | None:
        """As ``tick``: not ``None`` if nothing is in flight, or the time is up."""
        left_s = 0.0 if self.is_cut_short else deadline_s - time.monotonic()
        num_left = self._inbox.num_inflight()
        if num_left and left_s > 0:
            return None
        if num_left:
            why = "a second signal came" if self.is_cut_short else "drain time is up"
            logger.warning("%s: cancelling %d requests", why, num_left)
            self._inbox.cancel_all()
        self._is_closing = True
        # For responses still being written: a slow reader gets the rest of the drain.
        return max(left_s, LAST_WORDS_S)


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


def _too_many_connections() -> ApiError:
    return ApiError(
        503,
        "The server holds as many connections as it may open files (ulimit -n); retry shortly.",
        code="too_many_connections",
        headers={"Retry-After": "1"},
    )


class GuardedProtocol(H11Protocol):
    """uvicorn's HTTP/1.1 with a time limit on headers, without which a client that never finishes a
    request line holds its socket forever, and with a limit on connections."""

    _header_timer: asyncio.TimerHandle | None = None

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
