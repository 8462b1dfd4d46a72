"""What the device does during steps: which graphs it runs, how long they take, when it is idle."""

from __future__ import annotations

import json
import statistics
import tempfile
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.ops.timing import replayed_ms

Launch = Callable[[], object]


def device_s(launch: Launch) -> float:
    """Device time of a graph in seconds, without its launch."""
    return replayed_ms(launch) / 1e3


class Replays:
    """Records which CUDA graphs are launched."""

    def __init__(self) -> None:
        self._noted: list[Launch] | None = None

    @contextmanager
    def installed(self) -> Iterator[None]:
        """Launches can be recorded of all graphs captured inside this context."""
        if not torch.cuda.is_available():
            yield
            return
        original = torch.cuda.CUDAGraph.replay

        def replay(graph: torch.cuda.CUDAGraph) -> None:
            original(graph)
            if self._noted is not None:
                self._noted.append(partial(original, graph))

        torch.cuda.CUDAGraph.replay = replay  # type: ignore[method-assign]
        try:
            yield
        finally:
            torch.cuda.CUDAGraph.replay = original  # type: ignore[method-assign]

    def during(self, work: Callable[[], object]) -> list[Launch]:
        """One launch function per graph that ``work`` launches, in order; none on a CPU."""
        noted: list[Launch] = []
        self._noted = noted
        try:
            work()
        finally:
            self._noted = None
        return noted


@dataclass(frozen=True, slots=True)
class Idle:
    """Idle shares over a series of steps, in [0, 1]."""

    between_launches: float
    """No launch was in progress. A graph is in progress from its first kernel to its last."""
    no_kernel: float
    """No kernel ran and nothing was copied; includes the gaps between a graph's kernels."""
    num_launches: int
    window_ms: float


def idle_of(events: Iterable[Mapping[str, Any]]) -> Idle | None:
    """Idle shares from a profiler trace; ``None`` if the device did nothing in it.

    Args:
        events: in Chrome's trace format, times in microseconds.
    """
    pieces: list[tuple[float, float]] = []
    launches: dict[Any, list[tuple[float, float]]] = defaultdict(list)
    for number, event in enumerate(events):
        if event.get("cat") not in ("kernel", "gpu_memcpy", "gpu_memset"):
            continue
        piece = (event["ts"], event["ts"] + event["dur"])
        pieces.append(piece)
        launch = event.get("args", {}).get("correlation", f"alone {number}")
        launches[launch].append(piece)
    if not pieces:
        return None
    spans = [(min(b for b, _ in own), max(e for _, e in own)) for own in launches.values()]
    window = max(e for _, e in pieces) - min(b for b, _ in pieces)
    return Idle(
        1 - _covered(spans) / window, 1 - _covered(pieces) / window, len(spans), window / 1e3
    )


def _covered(spans: Iterable[tuple[float, float]]) -> float:
    """Length of the union of spans."""
    total, reached = 0.0, float("-inf")
    for begin, end in sorted(spans):
        total += max(0.0, end - max(begin, reached))
        reached = max(reached, end)
    return total


def traced_idle(work: Callable[[], object]) -> Idle | None:
    """Idle shares while ``work`` runs under the profiler, which slows host and device a little."""
    activities = [torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile:
        work()
        torch.cuda.synchronize()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profile.export_chrome_trace(str(path))
        return idle_of(json.loads(path.read_text())["traceEvents"])


def median_ms(seconds: Iterable[float]) -> float:
    """Median in milliseconds."""
    return statistics.median(seconds) * 1e3
