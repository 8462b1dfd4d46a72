"""New weights for a running drafter: verified and staged aside, then copied between two steps.

All parameters are views into one flat buffer, so a swap is a single in-place copy. It keeps every
address, so graphs and compiled code stay valid, and it is never half done when a step begins.

Loading runs beside the engine's thread and must not delay it: its memory is allocated once and
reused, and it works in pieces, each without the interpreter lock.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from buffer.bundles import BundleError, BundleInBuffer, HostBuffer
from buffer.records import Manifest
from buffer.weights_store import WeightsStore

_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32,
}  # fmt: skip
_LARGEST_ITEM_BYTES = 8
"""A bundle may be stored as float64."""
_OTHER_BYTES = 64 << 20
"""Most bytes of a bundle's file besides weights: header, vocabulary."""
_PIECE_BYTES = 8 << 20
"""Bytes copied at a time: 0.2 ms to a GPU. An upload of a round waits for two pieces at most."""


def _extent(tensor: Tensor) -> int:
    """Number of elements from the first to the last one in memory, including padding between rows
    or columns."""
    return 1 + sum(
        (n - 1) * stride for n, stride in zip(tensor.shape, tensor.stride(), strict=True)
    )


class FlatWeights:
    """One flat buffer behind all parameters of a module; each keeps its strides.

    One thread at a time may load and stage; ``take_over`` is called on the engine's thread.
    """

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        parameters = dict(module.named_parameters())
        dtypes = {p.dtype for p in parameters.values()}
        assert len(dtypes) == 1, "a drafter has one dtype"
        first = next(iter(parameters.values()))
        total = sum(map(_extent, parameters.values()))
        self.flat = torch.zeros(total, dtype=first.dtype, device=first.device)
        self.spans: dict[str, tuple[int, torch.Size, tuple[int, ...]]] = {}
        """Name -> offset, shape, strides; offset and strides in elements."""
        at = 0
        for name, parameter in parameters.items():
            view = self.flat.as_strided(parameter.shape, parameter.stride(), at)
            view.copy_(parameter.data)
            parameter.data = view
            self.spans[name] = (at, parameter.shape, parameter.stride())
            at += _extent(parameter)
        self.host = HostBuffer(_LARGEST_ITEM_BYTES * total + _OTHER_BYTES)
        """Memory that bundles are read into."""
        self._buffers = {name: buffer.cpu() for name, buffer in module.named_buffers()}
        self._spare: Tensor | None = None
        """A staged buffer that is free for reuse once ``_taken`` has completed."""
        on_gpu = self.flat.device.type == "cuda"
        # Rounds run on another stream, so that copies from the host do not delay them.
        self._stream: Any = torch.cuda.Stream(self.flat.device) if on_gpu else None  # type: ignore[no-untyped-call]
        self._taken: Any = torch.cuda.Event() if on_gpu else None  # type: ignore[no-untyped-call]
        self._upload = _Upload(self.flat.device) if on_gpu else None

    def stage(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """Fill a second flat buffer, on the module's device, from named tensors.

        The caller owns it until ``take_over`` or ``give_back``, which return it for reuse.

        Args:
            tensors: on the host, all values finite.

        Raises:
            ValueError: names or shapes differ from the module's, or a value overflows the
                module's dtype.
        """
        self._check(tensors)
        with torch.cuda.stream(self._stream) if self._stream else nullcontext():
            staged, self._spare = self._spare, None
            if staged is None:
                staged = torch.empty_like(self.flat)
            elif self._taken is not None:
                self._stream.wait_event(self._taken)
            infinite = self._fill(staged, tensors)
        if infinite:
            self._spare = staged
            raise ValueError(f"{infinite} do not fit in {self.flat.dtype}: NaN or infinity")
        return staged

    def _check(self, tensors: Mapping[str, Tensor]) -> None:
        wanted = set(self.spans) | (set(tensors) & set(self._buffers))
        if set(tensors) != wanted:
            missing, extra = sorted(wanted - set(tensors)), sorted(set(tensors) - wanted)
            raise ValueError(f"tensors differ: missing {missing}, unexpected {extra}")
        for name, (_, shape, _) in self.spans.items():
            if tensors[name].shape != shape:
                raise ValueError(f"{name} must be {list(shape)}, got {list(tensors[name].shape)}")
            if not tensors[name].is_floating_point():  # a copy would convert it
                raise ValueError(f"{name} must be of a floating type, got {tensors[name].dtype}")
        for name in set(tensors) & set(self._buffers):
            if not torch.equal(tensors[name], self._buffers[name]):
                raise ValueError(f"{name} differs from the running drafter's; restart to change it")

    def _fill(self, staged: Tensor, tensors: Mapping[str, Tensor]) -> list[str]:
        """Copy all tensors and wait; returns the names of those that overflowed to infinity."""
        is_infinite = torch.zeros(len(self.spans), dtype=torch.bool, device=staged.device)
        for number, (name, (at, shape, stride)) in enumerate(self.spans.items()):
            for to, source in _pieces(staged.as_strided(shape, stride, at), tensors[name]):
                if self._upload is not None:
                    self._upload.copy(to, source)
                else:
                    to.copy_(source)
                if to.dtype != source.dtype:  # otherwise the values are those already checked
                    is_infinite[number] |= ~torch.isfinite(to).all()
        found = is_infinite.tolist()  # the only wait for the stream; releases the interpreter lock
        return [name for name, is_so in zip(self.spans, found, strict=True) if is_so]

    def take_over(self, staged: Tensor) -> None:
        """Copy staged weights over the running ones, between two rounds of the calling thread."""
        self.flat.copy_(staged)
        self.give_back(staged)

    def give_back(self, staged: Tensor) -> None:
        """Return staged weights for reuse, once the calling thread's stream has read them."""
        if self._taken is not None:
            self._taken.record()
            # Allocated on another stream: it may be freed when another buffer becomes the spare.
            staged.record_stream(torch.cuda.current_stream())
        self._spare = staged


class _Upload:
    """Copies from the host to a GPU piece by piece, so that other copies get in between.

    Two staging buffers alternate. Left to the driver, pageable memory would be staged whole and
    under the driver's own locks.
    """

    def __init__(self, device: torch.device) -> None:
        self._places = itertools.cycle([_place(device) for _ in range(2)])

    def copy(self, to: Tensor, source: Tensor) -> None:
        """``to.copy_(source)`` on the current stream; ``source`` may be modified on return.

        Args:
            to: on the device, with any strides and dtype.
            source: on the host, at most 8 MiB.
        """
        pinned, arrived, is_free = next(self._places)
        is_free.synchronize()
        bits = source.reshape(-1).view(torch.uint8)
        # With numpy, which stays on this thread: torch would wake a thread on every core.
        pinned.numpy()[: len(bits)] = bits.numpy()
        arrived[: len(bits)].copy_(pinned[: len(bits)], non_blocking=True)
        to.copy_(arrived[: len(bits)].view(source.dtype).view(source.shape))
        is_free.record()


def _place(device: torch.device) -> tuple[Tensor, Tensor, Any]:
    """A pinned buffer, a device buffer, and an event that completes when both are free."""
    return (
        torch.empty(_PIECE_BYTES, dtype=torch.uint8, pin_memory=True),
        torch.empty(_PIECE_BYTES, dtype=torch.uint8, device=device),
        torch.cuda.Event(blocking=True),  # type: ignore[no-untyped-call]
    )


def _pieces(to: Tensor, source: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Split both alike along their leading dimensions, into at most 8 MiB of ``source`` each."""
    if source.nbytes <= _PIECE_BYTES:
        yield to, source
    elif num_rows := _PIECE_BYTES // source[0].nbytes:
        yield from zip(torch.split(to, num_rows), torch.split(source, num_rows), strict=True)
    else:
        for to_row, row in zip(to, source, strict=True):
            yield from _pieces(to_row, row)


class RefusedError(ValueError):
    """A version that is not loaded; the message says why, and that the old weights keep serving."""

    def __init__(self, reason: str, text: str) -> None:
        super().__init__(text)
        self.reason = reason
        """Under which it is counted: ``damaged``, ``unsigned``, ``signature``, ``kind``,
        ``target``, ``shape``, ``tensors`` or ``away``."""


@dataclass(frozen=True, slots=True)
class Staged:
    """Verified weights, ready to be copied in."""

    manifest: Manifest
    flat: Tensor


@dataclass(frozen=True, slots=True)
class Expected:
    """Properties that a bundle must match to be loaded."""

    kind: str
    drafter_config: dict[str, object]
    target_fingerprint: str


def load_bundle(
    store: WeightsStore, version: int, weights: FlatWeights, expected: Expected
) -> Staged:
    """Read a version, check all of it, and stage it.

    Raises:
        RefusedError: it is damaged, not signed as the store demands, made for another target, or of
            another kind or shape.
    """
    try:
        bundle = store.read_into(weights.host, version)
    except BundleError as error:
        raise RefusedError(error.reason, str(error)) from error
    except OSError as error:
        raise RefusedError("away", str(error)) from error
    manifest = bundle.manifest
    name = f"snapshot {manifest.version}"
    keep = "not swapping; the running version keeps serving"
    if manifest.kind != expected.kind:
        raise RefusedError(
            "kind", f"{name} is a {manifest.kind} drafter, this one is {expected.kind}; {keep}"
        )
    if manifest.target_fingerprint != expected.target_fingerprint:
        raise RefusedError(
            "target",
            f"{name} was made for target {manifest.target_fingerprint[:12]}, this server runs "
            f"{expected.target_fingerprint[:12]}; {keep}. Point the trainer at the same target.",
        )
    if manifest.drafter_config != expected.drafter_config:
        keys = sorted(
            k
            for k in set(manifest.drafter_config) | set(expected.drafter_config)
            if manifest.drafter_config.get(k) != expected.drafter_config.get(k)
        )
        raise RefusedError("shape", f"{name} has another shape ({', '.join(keys)} differ); {keep}")
    try:
        staged = weights.stage(_tensors(bundle))
    except ValueError as error:
        raise RefusedError("tensors", f"{name} cannot be used: {error}; {keep}") from error
    return Staged(manifest, staged)


def _tensors(bundle: BundleInBuffer) -> dict[str, Tensor]:
    """Views into the bytes that were checked; misaligned tensors are copied."""
    whole = torch.from_numpy(bundle.content)
    found = {}
    for name, info in bundle.tensors.items():
        bits, dtype = whole[info.start : info.end], _DTYPES.get(info.dtype)
        if dtype is None:
            raise ValueError(f"{name} is {info.dtype}, none of {', '.join(_DTYPES)}")
        if info.start % dtype.itemsize:
            bits = bits.clone()
        found[name] = bits.view(dtype).view(info.shape)
    return found
