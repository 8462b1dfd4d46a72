"""The trainer's own resumable state: written and read whole or not at all.

``<root>/<number>/`` holds ``state.safetensors`` (weights, moments, generator) and ``state.json``
(everything else, and the digest of the tensors). A folder is written under a temporary name,
flushed and renamed, so kill -9 leaves the previous checkpoint intact. Numbers only grow; the newest
two checkpoints are kept. Where the newest is damaged, the older one is used, and the damaged one is
set aside as ``<number>.damaged``.
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import load, save
from torch import Tensor

from buffer.files import sync_folder, write_durably

log = logging.getLogger(__name__)

SCHEMA = "slipstream.checkpoint"
SCHEMA_VERSION = 1
KEEP = 2
_NUMBER = re.compile(r"[0-9]{8}")


class CheckpointError(ValueError):
    """No checkpoint can be used. The trainer stops: a fresh start would hide the loss."""

    def __init__(self, root: Path, problem: str) -> None:
        super().__init__(
            f"the checkpoints in {root} cannot be used: {problem}; not training. Restore them, or "
            f"remove {root} to start again from the newest published version"
        )


class _Damaged(Exception):
    """One checkpoint cannot be read; says why."""


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
    """Newest sound checkpoint; ``None`` if there is none at all. Newer ones, which are damaged, are
    set aside and named in the log.

    Raises:
        CheckpointError: all are damaged, or of another schema; they stay where they are.
    """
    damaged: dict[Path, str] = {}
    for number in sorted(_numbers(root), reverse=True):
        path = root / f"{number:08d}"
        try:
            found = _read(path)
        except _Damaged as problem:
            damaged[path] = str(problem)
            continue
        for other, text in damaged.items():
            _set_aside(other, text, path)
        return found
    if damaged:
        raise CheckpointError(root, "; ".join(f"{p.name} ({text})" for p, text in damaged.items()))
    return None


def _read(path: Path) -> Checkpoint:
    try:
        body = json.loads((path / "state.json").read_bytes())
        content = (path / "state.safetensors").read_bytes()
        if (body["schema"], body["schema_version"]) != (SCHEMA, SCHEMA_VERSION):
            raise _Damaged(f"it is {body['schema']} {body['schema_version']}")
        if hashlib.sha256(content).hexdigest() != body["sha256"]:
            raise _Damaged("state.safetensors has a different sha256 than was written")
        return Checkpoint(body["state"], load(content))
    except (OSError, KeyError, TypeError, ValueError) as error:
        raise _Damaged(f"{type(error).__name__}: {error}") from error


def _set_aside(path: Path, problem: str, used: Path) -> None:
    """Keep a damaged checkpoint out of the way of the next ones."""
    aside = path.with_name(f"{path.name}.damaged")
    try:
        shutil.rmtree(aside, ignore_errors=True)
        path.rename(aside)
        where = f"it is now {aside.name}"
    except OSError as error:
        where = f"it could not be set aside ({error.strerror})"
    log.warning(
        "checkpoint %s is damaged: %s; %s. Continuing from the older checkpoint %s",
        path,
        problem,
        where,
        used.name,
    )


def _numbers(root: Path) -> list[int]:
    if not root.is_dir():
        return []
    return [int(entry.name) for entry in root.iterdir() if _NUMBER.fullmatch(entry.name)]
