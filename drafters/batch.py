"""What an update trains on: pieces of samples, laid behind each other on one axis.

Rows of different pieces never see each other: ``segment_T`` says which piece a position belongs to.
Nothing is padded to the longest piece, and a trainer can keep T and R the same for all updates.

Shapes: T positions of all pieces, R rows with a loss, m tapped layers, H hidden, F = m * H.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from drafters.samples import Piece, Sample, rows_with_loss, widen


@dataclass(frozen=True, slots=True)
class TrainingBatch:
    """Rows to train on. Positions that are not ``known`` may hold any finite value."""

    token_ids_T: Tensor
    """int64."""
    positions_T: Tensor
    """int64, position in the request; consecutive within a piece."""
    segment_T: Tensor
    """int64 number of the piece, the same at all its positions; below 0: padding."""
    features_TF: Tensor
    """Tapped layers in ``layer_ids`` order. bfloat16 runs the drafter under autocast."""
    known_T: Tensor
    """bool: features exist at this position."""
    row_R: Tensor
    """int64 index into T of each row with a loss, ascending; behind them, indices of other
    positions as padding, no two of them equal."""
    is_row_R: Tensor
    """bool: False for padding. A row was captured, like the one before it in its piece, and has a
    committed token behind it in its piece."""
    last_hidden_RH: Tensor
    """lm_head's input at these rows."""
    temperature_R: Tensor
    """float32 temperature of the request; 0 is greedy."""
    by_match_R: Tensor
    """bool: the request drafts the likeliest tokens, and keeps those that the target chooses too,
    because it is greedy or has a seed."""
    weight_R: Tensor
    """float32 weight of the loss at this row, 1 unless some matter more than others."""
    longest: int
    """No piece has more positions than this."""
    outcome_R3: Tensor | None = None
    """int32 [R, 3]: depth, rejected token and bits of log q of ``policies.outcomes.Outcomes`` at
    these rows; ``None``: nobody asks."""

    def to(self, device: torch.device, dtype: torch.dtype) -> TrainingBatch:
        """Move to ``device``; features and last hidden are cast to ``dtype``."""
        moved: dict[str, Any] = {}
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(value, Tensor):
                moved[field.name] = value.to(device)
        moved["features_TF"] = moved["features_TF"].to(dtype)
        moved["last_hidden_RH"] = moved["last_hidden_RH"].to(dtype)
        return replace(self, **moved)


def follows_T(batch: TrainingBatch) -> Tensor:
    """[T] bool: the position before is in the same piece, and its features are known."""
    same = batch.segment_T[1:] == batch.segment_T[:-1]
    follows: Tensor = torch.nn.functional.pad(same & batch.known_T[:-1], (1, 0))
    return follows


def collate(parts: Sequence[tuple[Sample, Piece]]) -> TrainingBatch:
    """The batch of some pieces in float32 on the CPU, without padding."""
    made = [_part(number, sample, piece) for number, (sample, piece) in enumerate(parts)]
    starts = [0]
    for part in made:
        starts.append(starts[-1] + part.token_ids_T.numel())
    moved = [
        replace(part, row_R=part.row_R + start) for part, start in zip(made, starts, strict=False)
    ]
    return joined(moved)


def joined(batches: Sequence[TrainingBatch]) -> TrainingBatch:
    """Batches behind each other; their ``row_R`` and ``segment_T`` must fit already."""
    columns: dict[str, Any] = {
        field.name: torch.cat([getattr(batch, field.name) for batch in batches])
        for field in fields(TrainingBatch)
        if isinstance(getattr(batches[0], field.name), Tensor)
    }
    return TrainingBatch(**columns, longest=max(batch.longest for batch in batches))


def _part(number: int, sample: Sample, piece: Piece) -> TrainingBatch:
    """A batch of one piece."""
    length = piece.stop - piece.start
    inside = (sample.positions_N >= piece.start) & (sample.positions_N < piece.stop)
    at = sample.positions_N[inside] - piece.start
    found = widen(sample.rows[inside], None if sample.scale is None else sample.scale[inside])
    rows = found.new_zeros(length, *found.shape[1:])
    rows[at] = found
    known = torch.zeros(length, dtype=torch.bool)
    known[at] = True
    row_R = torch.from_numpy(rows_with_loss(known.numpy(), piece)).long()
    weights = sample.weight_T
    return TrainingBatch(
        token_ids_T=sample.token_ids_T[piece.start : piece.stop],
        positions_T=torch.arange(piece.start, piece.stop),
        segment_T=torch.full((length,), number),
        features_TF=rows[:, :-1].flatten(1),
        known_T=known,
        row_R=row_R,
        is_row_R=torch.ones_like(row_R, dtype=torch.bool),
        last_hidden_RH=rows[row_R, -1],
        temperature_R=torch.full((len(row_R),), sample.temperature),
        by_match_R=torch.full((len(row_R),), sample.sampling.is_decided),
        weight_R=torch.ones(len(row_R)) if weights is None else weights[row_R + piece.start],
        longest=length,
        outcome_R3=None if sample.outcome_T3 is None else sample.outcome_T3[row_R + piece.start],
    )


def from_sequences(
    token_ids_BS: Tensor,
    positions_BS: Tensor,
    features_BSF: Tensor,
    last_hidden_BSH: Tensor,
    known_BS: Tensor,
    loss_BS: Tensor,
    temperature_B: Tensor | None = None,
) -> TrainingBatch:
    """The batch of B sequences of one length, each a piece.

    Args:
        loss_BS: bool. A row has a loss where the one before it is known too.
        temperature_B: ``None``: 1.
    """
    B, S = token_ids_BS.shape
    before_BS = torch.nn.functional.pad(known_BS[:, :-1], (1, 0))
    row_R = (loss_BS & before_BS).flatten().nonzero()[:, 0]
    ones_R = torch.ones(len(row_R), device=row_R.device)
    heat_R = ones_R if temperature_B is None else temperature_B.to(row_R.device)[row_R // S]
    return TrainingBatch(
        token_ids_T=token_ids_BS.flatten(),
        positions_T=positions_BS.flatten(),
        segment_T=torch.arange(B, device=row_R.device).repeat_interleave(S),
        features_TF=features_BSF.flatten(0, 1),
        known_T=known_BS.flatten(),
        row_R=row_R,
        is_row_R=ones_R.bool(),
        last_hidden_RH=last_hidden_BSH.flatten(0, 1)[row_R],
        temperature_R=heat_R,
        by_match_R=heat_R == 0,
        weight_R=ones_R,
        longest=S,
    )
