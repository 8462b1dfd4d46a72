"""Version 0 of a run: whoever starts first, server or trainer, publishes the same one."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from safetensors.torch import save
from torch import Tensor

from buffer.records import Manifest
from buffer.weights import TENSORS, publish, versions
from drafters.eagle3.model import Eagle3, config_for_target


def random_drafter(
    target_config: Any,
    lm_head_VH: Tensor,
    layer_ids: tuple[int, ...] | None,
    seed: int,
    fingerprint: str,
) -> tuple[Manifest, bytes]:
    """Manifest and safetensors bytes of a fresh EAGLE-3, a function of its arguments alone.

    Raises:
        ValueError: a layer id the target does not have.
    """
    model = Eagle3(config_for_target(target_config, layer_ids))
    model.initialise(seed, lm_head_VH.float().cpu())
    manifest = Manifest(0, None, "eagle3", model.config.to_json(), fingerprint, {})
    return manifest, save(model.bundle_tensors())


def publish_initial(root: Path, manifest: Manifest, content: bytes) -> None:
    """Publish tensors as version 0 of the store, unless the other process just did.

    Args:
        manifest: says kind, shape, target, gate figures and calibration; the rest is set here.

    Raises:
        ValueError: it cannot be published, and no version is there.
    """
    now_ms = int(time.time() * 1000)
    initial = replace(
        manifest, version=0, parent=None, files={}, created_unix_ms=now_ms, signature=None
    )
    try:
        publish(root, initial, {TENSORS: content})
    except ValueError:
        if not versions(root):
            raise
        # The server or trainer beside us published version 0 first, from the same settings.
