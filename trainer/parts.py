"""A batch in parts, which processes share and compute one after another.

The update is that of the sum of the parts' losses, each weighted by its rows with a loss. It
depends
on the number of parts alone, not on the number of processes: with the same ``trainer.parts``, one
process and several get the same losses up to rounding.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from drafters.batch import TrainingBatch
from trainer.packing import HeldPiece, pack
from trainer.rows import RowStore


@dataclass(frozen=True, slots=True)
class Part:
    """What is computed at once."""

    batch: TrainingBatch
    share: float
    """Of the batch's rows with a loss. 0: it repeats another part, since every process must compute
    as many as the others."""
    seed: int
    """Of what is drawn at random for this part."""


def num_parts(wanted: int, num_processes: int) -> int:
    """``trainer.parts``, rounded up to what the processes can share evenly."""
    return -(-wanted // num_processes) * num_processes


def split(pieces: Sequence[HeldPiece], num: int) -> list[list[HeldPiece]]:
    """Divide pieces into ``num`` parts of about the same number of positions.

    A function of its arguments alone. Parts are empty if there are fewer pieces.
    """
    parts: list[list[HeldPiece]] = [[] for _ in range(num)]
    sizes = [0] * num
    for piece in sorted(pieces, key=lambda one: -len(one.slots)):
        at = sizes.index(min(sizes))
        parts[at].append(piece)
        sizes[at] += len(piece.slots)
    return parts


def parts_of(
    pieces: Sequence[HeldPiece], num: int, store: RowStore, dtype: torch.dtype, seed: int
) -> list[Part]:
    """The parts of a batch with their rows, on the store's device.

    Args:
        pieces: at least one.
        dtype: of the rows.
        seed: of the whole batch.
    """
    total = sum(len(piece.rows) for piece in pieces)
    made = []
    for number, own in enumerate(split(pieces, num)):
        batch = store.batch(pack(own or list(pieces[:1]), None), dtype)
        share = sum(len(piece.rows) for piece in own) / max(total, 1)
        made.append(Part(batch, share, seed + number))
    return made


def to_tensors(parts: Sequence[Part]) -> dict[str, Tensor]:
    """All tensors of parts, by number and field; ``from_tensors`` reads them back."""
    return {
        f"{number}.{field.name}": getattr(part.batch, field.name)
        for number, part in enumerate(parts)
        for field in fields(TrainingBatch)
        if isinstance(getattr(part.batch, field.name), Tensor)
    }


def facts(parts: Sequence[Part]) -> list[dict[str, Any]]:
    """All of parts that are no tensors."""
    return [{"longest": p.batch.longest, "share": p.share, "seed": p.seed} for p in parts]


def from_tensors(
    tensors: Mapping[str, Tensor], known: Sequence[Mapping[str, Any]], device: torch.device
) -> list[Part]:
    """The parts of ``to_tensors`` and ``facts``."""
    made = []
    for number, one in enumerate(known):
        prefix = f"{number}."
        own = {
            name.removeprefix(prefix): tensor.to(device, non_blocking=True)
            for name, tensor in tensors.items()
            if name.startswith(prefix)
        }
        batch = TrainingBatch(longest=one["longest"], **own)
        made.append(Part(batch, one["share"], one["seed"]))
    return made
