"""New weights in a running drafter: built aside, verified, then one copy between two steps.

All parameters are views into one flat buffer, so a swap is a single in-place copy that keeps every
address (graphs and compiled code stay valid) and can never be half done between two steps.

A load runs beside the engine's thread and must not stand in its way: its memory is made once and
used by every load, and it goes through it in pieces, each without the interpreter's lock.
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
from buffer.interface import WeightsStore
from buffer.records import Manifest

_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32,
}  # fmt: skip
_PIECE_BYTES = 8 << 20
"""Copied in one go: 0.2 ms to a GPU, for which what a round uploads waits twice at most."""


class FlatWeights:
    """The one flat buffer behind a module's parameters, each laid out there as it was.

    One thread at a time may load and stage; ``take_over`` is called from the engine's.
    """

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        parameters = dict(module.named_parameters())
        dtypes = {p.dtype for p in parameters.values()}
        assert len(dtypes) == 1, "a drafter has one dtype"
        first = next(iter(parameters.values()))
        total = sum(p.numel() for p in parameters.values())
        self.flat = torch.empty(total, dtype=first.dtype, device=first.device)
        self.spans: dict[str, tuple[int, torch.Size, tuple[int, ...]]] = {}
        """Name -> where it begins, shape, strides."""
        at = 0
        for name, parameter in parameters.items():
            view = self.flat.as_strided(parameter.shape, parameter.stride(), at)
            view.copy_(parameter.data)
            parameter.data = view
            self.spans[name] = (at, parameter.shape, parameter.stride())
            at += parameter.numel()
        self.host = HostBuffer()
        """Where bundles are read."""
        self._buffers = {name: buffer.cpu() for name, buffer in module.named_buffers()}
        self._spare: Tensor | None = None
        """A staged buffer that nobody needs any more, once ``_taken`` has passed."""
        on_gpu = self.flat.device.type == "cuda"
        # Rounds run on another: a copy from the host must not stand in their way.
        self._stream: Any = torch.cuda.Stream(self.flat.device) if on_gpu else None  # type: ignore[no-untyped-call]
        self._taken: Any = torch.cuda.Event() if on_gpu else None  # type: ignore[no-untyped-call]
        self._upload = _Upload(self.flat.device) if on_gpu else None

    def stage(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """A second flat buffer, on the module's device, filled from named tensors.

        It is the caller's until ``take_over``, which gives it back for a later call.

        Args:
            tensors: on the host, of finite numbers.

        Raises:
            ValueError: names or shapes differ from the module's, or a number is too large for its
                dtype.
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
        for name in set(tensors) & set(self._buffers):
            if not torch.equal(tensors[name], self._buffers[name]):
                raise ValueError(f"{name} differs from the running drafter's; restart to change it")

    def _fill(self, staged: Tensor, tensors: Mapping[str, Tensor]) -> list[str]:
        """Copy all in, and wait for it; returns the names of those that became infinite."""
        is_infinite = torch.zeros(len(self.spans), dtype=torch.bool, device=staged.device)
        for number, (name, (at, shape, stride)) in enumerate(self.spans.items()):
            for to, source in _pieces(staged.as_strided(shape, stride, at), tensors[name]):
                if self._upload is not None:
                    self._upload.copy(to, source)
                else:
                    to.copy_(source)
                if to.dtype != source.dtype:  # of one dtype they are what was checked
                    is_infinite[number] |= ~torch.isfinite(to).all()
        found = is_infinite.tolist()  # waits for the stream, the only time, and without the lock
        return [name for name, is_so in zip(self.spans, found, strict=True) if is_so]

    def take_over(self, staged: Tensor) -> None:
        """Make staged weights the running ones, between two rounds of the calling thread."""
        self.flat.copy_(staged)
        if self._taken is not None:
            self._taken.record()
            # Its memory was another stream's, and is given away if another becomes the spare one.
            staged.record_stream(torch.cuda.current_stream())
        self._spare = staged


class _Upload:
    """Copies from the host to a GPU that let others in between: through two places of a piece.

    The driver would stage pageable memory itself, under locks of its own and whole.
    """

    def __init__(self, device: torch.device) -> None:
        self._places = itertools.cycle([_place(device) for _ in range(2)])

    def copy(self, to: Tensor, source: Tensor) -> None:
        """``to.copy_(source)`` on the current stream; ``source`` may be changed at once.

        Args:
            to: on the device, laid out anyhow, of any dtype.
            source: on the host, 8 MiB at most.
        """
        pinned, arrived, is_free = next(self._places)
        is_free.synchronize()
        bits = source.reshape(-1).view(torch.uint8)
        # By numpy, on this thread alone: torch would wake a thread on every core.
        pinned.numpy()[: len(bits)] = bits.numpy()
        arrived[: len(bits)].copy_(pinned[: len(bits)], non_blocking=True)
        to.copy_(arrived[: len(bits)].view(source.dtype).view(source.shape))
        is_free.record()


def _place(device: torch.device) -> tuple[Tensor, Tensor, Any]:
    """A piece on the host, one on the device, and when both are free."""
    return (
        torch.empty(_PIECE_BYTES, dtype=torch.uint8, pin_memory=True),
        torch.empty(_PIECE_BYTES, dtype=torch.uint8, device=device),
        torch.cuda.Event(blocking=True),  # type: ignore[no-untyped-call]
    )


def _pieces(to: Tensor, source: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Both cut alike along their first dimensions, into at most 8 MiB of ``source``."""
    if source.nbytes <= _PIECE_BYTES:
        yield to, source
    elif num_rows := _PIECE_BYTES // source[0].nbytes:
        yield from zip(torch.split(to, num_rows), torch.split(source, num_rows), strict=True)
    else:
        for to_row, row in zip(to, source, strict=True):
            yield from _pieces(to_row, row)


@dataclass(frozen=True, slots=True)
class Staged:
    """A verified bundle, ready to be copied in."""

    manifest: Manifest
    flat: Tensor


@dataclass(frozen=True, slots=True)
class Expected:
    """What a bundle must match to be loaded."""

    kind: str
    drafter_config: dict[str, object]
    target_fingerprint: str


def load_bundle(
    store: WeightsStore, version: int, weights: FlatWeights, expected: Expected
) -> Staged:
    """Check a bundle from manifest to last byte and stage it.

    Raises:
        ValueError: it is damaged, foreign, or of another shape; says which, and that the old
            weights keep serving.
    """
    try:
        bundle = store.read_into(weights.host, version)
    except (BundleError, OSError) as error:
        raise ValueError(str(error)) from error
    manifest = bundle.manifest
    name = f"snapshot {manifest.version}"
    keep = "not swapping; the running version keeps serving"
    if manifest.kind != expected.kind:
        raise ValueError(
            f"{name} is a {manifest.kind} drafter, this one is {expected.kind}; {keep}"
        )
    if manifest.target_fingerprint != expected.target_fingerprint:
        raise ValueError(
            f"{name} was made for target {manifest.target_fingerprint[:12]}, this server runs "
            f"{expected.target_fingerprint[:12]}; {keep}. Point the trainer at the same target."
        )
    if manifest.drafter_config != expected.drafter_config:
        keys = sorted(
            k
            for k in set(manifest.drafter_config) | set(expected.drafter_config)
            if manifest.drafter_config.get(k) != expected.drafter_config.get(k)
        )
        raise ValueError(f"{name} has another shape ({', '.join(keys)} differ); {keep}")
    try:
        staged = weights.stage(_tensors(bundle))
    except ValueError as error:
        raise ValueError(f"{name} cannot be used: {error}; {keep}") from error
    return Staged(manifest, staged)


def _tensors(bundle: BundleInBuffer) -> dict[str, Tensor]:
    """Views of the very bytes that were checked, where they lie."""
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
