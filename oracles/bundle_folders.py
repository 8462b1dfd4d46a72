"""Bundles in folders, without a run."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import save
from torch import Tensor

from buffer.bundles import Bundle, prepare_bundle, read_bundle
from buffer.manifest import TENSORS
from buffer.records import Manifest
from buffer.sealed import plain


def write_bundle(
    folder: Path, kind: str, config: dict[str, Any], fingerprint: str, tensors: Mapping[str, Tensor]
) -> Bundle:
    """Write the bundle whose version is the folder's name, and read it again."""
    manifest = Manifest(int(folder.name), None, kind, config, fingerprint, {})
    folder.mkdir()
    content = save({name: tensor.contiguous() for name, tensor in tensors.items()})
    for name, written in prepare_bundle(manifest, {TENSORS: content})[1].items():
        (folder / name).write_bytes(plain(written))
    return read_bundle(folder)
