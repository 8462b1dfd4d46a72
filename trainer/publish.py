"""Publish a candidate that passed the gate."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from buffer.bundles import BundleError
from buffer.manifest import TENSORS
from buffer.records import Manifest
from buffer.sealed import CHUNK_BYTES, Content, Sealed, digest_of, seal, seal_in
from buffer.tensors import tensor_layout
from buffer.weights_store import WeightsStore
from configs.logs import Outage
from drafters.trainable import Trainable
from trainer.gate import Judgement

LARGEST_FLOAT32_BYTES = 256 << 20
"""Larger bundles are written as bfloat16, the dtype that a GPU serves. Smaller ones stay float32,
which costs little and suits every dtype, since the server casts on load."""

Tensors = dict[str, Tensor]

_TAGS = {
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
class Publisher:
    """The weights store, and the right to publish in it until another trainer takes over."""

    store: WeightsStore
    epoch: int
    denied: dict[int, str] = field(default_factory=dict)
    """Digests of versions that were rolled back, so that they are known when those are pruned."""
    outage: Outage = field(default_factory=lambda: Outage("judge the candidate"))
    """Whether the store cannot be asked at present."""
    memory: HostCopies = field(default_factory=HostCopies)
    """Where candidates lie until they are published."""

    def content_of(self, trainable: Trainable[Any], model: nn.Module) -> Sealed:
        """A drafter's tensors as they are published, in memory that the next call overwrites. The
        store has begun to write them."""
        return self.content_with(trainable.bundle_tensors(model))

    def content_with(self, tensors: Tensors) -> Sealed:
        """``content_of`` for the tensors themselves."""
        content = sealed_tensors(tensors, self.memory, self.store.lend)
        self.store.prepare(content)  # while its digest is computed
        return content

    def version_with(self, content: Content | Sealed) -> tuple[int, bool] | None:
        """The version that holds these tensors, and whether it was rolled back; ``None``: none
        does.

        Raises:
            ServiceAwayError: the store cannot be read at present.
        """
        denied = self.store.read_denied()
        digests = dict[int, str]()
        for version in {*self.store.versions(), *denied}:
            if version in self.denied:
                digests[version] = self.denied[version]
            else:
                with contextlib.suppress(BundleError):  # damaged, or pruned
                    digests[version] = self.store.read_manifest(version).files[TENSORS].sha256
        self.denied.update({v: d for v, d in digests.items() if v in denied})
        own = digest_of(content).sha256
        same = [version for version, digest in digests.items() if digest == own]
        return (max(same), any(v in denied for v in same)) if same else None


def bundle_content(trainable: Trainable[Any], model: nn.Module) -> Sealed:
    """A drafter's tensors as they are published, in memory of their own."""
    return sealed_tensors(trainable.bundle_tensors(model))


def sealed_tensors(
    tensors: Tensors,
    memory: HostCopies | None = None,
    lend: Callable[[int], memoryview | None] | None = None,
) -> Sealed:
    """Tensors, on any device, as they are published.

    Args:
        memory: for those that must be copied; its next use overwrites them. ``None``: new memory.
        lend: memory for the whole file, see ``WeightsStore.lend``.
    """
    memory, dtypes = memory or HostCopies(), _bundle_dtypes(tensors)
    shapes = {name: (_TAGS[dtypes[name]], tuple(one.shape)) for name, one in tensors.items()}
    layout = tensor_layout(shapes)
    place = None if lend is None else lend(layout.num_bytes)
    if place is None:
        on_host = memory.of(tensors, dtypes)
        laid_out = {name: (_TAGS[t.dtype], _bits_of(t)) for name, t in on_host.places.items()}
        return seal(laid_out, on_host.make)
    places = {
        name: _tensor_in(place[one.start : one.end], dtypes[name], one.shape)
        for name, one in layout.tensors.items()
    }
    return seal_in(place, layout, memory.at(places, tensors).make)


def _tensor_in(place: memoryview, dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
    """A tensor in memory of so many bytes."""
    if not len(place):  # torch takes no buffer without bytes
        return torch.empty(shape, dtype=dtype)
    return torch.frombuffer(place, dtype=dtype).view(shape)


def publish_version(
    store: WeightsStore,
    content: Content | Sealed,
    parent: Manifest,
    judgement: Judgement,
    *,
    step: int,
    keep: int,
    learning_s: float | None = None,
    epoch: int | None = None,
    policy: Mapping[str, Any] | None = None,
) -> Manifest:
    """Write the next version to the store, and remove old ones.

    Args:
        content: its tensors, of ``bundle_content``.
        step: number of updates that produced the model.
        learning_s: seconds that they took, with judging; the server shows it beside what drafting
            saves.
        keep: number of newest versions that stay.
        epoch: of the trainer that publishes; ``None``: publish whoever has taken over.
        policy: further calibration of the draft policy for these weights.

    Raises:
        ValueError: a weight is not finite, or another trainer has taken over; nothing is published.
        OSError: the disk is full or failed; nothing is published.
    """
    manifest = Manifest(
        # Above its parent even where somebody deleted the store, and its record of numbers with it.
        version=max(store.next_version(), parent.version + 1),
        parent=parent.version,
        kind=parent.kind,
        drafter_config=parent.drafter_config,
        target_fingerprint=parent.target_fingerprint,
        files={},
        gate={**judgement.to_json(), "step": step, "learning_s": learning_s},
        policy={
            "acceptance": judgement.acceptance,
            "parent": parent.version,
            "parent_acceptance": judgement.incumbent_acceptance,
            **(policy or {}),
        },
        created_unix_ms=int(time.time() * 1000),
    )
    published = store.publish(manifest, {TENSORS: content}, epoch)
    store.prune(keep)
    return published


def is_same(trainable: Trainable[Any], model: nn.Module, other: nn.Module) -> bool:
    """Whether two drafters would be published with the same bytes."""
    ours, theirs = (trainable.bundle_tensors(m) for m in (model, other))
    dtypes = _bundle_dtypes(ours)
    return all(t.to(dtypes[n]).equal(theirs[n].to(dtypes[n])) for n, t in ours.items())


def _bits_of(tensor: Tensor) -> NDArray[Any]:
    """The memory of a contiguous tensor on the CPU; numpy has no bfloat16."""
    is_brain = tensor.dtype == torch.bfloat16
    found: NDArray[Any] = (tensor.view(torch.int16) if is_brain else tensor).numpy()
    return found


def _bundle_dtypes(tensors: Tensors) -> dict[str, torch.dtype]:
    is_small = sum(tensor.nbytes for tensor in tensors.values()) <= LARGEST_FLOAT32_BYTES
    return {
        name: tensor.dtype if is_small or not tensor.is_floating_point() else torch.bfloat16
        for name, tensor in tensors.items()
    }
