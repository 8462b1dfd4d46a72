"""Reads and checks traces in a thread of its own, beside the updates.

The thread reads ahead a bounded number of batches. Each comes with the offsets at which a resumed
trainer would continue behind it, so that a checkpoint never skips a trace that was read but not yet
taken in.
"""

from __future__ import annotations

import queue
import threading
from dataclasses import dataclass, field
from typing import Any

from drafters.samples import Sample
from trainer.intake import Intake

_AHEAD = 4
"""Batches of traces read ahead."""
_POLL_S = 0.05
"""Pause after a read that found nothing."""


@dataclass(frozen=True, slots=True)
class _Read:
    samples: list[Sample]
    offsets: dict[str, Any]
    error: Exception | None = None


@dataclass(slots=True)
class Reading:
    """Takes samples from the intake: in its thread once ``start`` was called, else at once."""

    intake: Intake
    offsets: dict[str, Any]
    """Where a resumed trainer continues: behind what ``take`` returned."""
    _queue: queue.Queue[_Read] = field(default_factory=lambda: queue.Queue(_AHEAD))
    _stop: threading.Event = field(default_factory=threading.Event)
    _thread: threading.Thread | None = None

    def start(self) -> None:
        """Read in a thread from now on."""
        self._thread = threading.Thread(target=self._run, name="reading", daemon=True)
        self._thread.start()

    def take(self) -> list[Sample]:
        """Samples that were read since the last call; never waits.

        Raises:
            Exception: what ended the thread.
        """
        if self._thread is None:
            return self._taken(self._read())
        samples = list[Sample]()
        for _ in range(_AHEAD):
            try:
                samples += self._taken(self._queue.get_nowait())
            except queue.Empty:
                break
        return samples

    def close(self) -> None:
        """End the thread. What it read ahead is read again by a resumed trainer."""
        self._stop.set()
        if self._thread is not None:
            self._thread.join()

    def _taken(self, read: _Read) -> list[Sample]:
        if read.error is not None:
            raise read.error
        self.offsets = read.offsets
        return read.samples

    def _read(self) -> _Read:
        samples = self.intake.read()
        return _Read(samples, self.intake.reader.offsets())

    def _run(self) -> None:
        offsets = self.offsets
        while not self._stop.is_set():
            try:
                read = self._read()
            except Exception as error:  # the outermost loop of this thread; ``take`` raises it
                read = _Read([], {}, error)
            if read.offsets != offsets:
                self._offer(read)
                offsets = read.offsets
            if read.error is not None:
                return
            if not read.samples:
                self._stop.wait(_POLL_S)

    def _offer(self, read: _Read) -> None:
        """Wait for room, but not longer than the trainer runs."""
        while not self._stop.is_set():
            try:
                self._queue.put(read, timeout=_POLL_S)
                return
            except queue.Full:
                continue
