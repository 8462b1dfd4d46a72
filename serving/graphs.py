"""Work of fixed shape, captured once and replayed: one launch instead of hundreds."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

Program = Callable[[], None]


@dataclass(frozen=True, slots=True)
class Landing:
    """Something on its way from the device."""

    event: torch.cuda.Event | None
    """``None``: it is there."""

    def wait(self) -> bool:
        """Until it has arrived; other threads may run meanwhile. Says whether it had not yet."""
        if self.event is None or self.event.query():  # type: ignore[no-untyped-call]
            return False
        self.event.synchronize()
        return True


class Graphs:
    """Captures programs in CUDA graphs that share one memory; on a CPU they run as they are.

    A program reads and writes tensors with an address of their own. What it allocates itself is
    overwritten by the next program that is replayed.
    """

    def __init__(self, device: torch.device) -> None:
        self.are_real = device.type == "cuda"
        self._memory = torch.cuda.graph_pool_handle() if self.are_real else None

    def capture(self, work: Program) -> Program:
        """``work``, as one launch where the device has graphs. Runs it once to warm up."""
        if not self.are_real:
            return work
        side: Any = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            work()  # compiles kernels and loads modules, which a capture forbids
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._memory):
            work()
        return graph.replay

    def to_host(self, tensor: Tensor) -> tuple[Tensor, Landing]:
        """A copy on the host, and when it is there: after all that was launched before."""
        if not self.are_real:
            return tensor.clone(), Landing(None)
        copy = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
        copy.copy_(tensor, non_blocking=True)
        event = torch.cuda.Event()  # type: ignore[no-untyped-call]
        event.record()
        return copy, Landing(event)

    def seconds(self, program: Program, repeats: int = 5) -> float:
        """Median time of a program, its launch included."""
        times = []
        for _ in range(repeats):
            self.synchronize()
            started = time.perf_counter()
            program()
            self.synchronize()
            times.append(time.perf_counter() - started)
        return sorted(times)[repeats // 2]

    def synchronize(self) -> None:
        """Wait until all that was launched is done."""
        if self.are_real:
            torch.cuda.current_stream().synchronize()
