"""Copies of a device's tensors on the host, to be published or saved."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor

from buffer.sealed import CHUNK_BYTES

Tensors = dict[str, Tensor]

TAGS = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16",
    torch.int64: "I64", torch.int32: "I32", torch.int16: "I16", torch.int8: "I8",
    torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip
"""Tags of the safetensors format."""


class HostCopies:
    """Tensors on the host, in memory that is taken once: new pages for 0.8 GB take longer than all
    else that is done with them, and on a GPU's host only pinned memory is copied to at full speed.
    """

    def __init__(self) -> None:
        self._held: dict[str, Tensor] = {}
        self._pinned: Tensor | None = None

    def of(self, tensors: Mapping[str, Tensor], dtypes: Mapping[str, torch.dtype]) -> OnHost:
        """Contiguous tensors on the host in these dtypes. Those that are so already are not
        copied; the others are overwritten by the next call.

        Args:
            tensors: on any device. What has another dtype is converted where it is.
        """
        places, sources = Tensors(), Tensors()
        for name, tensor in tensors.items():
            source = tensor.detach()
            if source.device.type == "cpu" and source.dtype == dtypes[name]:
                places[name] = source.contiguous()
                continue
            places[name] = self._place(name, source, dtypes[name])
            sources[name] = source.contiguous()
        return OnHost(places, sources)

    def at(self, places: Tensors, tensors: Mapping[str, Tensor]) -> OnHost:
        """All tensors in memory of somebody else, which is not pinned.

        Args:
            places: contiguous tensors on the host, in the dtypes that are wanted.
            tensors: as many, on any device.
        """
        sources = {name: tensor.detach().contiguous() for name, tensor in tensors.items()}
        if any(one.device.type == "cuda" for one in sources.values()) and self._pinned is None:
            self._pinned = torch.empty(CHUNK_BYTES, dtype=torch.uint8, pin_memory=True)
        return OnHost(places, sources, self._pinned)

    def _place(self, name: str, like: Tensor, dtype: torch.dtype) -> Tensor:
        place = self._held.get(name)
        if place is None or place.shape != like.shape or place.dtype != dtype:
            is_on_gpu = like.device.type == "cuda"
            place = torch.empty(like.shape, dtype=dtype, pin_memory=is_on_gpu)
            self._held[name] = place
        return place

    def begin(self, tensors: Mapping[str, Tensor]) -> Arriving:
        """Copy tensors as they are now, in the order of what the device was told to do: whatever
        changes them from now on does not change the copies, and nothing waits for them. The next
        call overwrites them, once they have arrived."""
        places, arrived = Tensors(), None
        for name, tensor in tensors.items():
            source = tensor.detach()
            place = places[name] = self._place(name, source, source.dtype)
            place.copy_(source, non_blocking=True)
            if source.device.type == "cuda" and arrived is None:
                arrived = torch.cuda.Event()  # type: ignore[no-untyped-call]
        if arrived is not None:
            arrived.record()
        return Arriving(places, arrived)


@dataclass(frozen=True, slots=True)
class OnHost:
    """Tensors on the host, some of them still to be filled."""

    places: Tensors
    """All of them."""
    sources: Tensors
    """What is to be copied and converted."""
    pinned: Tensor | None = None
    """A chunk through which values come from a GPU, [CHUNK_BYTES] uint8; ``None``: they are copied
    at once."""

    def make(self, name: str, start: int, end: int) -> None:
        """Fill the bytes of a tensor between two offsets; waits for the device."""
        source = self.sources.get(name)
        if source is None:
            return
        place = self.places[name].view(-1)
        at = slice(start // place.itemsize, end // place.itemsize)
        values = source.reshape(-1)[at]
        if values.device.type == "cpu":
            place[at].copy_(values)
        else:
            self.fill(place[at], values)

    def fill(self, place: Tensor, values: Tensor) -> None:
        """Copy values of a GPU, at most a chunk."""
        values = values.to(place.dtype)  # half as many bytes to copy
        if self.pinned is not None:
            values = self.pinned[: values.nbytes].view(values.dtype).copy_(values)
        place.copy_(values)


@dataclass(frozen=True, slots=True)
class Arriving:
    """Copies on their way to the host."""

    places: Tensors
    arrived: torch.cuda.Event | None
    """``None``: they are there."""

    def tensors(self) -> Tensors:
        """The copies; waits for the device."""
        if self.arrived is not None:
            self.arrived.synchronize()
        return self.places


def laid_out(tensors: Mapping[str, Tensor]) -> dict[str, tuple[str, NDArray[Any]]]:
    """Contiguous tensors on the CPU as the layout of a safetensors file wants them: tag of the
    dtype, and bits."""
    return {name: (TAGS[t.dtype], _bits_of(t)) for name, t in tensors.items()}


def _bits_of(tensor: Tensor) -> NDArray[Any]:
    """The memory of a contiguous tensor on the CPU; numpy has no bfloat16."""
    is_brain = tensor.dtype == torch.bfloat16
    found: NDArray[Any] = (tensor.view(torch.int16) if is_brain else tensor).numpy()
    return found
