"""Times a kernel and its alternatives on one device; one that cannot run yields the reason."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated

import torch
import typer

from benchmarks.ops.timing import copy_bytes_per_s, graphed_ms

Work = Callable[[], object]
Device = Annotated[str, typer.Option(help="cuda, or cpu to try a tiny size")]


def reason(error: Exception) -> str:
    """The text that a row holds instead of a figure."""
    return f"{type(error).__name__}: {str(error)[:200]}"


@dataclass(frozen=True, slots=True)
class Place:
    """A device, its memory bandwidth, and the deadline for compiling."""

    device: str
    """``cuda``, or ``cpu`` to try a tiny size."""
    bytes_per_s: float | None
    """Bytes read and written per second by a large copy; ``None`` on a CPU."""
    deadline_s: float
    """No alternative is compiled after this ``time.perf_counter()``."""

    @property
    def is_gpu(self) -> bool:
        return self.device == "cuda"

    def floor_us(self, num_bytes: int) -> float | None:
        """Microseconds to move ``num_bytes`` once."""
        return None if self.bytes_per_s is None else num_bytes / self.bytes_per_s * 1e6

    def microseconds(self, work: Work, calls: int = 5) -> float:
        """Median time of one call: on a GPU in a graph of ``calls`` calls, with a cold cache."""
        if self.is_gpu:
            return graphed_ms(work, calls=calls) * 1e3
        times = []
        for _ in range(3):
            started = time.perf_counter()
            work()
            times.append(time.perf_counter() - started)
        return statistics.median(times) * 1e6

    def tried_microseconds(self, make: Callable[[], Work]) -> float | str:
        """``microseconds`` of an alternative, or why it has no figure."""
        try:
            return self.microseconds(make())
        except Exception as error:  # the reason an alternative cannot run is its result
            return reason(error)

    def compiled_microseconds(self, work: Work) -> float | str:
        """Median time of ``work`` under torch.compile, or why it has no figure."""
        if not self.is_gpu:
            return "not compiled without a GPU"
        if time.perf_counter() > self.deadline_s:
            return "not compiled: no time left"
        torch._dynamo.reset()  # it gives up on a function after several shapes
        return self.tried_microseconds(lambda: torch.compile(work, dynamic=False))


def make_place(device: str, budget_s: float) -> Place:
    """Measure the memory bandwidth, and set the deadline for compiling."""
    deadline_s = time.perf_counter() + budget_s
    return Place(device, copy_bytes_per_s() if device == "cuda" else None, deadline_s)
