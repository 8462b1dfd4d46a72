"""The trainer's own resumable state: written and read whole or not at all.

``<root>/<number>/`` holds ``state.safetensors`` (weights, moments, generator) and ``state.json``
(everything else, and the digests of both). A folder is written under a temporary name, flushed and
renamed, so kill -9 leaves the previous checkpoint intact. Numbers only grow; the newest few are
kept. Where the newest is damaged, the older one is used, and the damaged one is set aside as
``<number>.damaged``, in place of any that was set aside before.

No rows and no token ids are in it, only the names of traces, which are read from the log again. A
float32 parameter takes 16 bytes: itself, its average and two moments.
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
import shutil
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from safetensors.torch import load
from torch import Tensor

from buffer.files import (
    OWNER_FILE,
    OWNER_FOLDER,
    read_regular,
    sync_folder,
    write_durably,
    write_parts,
)
from buffer.sealed import CHUNK_BYTES
from buffer.tensors import tensor_parts
from trainer.host import laid_out

log = logging.getLogger(__name__)

SCHEMA = "slipstream.checkpoint"
SCHEMA_VERSION = 1
KEEP = 2
_MOST_STATE_BYTES = 1 << 30
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

    def __init__(self, problem: str, state: dict[str, Any] | None = None) -> None:
        super().__init__(problem)
        self.state = state
        """Its state, if that is sound."""


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """Saved state of a trainer."""

    state: dict[str, Any]
    """Content of ``state.json``."""
    tensors: dict[str, Tensor]
    damaged: tuple[dict[str, Any] | None, ...] = ()
    """States of newer checkpoints, oldest first, whose tensors are damaged; ``None``: of one whose
    state is damaged, too."""


def write_checkpoint(
    root: Path,
    state: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    keep: int = KEEP,
) -> Path:
    """Save a checkpoint, then remove all but the newest ``keep``. Only its owner may read it.

    Returns:
        Its folder.

    Raises:
        OSError: the disk is full or failed; earlier checkpoints stay, and nothing of this one does.
    """
    root.mkdir(mode=OWNER_FOLDER, parents=True, exist_ok=True)
    for leftover in root.glob(".tmp-*"):  # left by a killed trainer: only one runs at a time
        shutil.rmtree(leftover)
    numbers = _numbers(root)
    path = root / f"{max(numbers, default=0) + 1:08d}"
    aside = root / f".tmp-{path.name}"
    aside.mkdir(mode=OWNER_FOLDER)
    try:
        _write(aside, state, tensors)
        aside.rename(path)
    except OSError:
        # On a full disk it would keep the room from the server's traces, too.
        shutil.rmtree(aside, ignore_errors=True)
        raise
    sync_folder(root)
    for number in sorted(numbers)[: max(0, len(numbers) + 1 - keep)]:
        shutil.rmtree(root / f"{number:08d}")
    return path


def _write(aside: Path, state: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    # From where they lie: joining them first takes seconds in which no other thread could work.
    digest = hashlib.sha256()
    parts = _digested(tensor_parts(laid_out(tensors)).parts, digest)
    write_parts(aside / "state.safetensors", parts, OWNER_FILE, is_durable=True)
    body = {
        "schema": SCHEMA,
        "schema_version": SCHEMA_VERSION,
        "sha256": digest.hexdigest(),
        "state_sha256": _digest_of(dict(state)),
        "state": dict(state),
    }
    write_durably(aside / "state.json", json.dumps(body, allow_nan=False).encode(), OWNER_FILE)
    sync_folder(aside)


def _digested(parts: Iterable[memoryview], digest: Any) -> Iterator[memoryview]:
    """The parts in chunks that are digested while the processor's cache holds them."""
    for part in parts:
        for start in range(0, len(part), CHUNK_BYTES):
            chunk = part[start : start + CHUNK_BYTES]
            digest.update(chunk)
            yield chunk


def read_checkpoint(root: Path) -> Checkpoint | None:
    """Newest sound checkpoint; ``None`` if there is none at all. Newer ones, which are damaged, are
    set aside and named in the log.

    Raises:
        CheckpointError: all are damaged, or of another schema; they stay where they are.
    """
    damaged: dict[Path, _Damaged] = {}
    for number in sorted(_numbers(root), reverse=True):
        path = root / f"{number:08d}"
        try:
            found = _read(path)
        except _Damaged as problem:
            damaged[path] = problem
            continue
        if damaged:
            _set_aside(damaged, path)
        return replace(found, damaged=tuple(one.state for one in reversed(damaged.values())))
    if damaged:
        raise CheckpointError(root, "; ".join(f"{p.name} ({one})" for p, one in damaged.items()))
    return None


def _read(path: Path) -> Checkpoint:
    state: dict[str, Any] | None = None
    try:
        text = read_regular(path / "state.json", _MOST_STATE_BYTES + 1, follow=True)
        if len(text) > _MOST_STATE_BYTES:
            raise _Damaged(f"state.json has over {_MOST_STATE_BYTES} bytes")
        body = json.loads(text)
        if (body["schema"], body["schema_version"]) != (SCHEMA, SCHEMA_VERSION):
            raise _Damaged(f"it is {body['schema']} {body['schema_version']}")
        # Before 2026-12 the state had no digest.
        if body.get("state_sha256", digest := _digest_of(body["state"])) != digest:
            raise _Damaged("state.json has a different state than was written")
        state = dict(body["state"])
        content = read_regular(path / "state.safetensors", follow=True)
        if hashlib.sha256(content).hexdigest() != body["sha256"]:
            raise _Damaged("state.safetensors has a different sha256 than was written", state)
        return Checkpoint(state, load(content))
    except (OSError, KeyError, TypeError, ValueError, RecursionError) as error:
        raise _Damaged(f"{type(error).__name__}: {error}", state) from error


def _digest_of(state: Any) -> str:
    """Of the state as it is in JSON: reading and writing that changes nothing."""
    return hashlib.sha256(json.dumps(state, allow_nan=False).encode()).hexdigest()


def _set_aside(damaged: Mapping[Path, _Damaged], used: Path) -> None:
    """Keep damaged checkpoints out of the way of the next ones; only the newest stays, since each
    may be as large as a sound one."""
    former = [path for path in used.parent.glob("*.damaged") if path.is_dir()]
    for path, problem in damaged.items():
        aside = path.with_name(f"{path.name}.damaged")
        try:
            shutil.rmtree(aside, ignore_errors=True)
            path.rename(aside)
            where = f"it is now {aside.name}"
            former.append(aside)
        except OSError as error:
            where = f"it could not be set aside ({error.strerror})"
        log.warning(
            "checkpoint %s is damaged: %s; %s. Continuing from the older checkpoint %s",
            path,
            problem,
            where,
            used.name,
        )
    for path in sorted(former)[:-1]:
        shutil.rmtree(path, ignore_errors=True)


def _numbers(root: Path) -> list[int]:
    if not root.is_dir():
        return []
    return [int(entry.name) for entry in root.iterdir() if _NUMBER.fullmatch(entry.name)]
