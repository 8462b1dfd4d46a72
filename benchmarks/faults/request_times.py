"""Times of requests in windows with faults and without, on a machine that may be busy.

The 99th percentile of a few thousand requests is made by the few that had to wait for a core, which
is what other processes do and no buffer. Three figures are compared, therefore:

- the time of a request, as its client meets it;
- the same less the time in which the engine's thread was ready to run and no core was free, as the
  kernel counts it. Waits for locks, for the interpreter and for input or output stay in;
- the processor time of the engine's thread for each request.

Windows come in pairs, with a fault and without, and each ratio has a 95 % interval by resampling
pairs, which says what noise alone may do.
"""

from __future__ import annotations

import random
import statistics
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

_NUM_SAMPLES = 1000


@dataclass(frozen=True, slots=True)
class Moment:
    """What clocks say, seconds since some beginning."""

    wall_s: float
    processor_s: float
    """Of a thread."""
    kept_waiting_s: float
    """In which the thread was ready to run and had no core."""


def clock_of(thread: threading.Thread) -> Callable[[], Moment]:
    """A clock of a running thread of this process, to be read by any thread."""
    path = Path(f"/proc/self/task/{thread.native_id}/schedstat")

    def now() -> Moment:
        processor_ns, waited_ns, _ = map(int, path.read_bytes().split())
        return Moment(time.perf_counter(), processor_ns / 1e9, waited_ns / 1e9)

    return now


@dataclass(slots=True)
class Window:
    """Requests that were answered in some seconds."""

    taken_s: list[float] = field(default_factory=list)
    """Of each request, from asking to the answer."""
    own_s: list[float] = field(default_factory=list)
    """The same less the time that the engine's thread was kept waiting for a core."""
    processor_s: float = 0.0
    """Of the engine's thread."""

    def add(self, begun: Moment, ended: Moment) -> None:
        """Add one request."""
        taken_s = ended.wall_s - begun.wall_s
        self.taken_s.append(taken_s)
        self.own_s.append(max(0.0, taken_s - (ended.kept_waiting_s - begun.kept_waiting_s)))

    def __add__(self, other: Window) -> Window:
        return Window(
            self.taken_s + other.taken_s,
            self.own_s + other.own_s,
            self.processor_s + other.processor_s,
        )


@dataclass(frozen=True, slots=True)
class Pair:
    """Two windows, one after the other."""

    faulty: Window
    quiet: Window


def percentile(values: Sequence[float], q: float) -> float:
    """The value that a share ``q`` of them is below."""
    return sorted(values)[min(len(values) - 1, int(len(values) * q))]


Figure = Callable[[Window], float]
FIGURES: dict[str, Figure] = {
    "p99": lambda window: percentile(window.taken_s, 0.99),
    "own_p99": lambda window: percentile(window.own_s, 0.99),
    "processor": lambda window: window.processor_s / len(window.taken_s),
}


def figures_of(pairs: Sequence[Pair]) -> dict[str, Any]:
    """By figure: seconds ``without`` and ``with`` faults, their ``ratio``, and its ``interval``.
    Pairs with a window in which no request ended are left out.

    Raises:
        ValueError: there is no other pair.
    """
    whole = [pair for pair in pairs if pair.quiet.taken_s and pair.faulty.taken_s]
    if not whole:
        raise ValueError("no two windows have requests; make them longer")
    return {name: _compared(figure, whole) for name, figure in FIGURES.items()}


def _compared(figure: Figure, pairs: Sequence[Pair]) -> dict[str, Any]:
    quiet, faulty = _both(figure, pairs)
    luck = random.Random(0)
    ratios = []
    for _ in range(_NUM_SAMPLES):
        without, with_fault = _both(figure, luck.choices(pairs, k=len(pairs)))
        ratios.append(with_fault / without)
    cuts = statistics.quantiles(ratios, n=40)
    return {
        "without": quiet,
        "with": faulty,
        "ratio": faulty / quiet,
        "interval": [cuts[0], cuts[-1]],
    }


def _both(figure: Figure, pairs: Sequence[Pair]) -> tuple[float, float]:
    """Of all requests without a fault, and of all with one."""
    quiet, faulty = Window(), Window()
    for pair in pairs:
        quiet, faulty = quiet + pair.quiet, faulty + pair.faulty
    return figure(quiet), figure(faulty)
