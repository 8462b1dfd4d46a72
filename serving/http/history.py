"""Recent engine counters, so that a dashboard shows the minutes before it was opened."""

from __future__ import annotations

from collections import deque
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
        return [list(astuple(s)) for s in self._samples if s.unix_s > since_unix_s]
