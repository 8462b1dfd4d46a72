"""The recorder's process as the engine's process sees it; it has the face of ``Recorder``.

A finished request is sent by the engine's thread itself as long as the socket takes it: that costs
less than waking another thread. What the socket does not take is left to a thread, up to a bound,
behind which the oldest are dropped and counted. A recorder that dies takes with it what it had not
written, which counts as dropped, and is started again; what finishes meanwhile is kept for it.
"""

from __future__ import annotations

import logging
import os
import select
import socket
import subprocess
import threading
import time
from collections import Counter, deque
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass

from configs.schema import Settings
from serving.capture.finished import Finished
from serving.capture.messages import (
    VERSION,
    Begin,
    End,
    FromRecorder,
    Opened,
    Refused,
    frame,
)
from serving.capture.recorder import DONE, num_waiting
from serving.capture.shared_counts import SharedCounts, new_counts
from serving.engine.capture_ring import Shared
from serving.framing import Frames
from serving.python_process import ending, start_python

log = logging.getLogger(__name__)

_OPENING_S = 60.0
"""For a process to import what it needs and to open the buffer."""
_ENDING_S = 5.0
"""For a process that has ended its connection to end itself."""
_LIVED_S = 1.0
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.1, 30.0
MOST_DEATHS = 6
"""Processes that die at once, in a row, after which somebody should look."""
_MOST_WAITING_BYTES = 64 << 20
_POLL_S = 0.05
COMMAND = ["-P", "-m", "serving.capture"]
"""Arguments of Python, before the number of the descriptor that it inherits."""


@dataclass(frozen=True, slots=True)
class Spawned:
    """A process that imports what it needs and waits for ``Begin``."""

    process: subprocess.Popen[bytes]
    sock: socket.socket
    """This side of the connection to it."""

    def end(self) -> None:
        """Make sure that it has ended."""
        self.sock.close()
        self.process.kill()
        self.process.wait()


def spawn() -> Spawned:
    """Start a recorder's process. The sooner, the less its imports are waited for.

    Raises:
        OSError: the system starts no process.
    """
    own, other = socket.socketpair()
    with other:
        try:
            process = start_python([*COMMAND, str(other.fileno())], [other.fileno()])
        except BaseException:
            own.close()
            raise
    log.debug("recorder's process %d started", process.pid)
    return Spawned(process, own)


class RecorderProcess:
    """Sends finished requests to a recorder in another process."""

    def __init__(
        self, settings: Settings, ring: Shared, layer_ids: tuple[int, ...], first: Spawned
    ) -> None:
        """Let the process open the buffer.

        Args:
            first: it, from ``spawn``; taken over.

        Raises:
            ValueError: the settings contradict what is stored, such as another key.
            ChildProcessError: the process died or did not answer; an OSError, as where there is no
                memory for it.
        """
        self._most_waiting = settings.capture.queue_traces
        counts = new_counts()
        self._descriptors = [ring.memory.descriptor, counts]
        """What every process is given; taken over."""
        self._begin = frame(
            Begin(VERSION, settings.model_dump_json(), ring.shape, ring.dtype, layer_ids)
        )
        self._shared = SharedCounts(counts)
        self._lock = threading.Lock()
        """Guards what follows."""
        self._num_queued = 0
        self._former: Counter[str] = Counter()
        """What became of traces that ended processes had, and of those that had no process."""
        self._held = _Waiting(self._most_waiting)
        """What is sent to the next process."""
        self._has_said = False
        """That a request could not be sent."""
        self._closing = threading.Event()
        self._line: _Line | None = None
        self._process = first.process
        self._line = self._opened(first)
        self._keeper = threading.Thread(target=self._keep, name="recorder-keeper", daemon=True)

    @property
    def pid(self) -> int:
        """Of the process."""
        return self._process.pid

    @property
    def num_lost_rows(self) -> int:
        """Captured rows that the ring overwrote before they were read."""
        with self._lock:
            return self._former["lost_rows"] + self._shared.read()["lost_rows"]

    def start(self) -> None:
        """Begin to look after the process."""
        self._keeper.start()

    def put(self, finished: Finished) -> None:
        """Send a finished request. Never waits; on the engine's thread."""
        try:
            data = frame(finished)
        except Exception as error:  # as of a policy's note that no message can hold
            self._has_failed(error)
            return
        with self._lock:
            self._num_queued += 1
            if self._closing.is_set():
                num_dropped = 1
            elif self._line is not None:
                num_dropped = self._line.put(data)
            else:
                self._held.append(data)
                num_dropped = self._held.drop()
            self._former["dropped"] += num_dropped

    def _has_failed(self, error: Exception) -> None:
        """Count a request that cannot be sent; its answer is as good as any."""
        with self._lock:
            self._num_queued += 1
            self._former["failed"] += 1
            is_first, self._has_said = not self._has_said, True
        if is_first:
            log.warning(
                "a trace is lost: it cannot be sent to the recorder's process (%r); serving "
                "continues, and all are counted (traces_total)",
                error,
            )

    def counts(self) -> dict[str, int]:
        """See ``Recorder.counts``."""
        with self._lock:
            # What is done with had been queued, so it is read first.
            own = Counter(self._shared.read()) + self._former
            counts = {"queued": self._num_queued}
        for name in (*DONE, "missing"):
            counts[name] = own[name]
        found = {name: own[name] for name in ("recovered", "unrecovered")}
        return counts | found if any(found.values()) else counts

    def close(self, timeout_s: float) -> None:
        """Let the process write what it was sent, and end it, within ``timeout_s`` seconds and a
        little. What is not written by then counts as dropped."""
        with self._lock:
            self._closing.set()
            line, process = self._line, self._process
        if line is not None:  # if not, it has not been told what to do yet
            line.put(frame(End(timeout_s)), is_last=True)
            with suppress(subprocess.TimeoutExpired):
                process.wait(timeout_s + 1.0)
        process.kill()
        process.wait()
        if self._keeper.is_alive():
            self._keeper.join(5.0)
        if line is not None:
            line.close()
        while self._descriptors:  # it may be closed twice
            os.close(self._descriptors.pop())
        if (left := num_waiting(self.counts())) > 0:
            log.warning(
                "%d traces were not written within %g s of the end: they are lost, and counted as "
                "dropped",
                left,
                timeout_s,
            )
            with self._lock:
                self._former["dropped"] += left

    # ---- the process ---------------------------------------------------------------------------

    def _opened(self, spawned: Spawned) -> _Line:
        """Tell a new process what to do, and wait until it can.

        Raises:
            ValueError, ChildProcessError: see ``__init__``. The process has ended.
        """
        try:
            spawned.sock.settimeout(_OPENING_S)
            socket.send_fds(spawned.sock, [self._begin[:1]], self._descriptors)
            spawned.sock.sendall(self._begin[1:])
            answer = _answer(spawned.sock)
        except OSError as error:
            if isinstance(error, ConnectionError):  # it is ending: why should be said as it was
                with suppress(subprocess.TimeoutExpired):
                    spawned.process.wait(_ENDING_S)
            spawned.end()
            how = ending(spawned.process.returncode)
            raise ChildProcessError(
                f"the recorder's process {how} before it could write traces ({error}); what it "
                f"wrote to this log says why"
            ) from error
        if isinstance(answer, Refused):
            spawned.end()
            raise ValueError(answer.text)
        spawned.sock.setblocking(False)
        return _Line(spawned.sock, self._most_waiting)

    def _keep(self) -> None:
        """Start another process when one has died; ever more rarely if they die at once."""
        num_deaths, since_s = 0, time.monotonic()
        while True:
            code = self._process.wait()
            if self._closing.is_set():
                return
            lived = time.monotonic() - since_s > _LIVED_S
            num_deaths = 1 if lived else num_deaths + 1
            lost = self._bury()
            log.error(
                "the recorder's process %d %s; %d traces are lost, and counted as dropped",
                self._process.pid,
                ending(code),
                lost,
            )
            line = None
            while line is None:
                if num_deaths == MOST_DEATHS:
                    log.critical(
                        "%d recorder's processes in a row died as soon as they were started; what "
                        "they wrote to this log says why. Serving continues, traces that cannot "
                        "be kept for the next one are dropped, and all are counted",
                        num_deaths,
                    )
                if self._closing.wait(_pause_s(num_deaths)):
                    return
                try:
                    line = self._another()
                except (OSError, ValueError) as error:
                    num_deaths += 1
                    if not self._closing.is_set():
                        log.error("%s", error)
            since_s = time.monotonic()
            with self._lock:
                is_late = self._closing.is_set()
                if not is_late:
                    self._line = line
                    self._former["dropped"] += sum([line.put(data) for data in self._held])
                    self._held.clear()
            if is_late:  # ``close`` ends the process, and counts what is held
                line.close()
                return

    def _another(self) -> _Line:
        """Start and open another process, which ``close`` ends from the moment it is there.

        Raises:
            OSError, ValueError: there is none.
        """
        spawned = spawn()
        with self._lock:
            if not self._closing.is_set():
                self._process = spawned.process
        if self._closing.is_set():
            spawned.end()
            raise ChildProcessError("the server stops")
        return self._opened(spawned)

    def _bury(self) -> int:
        """Count what a process that died leaves. Returns the number of traces lost."""
        with self._lock:
            line, self._line = self._line, None
            self._former += Counter(self._shared.read())
            self._shared.write({})
            lost = self._num_queued - sum(self._former[name] for name in DONE)
            self._former["dropped"] += lost
        if line is not None:
            line.close()
        return lost


def _answer(sock: socket.socket) -> Opened | Refused:
    """
    Raises:
        OSError: the other side is gone, or does not answer.
    """
    frames = Frames[FromRecorder](FromRecorder)
    while data := sock.recv(1 << 16):
        for message in frames.feed(data):
            return message
    raise ConnectionError("it ended its connection")


def _pause_s(num_deaths: int) -> float:
    """Before another process is started, after so many that died at once."""
    doublings = min(num_deaths - 1, 30)  # it is already at its longest, and 2**1024 is no float
    return min(_FIRST_PAUSE_S * float(1 << doublings), _LONGEST_PAUSE_S)


class _Waiting:
    """Messages that wait, in order, up to a bound."""

    def __init__(self, most: int) -> None:
        """
        Args:
            most: messages; ``_MOST_WAITING_BYTES`` bounds their bytes.
        """
        self._most = most
        self._messages: deque[memoryview] = deque()
        self._num_bytes = 0

    def __len__(self) -> int:
        return len(self._messages)

    def __iter__(self) -> Iterator[memoryview]:
        return iter(self._messages)

    @property
    def first(self) -> memoryview:
        """The oldest one, or what is left of it."""
        return self._messages[0]

    def append(self, data: bytes | memoryview) -> None:
        self._messages.append(memoryview(data))
        self._num_bytes += len(data)

    def drop(self, keep: int = 0) -> int:
        """Drop the oldest ones above the bound, but for the first ``keep``. Returns how many."""
        num_dropped = 0
        messages = self._messages
        while len(messages) > keep and (
            len(messages) > self._most or self._num_bytes > _MOST_WAITING_BYTES
        ):
            self._num_bytes -= len(messages[keep])
            del messages[keep]
            num_dropped += 1
        return num_dropped

    def sent(self, num_bytes: int) -> None:
        """So much of the first one has been sent."""
        first = self._messages[0][num_bytes:]
        self._num_bytes -= num_bytes
        if first:
            self._messages[0] = first
        else:
            self._messages.popleft()

    def clear(self) -> None:
        self._messages.clear()
        self._num_bytes = 0


class _Line:
    """Bytes on their way to the process.

    Whoever puts a message while none waits sends what the socket takes of it at once. As long as
    something waits, only the thread sends, and it sends the first message without the lock: a
    process that reads as fast as it is sent to does not hold up whoever puts the next one.
    """

    def __init__(self, sock: socket.socket, most_waiting: int) -> None:
        """
        Args:
            sock: a stream socket that never blocks; taken over.
            most_waiting: messages that may wait for the socket.
        """
        self._sock = sock
        self._lock = threading.Lock()
        """Guards what follows."""
        self._waiting = _Waiting(most_waiting)
        """The first one may be the rest of a message."""
        self._is_closed = False
        self._has_news = threading.Event()
        self._thread = threading.Thread(target=self._send_rest, name="to-recorder", daemon=True)
        self._thread.start()

    def put(self, data: bytes | memoryview, *, is_last: bool = False) -> int:
        """Send a message, or as much of it as the socket takes; the rest follows.

        Args:
            is_last: nothing is dropped for it.

        Returns:
            How many messages were dropped. A socket that is broken takes all of them: whoever
            waits for the process counts them.
        """
        with self._lock:
            self._waiting.append(data)
            if len(self._waiting) == 1:
                self._note(self._send(self._waiting.first))
            # Of the first one, a part may have been sent.
            num_dropped = 0 if is_last else self._waiting.drop(keep=1)
            if self._waiting:
                self._has_news.set()
            return num_dropped

    def close(self) -> None:
        """Send nothing more."""
        with self._lock:
            self._is_closed = True
            self._has_news.set()
        self._thread.join(5.0)
        self._sock.close()

    def _send(self, data: memoryview) -> int | None:
        """Send what the socket takes at once. Returns the number of bytes; ``None`` if it is
        broken."""
        try:
            return self._sock.send(data)
        except BlockingIOError:
            return 0
        except OSError:
            return None

    def _note(self, sent: int | None) -> None:
        """Note what ``_send`` returned for the first message. The lock is held."""
        if sent is None:  # the process is gone, and so is all that it was sent
            self._waiting.clear()
        else:
            self._waiting.sent(sent)

    def _send_rest(self) -> None:
        room = select.poll()
        room.register(self._sock, select.POLLOUT)
        while not self._is_closed:
            self._has_news.wait()
            with self._lock:
                first = self._waiting.first if self._waiting else None
                if first is None:
                    self._has_news.clear()
                    continue
            room.poll(_POLL_S * 1e3)
            sent = self._send(first)
            with self._lock:
                self._note(sent)
