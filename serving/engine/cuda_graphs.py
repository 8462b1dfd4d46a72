"""Work of fixed shape, captured once and replayed: one launch instead of hundreds."""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch
from torch import Tensor

from serving.engine.captures import Captures
from serving.engine.graph_recorder import CudaGraphRecorder, Program


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

    def seconds_since(self, before: Landing | None) -> float | None:
        """Seconds on the device's clock between two copies that have arrived; ``None`` if it keeps
        none of one of them.

        Args:
            before: the one that arrived first.
        """
        if self.event is None or before is None or before.event is None:
            return None
        milliseconds: float = before.event.elapsed_time(self.event)
        return milliseconds * 1e-3


class Graphs:
    """Captures programs in CUDA graphs that share one memory pool; on a CPU they run as they are.

    A program's inputs and outputs are tensors at fixed addresses of their own. What it allocates
    itself is overwritten by the next program that is replayed.
    """

    def __init__(self, device: torch.device) -> None:
        self.captures = Captures(CudaGraphRecorder(device)) if device.type == "cuda" else None
        """``None`` on a CPU."""
        self.are_real = self.captures is not None

    def sizes(self, most: int) -> list[int]:
        """Sizes that programs are made for, ascending: a few, to which batches are padded, if
        programs are captured; every size if they are ordinary calls."""
        return buckets(most) if self.are_real else list(range(1, most + 1))

    def capture(self, work: Program) -> Program:
        """Return ``work`` as one launch if the device has graphs."""
        return work if self.captures is None else self.captures.capture(work)

    def will_serve(self) -> None:
        """From now on, other threads use the device while programs are captured."""
        if self.captures is not None:
            self.captures.recorder.is_serving = True

    def on_host(self, shape: tuple[int, ...], dtype: torch.dtype = torch.int64) -> Tensor:
        """Zeros on the host, from and to which the device copies without waiting."""
        return torch.zeros(shape, dtype=dtype, pin_memory=self.are_real)

    def to_host(self, tensor: Tensor) -> tuple[Tensor, Landing]:
        """Start a copy to the host. It arrives after all work that was launched before it."""
        copy = self.on_host(tuple(tensor.shape), tensor.dtype)
        return copy, self.copy_to(copy, tensor)

    def landing(self) -> Landing:
        """Of copies to one place, one after the other: each is waited for before the next."""
        if not self.are_real:
            return Landing(None)
        return Landing(torch.cuda.Event(enable_timing=True))  # type: ignore[no-untyped-call]

    def mark(self) -> Landing:
        """What arrives once all work that was launched before it is done."""
        landing = self.landing()
        if landing.event is not None:
            landing.event.record()
        return landing

    def copy_to(self, copy: Tensor, tensor: Tensor, landing: Landing | None = None) -> Landing:
        """Start a copy to a tensor that ``on_host`` has made.

        Args:
            landing: what ``landing`` has made for that tensor; ``None``: a new one.
        """
        copy.copy_(tensor, non_blocking=True)
        landing = landing or self.landing()
        if landing.event is not None:
            landing.event.record()
        return landing

    def seconds(self, program: Program, repeats: int = 5) -> float:
        """Median time of a program in seconds, including its launch."""
        times = []
        for _ in range(repeats):
            self.synchronize()
            started = time.perf_counter()
            program()
            self.synchronize()
            times.append(time.perf_counter() - started)
        if self.captures is not None:
            self.captures.spent.timing_s += sum(times)
        return sorted(times)[repeats // 2]

    def trim(self) -> None:
        """Free the memory of first runs."""
        if self.are_real:
            torch.cuda.empty_cache()

    def synchronize(self) -> None:
        """Wait until all launched work is done."""
        if self.are_real:
            torch.cuda.current_stream().synchronize()
