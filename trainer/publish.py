"""A candidate that passed the gate becomes a published version."""

from __future__ import annotations

import time

from safetensors.torch import save
from torch import Tensor

from buffer.interface import WeightsStore
from buffer.manifest import TENSORS
from buffer.records import Manifest
from drafters.eagle3.model import Eagle3
from trainer.gate import Judgement

LARGEST_FLOAT32_BYTES = 256 << 20
"""Bundles above it are written as bfloat16, which is what a GPU serves; the server casts on load,
so below it float32 costs little and serves every dtype."""


def publish_version(
    store: WeightsStore,
    model: Eagle3,
    parent: Manifest,
    judgement: Judgement,
    *,
    step: int,
    keep: int,
) -> Manifest:
    """Write the next version, and take old ones away.

    Raises:
        ValueError: a weight is not finite; nothing is published.
        OSError: of the disk.
    """
    manifest = Manifest(
        version=store.next_version(),
        parent=parent.version,
        kind=parent.kind,
        drafter_config=parent.drafter_config,
        target_fingerprint=parent.target_fingerprint,
        files={},
        gate={**judgement.to_json(), "step": step},
        policy={"acceptance": judgement.acceptance},
        created_unix_ms=int(time.time() * 1000),
    )
    published = store.publish(manifest, {TENSORS: save(bundle_tensors(model))})
    store.prune(keep)
    return published


def bundle_tensors(model: Eagle3) -> dict[str, Tensor]:
    """The model's tensors on the CPU, in the dtype of a bundle."""
    tensors = {name: tensor.detach().cpu() for name, tensor in model.bundle_tensors().items()}
    if sum(tensor.nbytes for tensor in tensors.values()) > LARGEST_FLOAT32_BYTES:
        tensors = {n: t.bfloat16() if t.is_floating_point() else t for n, t in tensors.items()}
    return {name: tensor.contiguous() for name, tensor in tensors.items()}
