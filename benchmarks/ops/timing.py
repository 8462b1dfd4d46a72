"""Times GPU work under a server's conditions: in a CUDA graph, with a cold cache.

A captured function is replayed with kernels between its calls that overwrite the L2 cache. A graph
of those kernels alone is replayed in alternation and its time subtracted. Each replay is queued
behind other work on the device until the host has launched it, so figures exclude launches, each of
which costs about 70 microseconds of host time on the measured machines, and more for a large graph.

In addition to its kernels, a figure includes the gap before each of them, about a microsecond, so
an empty kernel does not measure 0. It excludes writing back what the cache held before: the flush
would have done that, and is subtracted. Compare kernels of a few microseconds with an empty one.
"""

from __future__ import annotations

import functools
import statistics
import warnings
from collections.abc import Callable

import torch

_FLUSH_BYTES = 256 << 20  # several times an H200's L2 of 60 MB
_WARM_UPS = 3
_RUNWAY_FLUSHES = 16  # about a millisecond; an H200 takes 65 microseconds for each
_MAX_RUNWAYS = 16


def _device_ms(launch: Callable[[], object]) -> float:
    """Time between two events around ``launch``, all queued before the device reaches them."""
    runway = _flushes(_RUNWAY_FLUSHES)
    num_runways = 1
    while True:
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        for _ in range(num_runways):
            runway.replay()
        begin.record()
        launch()
        end.record()
        is_late = begin.query()
        end.synchronize()
        if not is_late:
            break
        if num_runways == _MAX_RUNWAYS:
            warnings.warn(
                f"the host was still launching after about {num_runways} ms of other work on the "
                "device, so the time includes part of the launch; time less work at once",
                stacklevel=2,
            )
            break
        num_runways *= 2
    return begin.elapsed_time(end)


def _captured(work: Callable[[], object], calls: int) -> torch.cuda.CUDAGraph:
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(_WARM_UPS):  # compile, tune and allocate outside the capture
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
def _flushes(calls: int) -> torch.cuda.CUDAGraph:
    return _captured(_flusher(), calls)


@functools.cache
def _flusher() -> Callable[[], object]:
    """Overwrites one buffer, whose address captured graphs keep."""
    return torch.empty(_FLUSH_BYTES // 4, dtype=torch.int32, device="cuda").zero_


def graphed_ms(work: Callable[[], object], repeats: int = 20, calls: int = 5) -> float:
    """Milliseconds of one call of ``work``, which must be capturable and write to fixed memory.

    Args:
        repeats: replays of the graph.
        calls: calls in one graph, each between two flushes.
    """
    flush = _flusher()

    # With the flush last, each replay leaves the cache as it found it, and the flushes of both
    # graphs write the same memory.
    def both() -> None:
        work()
        flush()

    graph, flushes = _captured(both, calls), _flushes(calls)
    with_work, without = [], []
    for _ in range(repeats):  # alternately, because clocks drift
        with_work.append(_device_ms(graph.replay))
        without.append(_device_ms(flushes.replay))
    base = statistics.median(without)
    return statistics.median((t - base) / calls for t in with_work)


def replayed_ms(launch: Callable[[], object], repeats: int = 20) -> float:
    """Milliseconds of an existing graph, replayed after kernels that overwrite the cache."""
    for _ in range(_WARM_UPS):
        launch()
    return statistics.median(_device_ms(launch) for _ in range(repeats))


def eager_ms(work: Callable[[], object], repeats: int = 20) -> float:
    """Milliseconds of one call that cannot be captured, between two events, with a cold cache.

    Includes launches that the device waits for, such as the first.
    """
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
    return statistics.median(times)


def copy_bytes_per_s(num_bytes: int = 4 << 30, repeats: int = 20, copies: int = 5) -> float:
    """Bytes read plus written each second by a large device-to-device copy: the memory ceiling.

    Copies follow each other in a stream, each many times larger than the L2 cache. A single copy in
    a graph, where it is a special kind of node, measured 2.75 TB/s including its launch, on an H200
    that copies 4.24 TB/s.
    """
    source = torch.randint(2**62, (num_bytes // 16,), device="cuda")
    target = torch.empty_like(source)

    def copy() -> None:
        for _ in range(copies):
            target.copy_(source)

    for _ in range(repeats):  # until the clocks have ramped up
        copy()
    median_ms = statistics.median(_device_ms(copy) for _ in range(repeats))
    return num_bytes * copies / (median_ms / 1e3)
