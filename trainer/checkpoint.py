"""The trainer's own resumable state: written and read whole or not at all.

``<root>/<number>/`` holds ``state.safetensors`` (weights, moments, generator) and ``state.json``
(everything else, and the digest of the tensors). A folder is written under a temporary name,
flushed and renamed, so kill -9 leaves the previous checkpoint intact. Numbers only grow; the newest
two checkpoints are kept.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import load, save
from torch import Tensor

from buffer.files import sync_folder, write_durably

SCHEMA = "slipstream.checkpoint"
SCHEMA_VERSION = 1
KEEP = 2
_NUMBER = re.compile(r"[0-9]{8}")


class CheckpointError(ValueError):
    """A checkpoint cannot be used. The trainer stops: a fresh start would hide the loss."""

    def __init__(self, path: Path, problem: str) -> None:
        super().__init__(
            f"checkpoint {path} cannot be used: {problem}; not training. Restore it, or remove "
            f"{path.parent} to start again from the newest published version"
        )


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """Saved state of a trainer."""

    state: dict[str, Any]
    """Content of ``state.json``."""
    tensors: dict[str, Tensor]


def write_checkpoint(root: Path, state: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Path:
    """Save a checkpoint, then remove all but the newest two.

    Returns:
        Its folder.

    Raises:
        OSError: the disk is full or failed; earlier checkpoints stay.
    """
    root.mkdir(parents=True, exist_ok=True)
    for leftover in root.glob(".tmp-*"):  # left by a killed trainer: only one runs at a time
        shutil.rmtree(leftover)
    numbers = _numbers(root)
    path = root / f"{max(numbers, default=0) + 1:08d}"
    content = save(dict(tensors))
    body = {
        "schema": SCHEMA,
        "schema_version": SCHEMA_VERSION,
        "sha256": hashlib.sha256(content).hexdigest(),
        "state": dict(state),
    }
    aside = root / f".tmp-{path.name}"
    aside.mkdir()
    write_durably(aside / "state.safetensors", content)
    write_durably(aside / "state.json", json.dumps(body, allow_nan=False).encode())
    sync_folder(aside)
    aside.rename(path)
    sync_folder(root)
    for number in sorted(numbers)[: 1 - KEEP]:
        shutil.rmtree(root / f"{number:08d}")
    return path


def read_checkpoint(root: Path) -> Checkpoint | None:
    """Newest checkpoint; ``None`` if there is none.

    Raises:
        CheckpointError: it is damaged, or has another schema.
    """
    numbers = _numbers(root)
    if not numbers:
        return None
    path = root / f"{max(numbers):08d}"
    try:
        body = json.loads((path / "state.json").read_bytes())
        content = (path / "state.safetensors").read_bytes()
        if (body["schema"], body["schema_version"]) != (SCHEMA, SCHEMA_VERSION):
            raise CheckpointError(path, f"it is {body['schema']} {body['schema_version']}")
        if hashlib.sha256(content).hexdigest() != body["sha256"]:
            raise CheckpointError(path, "state.safetensors has a different sha256 than was written")
        return Checkpoint(body["state"], load(content))
    except (OSError, KeyError, TypeError, json.JSONDecodeError, UnicodeDecodeError) as error:
        raise CheckpointError(path, f"{type(error).__name__}: {error}") from error


def _numbers(root: Path) -> list[int]:
    if not root.is_dir():
        return []
    return [int(entry.name) for entry in root.iterdir() if _NUMBER.fullmatch(entry.name)]
