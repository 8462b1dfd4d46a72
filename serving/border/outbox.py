"""Outputs from the engine's thread to the socket of an HTTP process; the engine never waits for it.

``put`` appends to a queue. A thread takes all that has gathered, joins what belongs to one request
and sends one message for many requests, so a process that reads slowly gets fewer and larger
outputs, and what waits for it is at most one joined output for each of its requests.
"""

from __future__ import annotations

import select
import socket
import threading
import time
from collections.abc import Callable
from queue import Empty, SimpleQueue

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
        self._queue: SimpleQueue[Output | FromEngine | None] = SimpleQueue()
        self._outputs: dict[str, list[Output]] = {}
        """Taken from the queue and not sent, by request."""
        self._messages: list[FromEngine] = []
        """The same for all else."""
        self._is_closed = False
        self._thread = threading.Thread(target=self._run, name="outbox", daemon=True)

    def start(self) -> None:
        """Begin to send."""
        self._thread.start()

    def put(self, output: Output) -> None:
        """Send an output. Called on the engine's thread; wakes the sending thread if it sleeps."""
        if not self._is_closed:
            self._queue.put(output)

    def say(self, message: FromEngine) -> None:
        """Send a message."""
        if not self._is_closed:
            self._queue.put(message)

    def close(self) -> None:
        """Send nothing more. Returns at once."""
        self._is_closed = True
        self._queue.put(None)

    def join(self, timeout_s: float) -> None:
        """Wait for the thread after ``close``."""
        if self._thread.is_alive():
            self._thread.join(timeout_s)

    # ---- the sending thread --------------------------------------------------------------------

    def _run(self) -> None:
        try:
            while not self._is_closed:
                self._sort(self._queue.get())
                self._collect()
                self._send_all()
        except (OSError, ValueError) as error:
            if not self._is_closed:
                self._on_broken(str(error))
        self._is_closed = True
        self._drop_all()

    def _sort(self, item: Output | FromEngine | None) -> None:
        if isinstance(item, Output):
            self._outputs.setdefault(item.request_id, []).append(item)
        elif item is not None:
            self._messages.append(item)

    def _collect(self) -> None:
        """Take all that is in the queue."""
        take = self._queue.get_nowait
        try:
            while True:
                self._sort(take())
        except Empty:
            pass

    def _join(self) -> None:
        """Leave one output for each request."""
        for outputs in self._outputs.values():
            if len(outputs) > 1:
                outputs[:] = [join_outputs(outputs)]

    def _send_all(self) -> None:
        """Send what was collected, and what gathers meanwhile."""
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
        self._collect()
        self._outputs.clear()
        self._messages.clear()
