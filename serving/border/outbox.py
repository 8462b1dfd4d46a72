"""Outputs from the engine's thread to the socket of an HTTP process; the engine never waits for it.

Whoever has something to send writes it to the socket itself, as long as the socket takes it: that
costs less than waking another thread, which would then take the GIL from the engine's thread
several times. What the socket does not take is left to a thread. It joins what belongs to one
request, so a process that reads slowly gets fewer and larger outputs, and what waits for it is at
most one joined output for each of its requests.
"""

from __future__ import annotations

import select
import socket
import threading
import time
from collections import deque
from collections.abc import Callable

from serving.border.messages import FromEngine, Outputs, frame
from serving.requests import Output, join_outputs

STALL_S = 30.0
"""A process that takes nothing for this long is given up."""
_COLLECT_S = 0.05
"""Time between two joins of what gathers while the socket is full."""
_MOST_OUTPUTS = 256
_MOST_TOKENS = 8192
"""Bounds of one message, so that it is encoded quickly: no other thread of the engine's process
runs meanwhile."""


class Outbox:
    """What one HTTP process is still to be sent."""

    def __init__(
        self, sock: socket.socket, on_broken: Callable[[str], None], stall_s: float = STALL_S
    ) -> None:
        """
        Args:
            sock: a stream socket. Others may read from it.
            on_broken: called on the sending thread when nothing more can be sent, with the reason.
        """
        self._sock = sock
        self._on_broken = on_broken
        self._stall_s = stall_s
        self._turn = threading.Lock()
        """Held by the thread that sends. What follows is for that thread, but for the queue, to
        which all may add."""
        self._queue: deque[list[Output] | FromEngine] = deque()
        self._rest = b""
        """Of a message whose first part was sent."""
        self._outputs: dict[str, list[Output]] = {}
        """Taken from the queue and not sent, by request."""
        self._messages: list[FromEngine] = []
        """The same for all else."""
        self._is_closed = False
        self._has_news = threading.Event()
        """The sending thread has something to do."""
        self._thread = threading.Thread(target=self._run, name="outbox", daemon=True)

    def start(self) -> None:
        """Begin to send."""
        self._thread.start()

    def put(self, outputs: list[Output]) -> None:
        """Send outputs. Returns at once. Those of one request are sent in the order in which they
        are put."""
        if len(outputs) > _MOST_OUTPUTS or not self._send_now(Outputs(outputs)):
            self._leave(outputs)

    def say(self, message: FromEngine) -> None:
        """Send a message. Returns at once."""
        if not self._send_now(message):
            self._leave(message)

    def close(self) -> None:
        """Send nothing more. Returns at once."""
        self._is_closed = True
        self._has_news.set()

    def join(self, timeout_s: float) -> None:
        """Wait after ``close`` until nobody uses the socket any more."""
        if self._thread.is_alive():
            self._thread.join(timeout_s)
        if self._turn.acquire(timeout=timeout_s):
            self._turn.release()

    # ---- any thread ----------------------------------------------------------------------------

    def _leave(self, item: list[Output] | FromEngine) -> None:
        """Leave something to the sending thread."""
        if not self._is_closed:
            self._queue.append(item)
            self._has_news.set()

    def _send_now(self, message: FromEngine) -> bool:
        """Send a message, or as much of it as the socket takes. Returns False if nothing was done,
        because another thread is sending or something waits to be sent before."""
        if not self._turn.acquire(blocking=False):
            return False
        try:
            if self._is_closed:
                return True
            if self._queue or self._outputs or self._messages or self._rest:
                return False
            data = frame(message)
            self._rest = data[self._sent(data) :]
            if self._rest:
                self._has_news.set()
            return True
        finally:
            self._turn.release()

    def _sent(self, data: bytes) -> int:
        """Number of bytes that the socket took."""
        try:
            return self._sock.send(data, socket.MSG_DONTWAIT)
        except OSError:  # it is full, or broken: then the sending thread finds out why
            return 0

    # ---- the sending thread --------------------------------------------------------------------

    def _run(self) -> None:
        try:
            while not self._is_closed:
                self._has_news.wait()
                self._has_news.clear()
                with self._turn:
                    self._send_all()
        except (OSError, ValueError) as error:
            if not self._is_closed:
                self._is_closed = True
                self._on_broken(str(error))
        self._is_closed = True
        with self._turn:
            self._drop_all()

    def _collect(self) -> None:
        """Take all that is in the queue."""
        while self._queue:
            item = self._queue.popleft()
            if isinstance(item, list):
                for output in item:
                    self._outputs.setdefault(output.request_id, []).append(output)
            else:
                self._messages.append(item)

    def _join(self) -> None:
        """Leave one output for each request."""
        for outputs in self._outputs.values():
            if len(outputs) > 1:
                outputs[:] = [join_outputs(outputs)]

    def _send_all(self) -> None:
        """Send what is left of a message, what is in the queue, and what gathers meanwhile."""
        rest, self._rest = self._rest, b""
        self._send(rest)
        self._collect()
        while (self._outputs or self._messages) and not self._is_closed:
            if self._outputs:
                self._send(frame(Outputs(self._some())))
            messages, self._messages = self._messages, []
            for message in messages:
                self._send(frame(message))

    def _some(self) -> list[Output]:
        """The next outputs: so many as one message may hold, at least one."""
        if len(self._outputs) <= _MOST_OUTPUTS:
            whole = [o[0] if len(o) == 1 else join_outputs(o) for o in self._outputs.values()]
            if sum(len(output.token_ids) for output in whole) <= _MOST_TOKENS:  # nearly always
                self._outputs.clear()
                return whole
        some: list[Output] = []
        num_tokens = 0
        for request_id in list(self._outputs):
            some.append(join_outputs(self._outputs.pop(request_id)))
            num_tokens += len(some[-1].token_ids)
            if len(some) >= _MOST_OUTPUTS or num_tokens >= _MOST_TOKENS:
                break
        return some

    def _send(self, data: bytes) -> None:
        """Send bytes, and join what gathers as long as the socket is full.

        Raises:
            OSError: the other side is gone, or took nothing for ``stall_s``.
        """
        left, since_s = memoryview(data), time.monotonic()
        while left and not self._is_closed:
            try:
                left = left[self._sock.send(left, socket.MSG_DONTWAIT) :]
                since_s = time.monotonic()
            except BlockingIOError:
                self._wait_for_room()
                if time.monotonic() - since_s > self._stall_s:
                    raise TimeoutError(f"it read nothing for {self._stall_s:.0f} s") from None

    def _wait_for_room(self) -> None:
        room = select.poll()
        room.register(self._sock, select.POLLOUT)
        room.poll(_COLLECT_S * 1e3)
        self._collect()
        self._join()

    def _drop_all(self) -> None:
        self._rest = b""
        self._queue.clear()
        self._outputs.clear()
        self._messages.clear()
