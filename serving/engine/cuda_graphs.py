"""Work of fixed shape, captured once and replayed: one launch instead of hundreds."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

log = logging.getLogger(__name__)

Program = Callable[[], None]
_TELL_EVERY_S = 10.0


def buckets(most: int) -> list[int]:
    """1, 2, 4, ... and ``most`` itself."""
    sizes = []
    size = 1
    while size < most:
        sizes.append(size)
        size *= 2
    return [*sizes, most]


def fitting(sizes: list[int], wanted: int) -> int:
    """The smallest of ascending sizes that holds ``wanted``."""
    return next(size for size in sizes if size >= wanted)


@dataclass(frozen=True, slots=True)
class Landing:
    """A copy on its way from the device to the host."""

    event: torch.cuda.Event | None
    """``None``: it arrived as soon as it was launched, as every copy does on a CPU."""

    def wait(self) -> bool:
        """Wait until it has arrived; other threads may run meanwhile. Returns True if it had to."""
        if self.event is None or self.event.query():  # type: ignore[no-untyped-call]
            return False
        self.event.synchronize()
        return True


@dataclass(slots=True)
class Spent:
    """Seconds spent on making programs, by phase."""

    num_programs: int = 0
    first_runs_s: float = 0.0
    """Includes compiling and loading kernels, by the first program that needs them."""
    capture_s: float = 0.0
    timing_s: float = 0.0


class Graphs:
    """Captures programs in CUDA graphs that share one memory pool; on a CPU they run as they are.

    A program's inputs and outputs are tensors at fixed addresses of their own. What it allocates
    itself is overwritten by the next program that is replayed.
    """

    def __init__(self, device: torch.device) -> None:
        self.are_real = device.type == "cuda"
        self.is_serving = False
        """Other threads use the device while programs are captured."""
        self.spent = Spent()
        self._told_s = time.perf_counter()
        if self.are_real:
            self._memory = torch.cuda.graph_pool_handle()
            # One stream for all: memory is cached per stream, so each program reuses the others'.
            self._side: Any = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def sizes(self, most: int) -> list[int]:
        """Sizes that programs are made for, ascending: a few, to which batches are padded, if
        programs are captured; every size if they are ordinary calls."""
        return buckets(most) if self.are_real else list(range(1, most + 1))

    def capture(self, work: Program) -> Program:
        """Return ``work`` as one launch if the device has graphs. Runs it once as a warm-up."""
        if not self.are_real:
            return work
        started = time.perf_counter()
        num_bytes = self._run(work)
        warm = time.perf_counter()
        # A capture allocates as much as the run did, from another pool. ``torch.cuda.graph`` would
        # free the run's memory before each capture, and the next run would have to ask the driver
        # for all of it again.
        if torch.cuda.mem_get_info()[0] < 2 * num_bytes:
            torch.cuda.empty_cache()
        # cuBLAS keeps a workspace for each stream. The run has allocated one in ordinary memory,
        # which any code may free (the compiler's graphs do so each time they record). Without one,
        # the capture allocates its own from the graphs' pool, which stays.
        torch._C._cuda_clearCublasWorkspaces()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.stream(self._side):
            # What other threads ask of the device meanwhile is no part of the capture.
            mode = "thread_local" if self.is_serving else "global"
            graph.capture_begin(pool=self._memory, capture_error_mode=mode)
            try:
                work()
            finally:
                graph.capture_end()
        self._count(warm - started, time.perf_counter() - warm)
        return graph.replay

    def _run(self, work: Program) -> int:
        """Run the work once, to compile kernels and load modules, which a capture forbids. Returns
        the work's peak memory in bytes."""
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        self._side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._side):
            work()
        self._side.synchronize()
        return torch.cuda.max_memory_allocated() - before

    def _count(self, first_run_s: float, capture_s: float) -> None:
        self.spent.num_programs += 1
        self.spent.first_runs_s += first_run_s
        self.spent.capture_s += capture_s
        now = time.perf_counter()
        if now - self._told_s > _TELL_EVERY_S:
            self._told_s = now
            log.info("still making programs: %s", self.spent)

    def on_host(self, shape: tuple[int, ...], dtype: torch.dtype = torch.int64) -> Tensor:
        """Zeros on the host, from and to which the device copies without waiting."""
        return torch.zeros(shape, dtype=dtype, pin_memory=self.are_real)

    def to_host(self, tensor: Tensor) -> tuple[Tensor, Landing]:
        """Start a copy to the host. It arrives after all work that was launched before it."""
        copy = self.on_host(tuple(tensor.shape), tensor.dtype)
        return copy, self.copy_to(copy, tensor)

    def copy_to(self, copy: Tensor, tensor: Tensor) -> Landing:
        """Start a copy to a tensor that ``on_host`` has made."""
        copy.copy_(tensor, non_blocking=True)
        if not self.are_real:
            return Landing(None)
        event = torch.cuda.Event()  # type: ignore[no-untyped-call]
        event.record()
        return Landing(event)

    def seconds(self, program: Program, repeats: int = 5) -> float:
        """Median time of a program in seconds, including its launch."""
        times = []
        for _ in range(repeats):
            self.synchronize()
            started = time.perf_counter()
            program()
            self.synchronize()
            times.append(time.perf_counter() - started)
        self.spent.timing_s += sum(times)
        return sorted(times)[repeats // 2]

    def trim(self) -> None:
        """Free the memory of first runs."""
        if self.are_real:
            torch.cuda.empty_cache()

    def synchronize(self) -> None:
        """Wait until all launched work is done."""
        if self.are_real:
            torch.cuda.current_stream().synchronize()
