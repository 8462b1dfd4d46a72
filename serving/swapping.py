"""New weights in a running drafter: built aside, verified, then one copy between two steps.

All parameters are views into one flat buffer, so a swap is a single in-place copy that keeps every
address (graphs and compiled code stay valid) and can never be half done between two steps.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from buffer.records import Manifest
from buffer.tensors import check_safetensors
from buffer.weights import TENSORS, BundleError, read_bundle

_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32,
}  # fmt: skip


class FlatWeights:
    """The one flat buffer behind a module's parameters, each laid out there as it was."""

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
        on_gpu = self.flat.device.type == "cuda"
        # Rounds run on another: a copy from the host must not stand in their way.
        self._stream: Any = torch.cuda.Stream(self.flat.device) if on_gpu else None  # type: ignore[no-untyped-call]

    def stage(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """A second flat buffer, on the module's device, filled from named tensors.

        Raises:
            ValueError: names or shapes differ from the module's, or a value is not finite.
        """
        buffers = dict(self.module.named_buffers())
        wanted = set(self.spans) | {n for n in tensors if n in buffers}
        if set(tensors) != wanted:
            missing, extra = sorted(wanted - set(tensors)), sorted(set(tensors) - wanted)
            raise ValueError(f"tensors differ: missing {missing}, unexpected {extra}")
        for name, (_, shape, _) in self.spans.items():
            if tensors[name].shape != shape:
                raise ValueError(f"{name} must be {list(shape)}, got {list(tensors[name].shape)}")
        with torch.cuda.stream(self._stream) if self._stream else nullcontext():
            staged = torch.empty_like(self.flat)
            for name, (at, shape, stride) in self.spans.items():
                part = staged.as_strided(shape, stride, at)
                part.copy_(tensors[name])
                if not torch.isfinite(part).all():
                    raise ValueError(f"{name} holds NaN or infinity")
        for name in set(tensors) & set(buffers):
            if not torch.equal(tensors[name], buffers[name].to(tensors[name].device)):
                raise ValueError(f"{name} differs from the running drafter's; restart to change it")
        return staged

    def take_over(self, staged: Tensor) -> None:
        """Make staged weights the running ones, between two rounds of the calling thread."""
        self.flat.copy_(staged)
        if self._stream:  # its memory was another stream's and may be given away once it is free
            staged.record_stream(torch.cuda.current_stream())


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


def load_bundle(path: Path, weights: FlatWeights, expected: Expected) -> Staged:
    """Check a bundle from manifest to last byte and stage it.

    Raises:
        ValueError: it is damaged, foreign, or of another shape; says which, and that the old
            weights keep serving.
    """
    try:
        bundle = read_bundle(path)
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
        staged = weights.stage(_tensors(bundle.files[TENSORS]))
    except ValueError as error:
        raise ValueError(f"{name} cannot be used: {error}; {keep}") from error
    return Staged(manifest, staged)


def _tensors(content: bytes) -> dict[str, Tensor]:
    """What ``safetensors.torch.load`` returns. That one holds the interpreter's lock while it
    copies, 270 ms for 400 MB, in which the engine begins no step; an array's copy does not."""
    infos = check_safetensors(content)
    whole = torch.empty(len(content), dtype=torch.uint8)
    whole.numpy()[:] = np.frombuffer(content, dtype=np.uint8)
    found = {}
    for name, info in infos.items():
        bits, dtype = whole[info.start : info.end], _DTYPES.get(info.dtype)
        if dtype is None:
            raise ValueError(f"{name} is {info.dtype}, none of {', '.join(_DTYPES)}")
        if info.start % dtype.itemsize:
            bits = bits.clone()
        found[name] = bits.view(dtype).view(info.shape)
    return found
