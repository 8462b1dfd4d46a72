"""Publish a candidate that passed the gate."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from safetensors.torch import save
from torch import Tensor, nn

from buffer.manifest import TENSORS
from buffer.records import Manifest
from buffer.weights_store import WeightsStore
from drafters.trainable import Trainable
from trainer.gate import Judgement

LARGEST_FLOAT32_BYTES = 256 << 20
"""Larger bundles are written as bfloat16, the dtype that a GPU serves. Smaller ones stay float32,
which costs little and suits every dtype, since the server casts on load."""


@dataclass(frozen=True, slots=True)
class Publisher:
    """The weights store, and the right to publish in it until another trainer takes over."""

    store: WeightsStore
    epoch: int


def publish_version(
    store: WeightsStore,
    trainable: Trainable[Any],
    model: nn.Module,
    parent: Manifest,
    judgement: Judgement,
    *,
    step: int,
    keep: int,
    epoch: int | None = None,
    policy: Mapping[str, Any] | None = None,
) -> Manifest:
    """Write the next version to the store, and remove old ones.

    Args:
        step: number of updates that produced the model.
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
        gate={**judgement.to_json(), "step": step},
        policy={
            "acceptance": judgement.acceptance,
            "parent": parent.version,
            "parent_acceptance": judgement.incumbent_acceptance,
            **(policy or {}),
        },
        created_unix_ms=int(time.time() * 1000),
    )
    tensors = _to_store(trainable.bundle_tensors(model))
    published = store.publish(manifest, {TENSORS: save(tensors)}, epoch)
    store.prune(keep)
    return published


def is_same(trainable: Trainable[Any], model: nn.Module, other: nn.Module) -> bool:
    """Whether two drafters would be published with the same bytes."""
    ours, theirs = (_in_bundle_dtype(trainable.bundle_tensors(m)) for m in (model, other))
    return all(tensor.equal(theirs[name]) for name, tensor in ours.items())


def _to_store(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors on the CPU, in the dtype of a bundle."""
    on_cpu = {name: tensor.detach().cpu() for name, tensor in tensors.items()}
    return {name: tensor.contiguous() for name, tensor in _in_bundle_dtype(on_cpu).items()}


def _in_bundle_dtype(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    if sum(tensor.nbytes for tensor in tensors.values()) <= LARGEST_FLOAT32_BYTES:
        return tensors
    return {n: t.bfloat16() if t.is_floating_point() else t for n, t in tensors.items()}
