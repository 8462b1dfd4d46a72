"""What a trainer has found by replaying a drafter along the target's text, kept in the run folder.

``trainer policy`` replays (``trainer.replayed_drafts``), and ``policies evaluate``, which needs no
torch, scores longer drafts by it. Rounds are named by trace and anchor, so the file stays right
whatever is read of the run later. It holds no text.
"""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from buffer.files import OWNER_FILE, read_regular, write_atomically
from buffer.tensors import MAX_BUNDLE_HEADER_BYTES, join_tensors, parse_header
from policies.logged import Replayed

_SCHEMA = "slipstream.policy.replayed"
_MOST_BYTES = 1 << 28
_PLACE, _KEPT = "place", "kept"


def replayed_path(run_dir: Path) -> Path:
    """Where it is."""
    return run_dir / "policy" / "replayed.safetensors"


def write_replayed(run_dir: Path, chances: Replayed) -> None:
    """Add to the file, or write it anew if it is of another number of positions, or damaged.

    Args:
        chances: of the same number of positions each; at least one.

    Raises:
        OSError: it cannot be written.
    """
    num_positions = len(next(iter(chances.values())))
    with contextlib.suppress(ValueError):
        former = read_replayed(run_dir)
        own = {place: row for place, row in former.items() if len(row) == num_positions}
        chances = {**own, **chances}
    names = {name: at for at, name in enumerate(sorted({name for name, *_ in chances}))}
    places = [(names[name], *numbers) for name, *numbers in chances]
    tensors: dict[str, tuple[str, NDArray[Any]]] = {
        _PLACE: ("I64", np.array(places, np.int64).reshape(len(places), 4)),
        _KEPT: ("F32", np.array(list(chances.values()), np.float32).reshape(len(places), -1)),
    }
    about = {"schema": _SCHEMA, "producers": json.dumps(list(names))}
    path = replayed_path(run_dir)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, join_tensors(tensors, about), OWNER_FILE)  # it holds names of traces


def read_replayed(run_dir: Path) -> Replayed:
    """What was replayed of a run; empty if nothing was.

    Raises:
        ValueError: the file is damaged.
    """
    path = replayed_path(run_dir)
    try:
        return _parsed(read_regular(path, _MOST_BYTES, follow=True))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(
            f"{path} cannot be read ({error}); delete it, and `trainer policy` writes it again"
        ) from error


def _parsed(blob: bytes) -> Replayed:
    header = parse_header(blob, len(blob), MAX_BUNDLE_HEADER_BYTES)
    if header.metadata.get("schema") != _SCHEMA:
        raise ValueError(f"schema is {header.metadata.get('schema')!r}, expected {_SCHEMA!r}")
    producers = json.loads(header.metadata["producers"])
    columns: list[NDArray[Any]] = []
    for name, tag, dtype in ((_PLACE, "I64", np.int64), (_KEPT, "F32", np.float32)):
        info = header.tensors[name]
        if info.dtype != tag or len(info.shape) != 2:
            raise ValueError(f"{name} must be {tag} in two dimensions")
        columns.append(np.frombuffer(blob[info.start : info.end], dtype).reshape(info.shape))
    places, kept = columns
    if len(places) != len(kept) or places.shape[1] != 4:
        raise ValueError(f"{_PLACE} is {list(places.shape)} and {_KEPT} {list(kept.shape)}")
    if not ((kept >= 0) & (kept <= 1)).all():
        raise ValueError(f"{_KEPT} must be probabilities")
    if len(places) and not (0 <= places[:, 0].min() <= places[:, 0].max() < len(producers)):
        raise ValueError(f"{_PLACE} names a producer that is not listed")
    return {
        (str(producers[at]), *numbers): tuple(row)
        for (at, *numbers), row in zip(places.tolist(), kept.tolist(), strict=True)
    }
