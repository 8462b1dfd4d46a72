"""CUDA graphs that share one memory pool: what of making programs concerns the device alone."""

from __future__ import annotations

import gc
import logging
import threading
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Protocol

import torch

from configs.phases import uncollected

log = logging.getLogger(__name__)

Program = Callable[[], None]


class GraphRecorder(Protocol):
    """Turns work into one launch. For one thread."""

    is_serving: bool
    """Other threads use the device while work is recorded."""

    def begin(self) -> None:
        """Prepare for recording work that has not run."""

    def record(self, work: Program) -> tuple[Program, int]:
        """The launch, and how many bytes the work has allocated and keeps.

        Raises:
            RuntimeError: the device does not allow what the work does while it is recorded.
        """

    def look_through(self, works: Iterable[Program]) -> Iterator[None]:
        """Go through the calls of each work as ``record`` does, for nothing; yields after each.

        Raises:
            RuntimeError: see ``record``.
        """

    def run(self, work: Program) -> None:
        """Run work where it will be recorded, and make room for recording it."""


class CudaGraphRecorder:
    """Records CUDA graphs. Their memory is overwritten by whichever of them is replayed next."""

    def __init__(self, device: torch.device) -> None:
        self.is_serving = False
        self._device = device
        self._memory = torch.cuda.graph_pool_handle()
        self._holder: Any = None
        """A recording that keeps the memory: it ends with the last one, and cannot begin again."""
        # One stream for all: memory is cached per stream, so each program reuses the others'.
        self._side: Any = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._prepared: int | None = None
        """The thread whose libraries are started."""

    def begin(self) -> None:
        torch.cuda.empty_cache()  # a capture cannot use what is cached outside its pool
        self._prepare_thread()

    def _prepare_thread(self) -> None:
        """Let cuBLAS allocate what a capture forbids: a handle for each thread."""
        if self._prepared == threading.get_ident():
            return
        self._prepared = threading.get_ident()
        with torch.cuda.stream(self._side):
            for dtype in (torch.bfloat16, torch.float16, torch.float32):
                one = torch.ones((16, 16), dtype=dtype, device=self._device)
                torch.nn.functional.linear(one, one)
        self._side.synchronize()

    def _hold_memory(self) -> None:
        """Recordings that are thrown away, because they failed or have launches left out, must not
        be the last ones."""
        if self._holder is None:
            one = torch.ones(1, device=self._device)
            torch.cuda.synchronize(self._device)

            def work() -> None:
                one.fill_(0)

            self._holder = torch.cuda.CUDAGraph()
            self._capture(self._holder, work, self._memory)

    def record(self, work: Program) -> tuple[Program, int]:
        # cuBLAS keeps a workspace for each stream. A run has allocated one in ordinary memory,
        # which any code may free (the compiler's graphs do so each time they record). Without one,
        # the capture allocates its own from the graphs' pool, which stays.
        self._prepare_thread()
        self._hold_memory()
        torch._C._cuda_clearCublasWorkspaces()
        before = torch.cuda.memory_allocated()
        graph = torch.cuda.CUDAGraph()
        try:
            self._capture(graph, work, self._memory)
        except RuntimeError:
            # torch miscounts who uses the memory then. What was recorded before keeps it.
            self._memory, self._holder = torch.cuda.graph_pool_handle(), None
            raise
        torch._C._cuda_clearCublasWorkspaces()
        return graph.replay, 0 if self.is_serving else _kept_since(before)

    def look_through(self, works: Iterable[Program]) -> Iterator[None]:
        # A pool of its own, which lives as long as one of its graphs.
        memory, graphs = torch.cuda.graph_pool_handle(), []
        for work in works:
            graph = torch.cuda.CUDAGraph(keep_graph=True)  # never made executable
            self._capture(graph, work, memory)
            graphs.append(graph)
            yield

    def run(self, work: Program) -> None:
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        self._side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._side):
            work()
        self._side.synchronize()
        num_bytes = torch.cuda.max_memory_allocated() - before
        # A capture allocates as much as the run did, from another pool. ``torch.cuda.graph`` would
        # free the run's memory before each capture, and the next run would have to ask the driver
        # for all of it again.
        if torch.cuda.mem_get_info()[0] < 2 * num_bytes:
            torch.cuda.empty_cache()

    def _capture(self, graph: Any, work: Program, memory: Any) -> None:
        # What other threads ask of the device meanwhile is no part of the capture.
        mode = "thread_local" if self.is_serving else "global"
        # Another engine's graphs may be garbage, and freeing one invalidates the capture.
        with torch.cuda.stream(self._side), uncollected():
            graph.capture_begin(pool=memory, capture_error_mode=mode)
            try:
                work()
            finally:
                try:
                    graph.capture_end()
                except RuntimeError:
                    _stop_allocating(memory)
                    raise


def _kept_since(before: int) -> int:
    """Bytes that are allocated in addition to those before."""
    if torch.cuda.memory_allocated() > before:
        gc.collect()  # what refers to itself is in no use
    return max(0, torch.cuda.memory_allocated() - before)


def _stop_allocating(memory: Any) -> None:
    """After a capture that failed, tensors would be allocated from its pool for ever."""
    end = getattr(torch._C, "_cuda_endAllocateToPool", None)
    if end is None:
        return
    try:
        end(torch.cuda.current_device(), memory)
    except RuntimeError:
        log.debug("allocating from the pool had ended already", exc_info=True)
