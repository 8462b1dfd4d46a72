"""Version 0 of a run: server and trainer make the same one, and the first to start publishes it."""

from __future__ import annotations

import time
from dataclasses import replace
from typing import Any

from safetensors.torch import save
from torch import Tensor

from buffer.interface import WeightsStore
from buffer.manifest import TENSORS
from buffer.records import Manifest
from drafters.eagle3.model import Eagle3, config_for_target


def random_drafter(
    target_config: Any,
    lm_head_VH: Tensor,
    layer_ids: tuple[int, ...] | None,
    seed: int,
    fingerprint: str,
) -> tuple[Manifest, bytes]:
    """Manifest and safetensors bytes of a randomly initialised EAGLE-3.

    They depend on the arguments alone.

    Raises:
        ValueError: the target has no such layer.
    """
    model = Eagle3(config_for_target(target_config, layer_ids))
    model.initialise(seed, lm_head_VH.float().cpu())
    manifest = Manifest(0, None, "eagle3", model.config.to_json(), fingerprint, {})
    return manifest, save(model.bundle_tensors())


def publish_initial(store: WeightsStore, manifest: Manifest, content: bytes) -> None:
    """Publish tensors as version 0, unless another process has just done so.

    Args:
        store: where versions are published.
        manifest: kind, shape, target, gate figures and calibration; the rest is set here.
        content: ``drafter.safetensors``.

    Raises:
        ValueError: it cannot be published, and the store is empty.
    """
    now_ms = int(time.time() * 1000)
    initial = replace(
        manifest, version=0, parent=None, files={}, created_unix_ms=now_ms, signature=None
    )
    try:
        store.publish(initial, {TENSORS: content})
    except ValueError:
        if not store.versions():
            raise
        # The other process, server or trainer, published version 0 first, from the same settings.
