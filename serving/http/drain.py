"""The server process from its first request to its exit.

On SIGTERM or SIGINT, /ready turns 503 and no new requests are admitted, while the listener stays
open so that load balancers can see it. Requests in flight get at most ``server.drain_s`` to finish;
then the process exits with 0. A second signal ends them at once: each is told so, and the process
exits with 1. A third one waits for no client.
"""

from __future__ import annotations

import asyncio
import math
import socket
import time
from collections.abc import Callable
from types import FrameType

import h11
import uvicorn
from fastapi import FastAPI
from uvicorn.protocols.http.h11_impl import H11Protocol

from configs.schema import Settings
from serving.http.boundary import MAX_HEAD_BYTES
from serving.http.context import Context, of_app
from serving.http.errors import ApiError, invalid, logger
from serving.http.face import ServedModel
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
    app: FastAPI, model: ServedModel, settings: Settings, bound: socket.socket | None = None
) -> int:
    """Answer requests until a signal arrives.

    Args:
        bound: socket from ``bind``, for a caller that wants to fail early if the port is taken.

    Returns:
        Exit code: 0 after a drain, 1 when a second signal cut it short.

    Raises:
        OSError: the address cannot be bound.
    """
    listener = bind(settings) if bound is None else bound
    host, port = listener.getsockname()[:2]
    file = ServerFile(settings.run_dir, host, port, model.model_name)

    def announce() -> None:
        file.start()
        shown = f"[{host}]" if ":" in host else host
        logger.info("ready: serving %s at http://%s:%d", model.model_name, shown, port)

    server = DrainingServer(
        uvicorn.Config(
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
        ),
        of_app(app),
        announce,
    )
    try:
        server.run(sockets=[listener])
    finally:
        file.stop()
    return 1 if server.is_cut_short else 0


def bind(settings: Settings) -> socket.socket:
    """A listening socket on the configured address, so that no other process can take it.

    Removes a ``server.json`` that a killed server left behind.

    Raises:
        OSError: the address is in use, or not this machine's; the message names the setting.
    """
    host, port = settings.server.host, settings.server.port
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    # Without the protocol asyncio leaves Nagle's algorithm on: answers wait 40 ms for an ACK.
    bound = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        bound.bind((host, port))
        bound.listen(BACKLOG)  # two sockets may be bound to one port until one of them listens
    except OSError as error:
        bound.close()
        raise OSError(
            f"cannot bind server.host {host} and server.port {port}: {error.strerror}; "
            f"stop the process that listens there, or choose another port (0 for a free one)"
        ) from error
    # A killed server could not remove it, and this one is not reachable under that address.
    remove_stale(settings.run_dir / SERVER_FILE)
    return bound


class DrainingServer(uvicorn.Server):
    """uvicorn's server, drained before its shutdown."""

    def __init__(
        self, config: uvicorn.Config, context: Context, announce: Callable[[], None]
    ) -> None:
        super().__init__(config)
        self._context = context
        self._announce = announce
        self._num_signals = 0
        self._is_closing = False
        """Nothing is in flight any more but responses that clients are reading."""
        self._deadline_s: float | None = None
        """End of the drain on the monotonic clock; ``None`` before it begins."""

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self._announce()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Only sets flags: it interrupts the main thread anywhere, and the interrupted code may
        hold the locks that a longer call needs."""
        self._num_signals += 1
        if self._num_signals > (1 if self._is_closing else 2):
            self.should_exit = self.force_exit = True

    @property
    def is_cut_short(self) -> bool:
        """Told to end before all requests had."""
        return self._num_signals > 1

    async def on_tick(self, counter: int) -> bool:
        """Called ten times a second. Returns True to end the main loop."""
        if await super().on_tick(counter):
            return True
        if self._num_signals == 0:
            return False
        if self._deadline_s is None:
            self._begin_drain()
        return self._is_drained()

    def _begin_drain(self) -> None:
        drain_s = self._context.settings.server.drain_s
        self._deadline_s = time.monotonic() + drain_s
        self._context.begin_drain()
        logger.warning(
            "draining: %d requests in flight get up to %.0f s; a second signal stops immediately",
            self._context.server.inbox.num_inflight(),
            drain_s,
        )

    def _is_drained(self) -> bool:
        """True if nothing is in flight, or if the time is up."""
        assert self._deadline_s is not None
        left_s = 0.0 if self.is_cut_short else self._deadline_s - time.monotonic()
        num_left = self._context.server.inbox.num_inflight()
        if num_left and left_s > 0:
            return False
        if num_left:
            why = "a second signal came" if self.is_cut_short else "drain time is up"
            logger.warning("%s: cancelling %d requests", why, num_left)
            self._context.cancel_inflight()
        self._is_closing = True
        # For responses still being written: a slow reader gets the rest of the drain.
        self.config.timeout_graceful_shutdown = math.ceil(max(left_s, LAST_WORDS_S))
        return True


class GuardedProtocol(H11Protocol):
    """uvicorn's HTTP/1.1 with a time limit on headers: without it, a client that never finishes a
    request line holds its socket forever."""

    _header_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._watch_headers()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._watch_headers()

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
        ]
        response = h11.Response(status_code=error.status, headers=headers, reason=b"Bad Request")
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
