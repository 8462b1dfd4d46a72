"""Recent engine counters, so that a dashboard shows the minutes before it was opened."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import astuple, dataclass, fields

from serving.requests import EngineFigures

PERIOD_S = 1.0
MAX_SAMPLES = 900


@dataclass(frozen=True, slots=True)
class Sample:
    """Counters at one moment; readers take differences."""

    unix_s: float
    generation_tokens: int
    num_accepted_tokens: int
    num_draft_tokens: int
    num_running: int
    num_waiting: int
    drafter_version: int


SAMPLE_FIELDS = tuple(field.name for field in fields(Sample))


class History:
    """A ring of samples."""

    def __init__(self) -> None:
        self._samples: deque[Sample] = deque(maxlen=MAX_SAMPLES)

    def add(self, unix_s: float, figures: EngineFigures) -> None:
        """Take in the figures of a moment."""
        self._samples.append(
            Sample(
                unix_s=unix_s,
                generation_tokens=figures.generation_tokens,
                num_accepted_tokens=figures.num_accepted_tokens,
                num_draft_tokens=figures.num_draft_tokens,
                num_running=figures.num_running,
                num_waiting=figures.num_waiting,
                drafter_version=figures.drafter_version,
            )
        )

    def rows(self, since_unix_s: float) -> list[list[float]]:
        """Samples after the given time, oldest first, each in the order of ``SAMPLE_FIELDS``."""
        samples = self._samples.copy()  # another thread may add one meanwhile
        return [list(astuple(s)) for s in samples if s.unix_s > since_unix_s]


@contextmanager
def recorded(figures: Callable[[], EngineFigures]) -> Iterator[History]:
    """A history that gets a sample every ``PERIOD_S`` until the block ends.

    Args:
        figures: called from another thread.
    """
    history, stopping = History(), threading.Event()

    def run() -> None:
        while True:
            history.add(time.time(), figures())
            if stopping.wait(PERIOD_S):
                return

    thread = threading.Thread(target=run, name="history", daemon=True)
    thread.start()
    try:
        yield history
    finally:
        stopping.set()
        thread.join()
