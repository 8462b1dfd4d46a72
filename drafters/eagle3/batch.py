"""Training batch of EAGLE-3: pieces of samples, padded to one length.

Shapes: B sequences, S positions (padded), H hidden, m tapped layers, F = m * H.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from drafters.samples import Piece, Sample, widen


@dataclass(frozen=True, slots=True)
class TTTBatch:
    """Batch for training-time test. Positions that are not ``known`` may hold any finite value."""

    token_ids_BS: Tensor
    """int64."""
    positions_BS: Tensor
    """int64, position in the request; consecutive along S."""
    features_BSF: Tensor
    """Tapped layers in ``layer_ids`` order. bfloat16 runs the layer under autocast."""
    last_hidden_BSH: Tensor
    """lm_head's input."""
    known_BS: Tensor
    """bool: features and last hidden exist at this position."""
    loss_BS: Tensor
    """bool: the row has a loss. Requires ``known`` there and a committed token after it."""

    def to(self, device: torch.device, dtype: torch.dtype) -> TTTBatch:
        """Move to ``device``; features and last hidden are cast to ``dtype``."""
        return TTTBatch(
            self.token_ids_BS.to(device),
            self.positions_BS.to(device),
            self.features_BSF.to(device, dtype),
            self.last_hidden_BSH.to(device, dtype),
            self.known_BS.to(device),
            self.loss_BS.to(device),
        )


def collate(parts: Sequence[tuple[Sample, Piece]]) -> TTTBatch:
    """Pad pieces to the longest, in float32 on the CPU."""
    first = parts[0][0]
    B, S = len(parts), max(piece.stop - piece.start for _, piece in parts)
    width, H = (first.rows.shape[1] - 1) * first.rows.shape[2], first.rows.shape[2]
    batch = TTTBatch(
        token_ids_BS=torch.zeros(B, S, dtype=torch.int64),
        positions_BS=torch.zeros(B, S, dtype=torch.int64),
        features_BSF=torch.zeros(B, S, width),
        last_hidden_BSH=torch.zeros(B, S, H),
        known_BS=torch.zeros(B, S, dtype=torch.bool),
        loss_BS=torch.zeros(B, S, dtype=torch.bool),
    )
    for b, (sample, piece) in enumerate(parts):
        _fill(batch, b, sample, piece)
    return batch


def _fill(batch: TTTBatch, b: int, sample: Sample, piece: Piece) -> None:
    """Write one piece into sequence ``b`` of a batch under construction."""
    length = piece.stop - piece.start
    batch.token_ids_BS[b, :length] = sample.token_ids_T[piece.start : piece.stop]
    batch.positions_BS[b] = torch.arange(batch.positions_BS.shape[1]) + piece.start
    inside = (sample.positions_N >= piece.start) & (sample.positions_N < piece.stop)
    at = sample.positions_N[inside] - piece.start
    scale = None if sample.scale is None else sample.scale[inside]
    rows = widen(sample.rows[inside], scale)
    batch.features_BSF[b, at] = rows[:, :-1].flatten(1)
    batch.last_hidden_BSH[b, at] = rows[:, -1]
    batch.known_BS[b, at] = True
    batch.loss_BS[b, at] = (at >= piece.loss_from - piece.start) & (at + 1 < length)


def delayed(x: Tensor) -> Tensor:
    """Shift x [B, S, ...] by one position: row p holds what was at p - 1; row 0 is zero."""
    return torch.cat((torch.zeros_like(x[:, :1]), x[:, :-1]), dim=1)
