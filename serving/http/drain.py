"""The server process from its first request to its exit.

On SIGTERM or SIGINT, /ready turns 503 and no new requests are admitted, while the listener stays
open so that load balancers can see it. Requests in flight get at most ``server.drain_s`` to finish;
then the process exits with 0. A second signal ends them at once: each is told so, and the process
exits with 1. A third one waits for no client. An engine that cannot go on ends the server with 1.
"""

from __future__ import annotations

import contextlib
import logging
import socket
import time
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Protocol

from configs.schema import Settings
from serving.http.server_file import ServerFile

logger = logging.getLogger("serving.http")

LAST_WORDS_S = 2.0
"""Time to answer clients whose requests were cancelled at the end of the drain."""


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
