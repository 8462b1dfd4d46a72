"""Times work on a GPU as a server meets it: in a CUDA graph, with a cold cache.

A captured function is replayed behind a kernel that overwrites the L2 cache; the same graph without
the function is subtracted. Launches, which cost a host some 70 microseconds each where these
figures were made, are thus no part of a figure.
"""

from __future__ import annotations

import functools
import statistics
from collections.abc import Callable
from dataclasses import dataclass

import torch

_FLUSH_BYTES = 256 << 20  # several times an H200's L2 of 60 MB
_WARM_UPS = 3


@dataclass(frozen=True, slots=True)
class Timed:
    """Milliseconds of one call."""

    median_ms: float
    low_ms: float
    """A tenth of the repeats were faster."""
    high_ms: float
    """A tenth of the repeats were slower."""


def _replays_ms(graph: torch.cuda.CUDAGraph, repeats: int) -> list[float]:
    times = []
    for _ in range(repeats):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end))
    return times


def _captured(work: Callable[[], object], calls: int) -> torch.cuda.CUDAGraph:
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(_WARM_UPS):  # compiles, tunes and allocates outside the capture
            work()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(calls):
            work()
    graph.replay()
    torch.cuda.synchronize()
    return graph


@functools.cache
def _flush_ms(calls: int) -> float:
    graph = _captured(_flusher(), calls)
    return statistics.median(_replays_ms(graph, 30))


@functools.cache
def _flusher() -> Callable[[], object]:
    """One buffer for all: what was captured keeps its address."""
    return torch.empty(_FLUSH_BYTES // 4, dtype=torch.int32, device="cuda").zero_


def graphed(work: Callable[[], object], repeats: int = 20, calls: int = 5) -> Timed:
    """Time of one call of ``work``, which must be capturable and write to fixed memory.

    Args:
        repeats: replays of the graph.
        calls: calls in one graph, each behind a flush.
    """
    flush = _flusher()

    def both() -> None:
        flush()
        work()

    base = _flush_ms(calls)
    times = [(t - base) / calls for t in _replays_ms(_captured(both, calls), repeats)]
    return _summary(times)


def eager(work: Callable[[], object], repeats: int = 20) -> Timed:
    """Time of one call that cannot be captured, between two events, with a cold cache."""
    flush = _flusher()
    for _ in range(_WARM_UPS):
        work()
    times = []
    for _ in range(repeats):
        flush()
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        work()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end))
    return _summary(times)


def _summary(times: list[float]) -> Timed:
    tenths = statistics.quantiles(times, n=10)
    return Timed(statistics.median(times), tenths[0], tenths[-1])


def copy_bytes_per_s(num_bytes: int = 4 << 30) -> float:
    """Bytes read plus written each second by a large device-to-device copy: the memory ceiling."""
    source = torch.randint(0, 255, (num_bytes // 2,), dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    return num_bytes / (graphed(lambda: target.copy_(source), calls=1).median_ms / 1e3)


def matmul_flops_per_s(size: int = 8192) -> float:
    """Operations each second of a large bf16 matrix product on random data: the other ceiling."""
    a, b = (torch.randn(size, size, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    out = torch.empty_like(a)
    return 2 * size**3 / (graphed(lambda: torch.mm(a, b, out=out)).median_ms / 1e3)
