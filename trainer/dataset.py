"""From traces to what one update sees: checked samples, cut into pieces, padded into batches.

A trace that does not fit this target, or whose rows are not numbers, is refused with a reason and
never reaches a batch.

Shapes: T tokens of a trace, N rows captured of it, m tapped layers, H hidden; B, S as in
``drafters.eagle3.training``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from buffer.records import FeatureRows, Trace
from drafters.eagle3.training import TTTBatch

RefusalReason = Literal["no_features", "target", "layers", "shape", "vocabulary", "rows", "short"]
REFUSAL_REASONS: tuple[RefusalReason, ...] = get_args(RefusalReason)

LARGEST_VALUE = 1e9
"""Hidden rows beyond it are damage: real ones stay below 1e6, and squares must stay finite."""
_TORCH_TYPES = {
    "bfloat16": torch.bfloat16,
    "float8_e4m3fn": torch.float8_e4m3fn,
    "float32": torch.float32,
}


@dataclass(frozen=True, slots=True)
class Expected:
    """What a trace must fit."""

    target_fingerprint: str
    layer_ids: tuple[int, ...]
    hidden_size: int
    vocab_size: int


@dataclass(frozen=True, slots=True)
class Refusal:
    """Why a trace is not trained on."""

    reason: RefusalReason
    text: str


@dataclass(frozen=True, slots=True)
class Piece:
    """A part of a trace that is trained on at once: positions start <= p < stop."""

    start: int
    stop: int
    loss_from: int
    """First row with a loss; rows before it are context."""


@dataclass(frozen=True, slots=True)
class Sample:
    """A trace that fits, with its rows still packed as they were captured."""

    key: str
    """``producer/epoch/seq``."""
    token_ids_T: Tensor
    """int64."""
    positions_N: Tensor
    """int64, ascending: positions whose rows are known."""
    rows: Tensor
    """[N, m + 1, H] bfloat16, float8 or float32."""
    scale: Tensor | None
    """[N, m + 1] float32 multiplier of fp8 rows."""
    pieces: tuple[Piece, ...]
    num_loss_rows: int
    temperature: float
    version: int | None
    """Newest drafter version that proposed in it; ``None`` without rounds."""


def key_of(trace: Trace) -> str:
    """Name of a trace that no other has."""
    return f"{trace.producer}/{trace.epoch}/{trace.seq}"


def sample_of(
    trace: Trace, expected: Expected, max_sequence: int, train_on_prompts: bool = False
) -> Sample | Refusal:
    """Check a trace and lay out its pieces.

    Args:
        trace: as ``buffer.codec`` hands it out: consistent with itself.
        expected: the running target and drafter.
        max_sequence: longest piece.
        train_on_prompts: also learn from rows whose next token the user wrote.
    """
    features = trace.features
    if features is None or features.positions.size == 0:
        return Refusal("no_features", "no hidden rows were captured")
    refusal = _misfit(trace, features, expected)
    if refusal is not None:
        return refusal
    rows = torch.from_numpy(features.rows).view(_TORCH_TYPES[features.dtype])
    scale = None if features.scale is None else torch.from_numpy(features.scale)
    largest = float(_widen(rows, scale).abs().amax())
    if not largest <= LARGEST_VALUE:  # also when it is NaN
        return Refusal("rows", f"hidden rows reach {largest:g}, at most {LARGEST_VALUE:g} is sane")
    first = 0 if train_on_prompts else max(trace.prompt_length - 1, 0)
    positions = torch.from_numpy(features.positions).long()
    taught = _rows_with_loss(positions, first, trace.token_ids.size)
    pieces = [
        piece
        for piece in cut(trace.token_ids.size, first, max_sequence)
        if bool(((taught >= piece.loss_from) & (taught < piece.stop - 1)).any())
    ]
    if not pieces:
        return Refusal("short", "no two captured rows in a row are followed by a generated token")
    return Sample(
        key_of(trace),
        torch.from_numpy(trace.token_ids).long(),
        positions,
        rows,
        scale,
        tuple(pieces),
        taught.numel(),
        trace.sampling.temperature,
        max((r.version for r in trace.rounds), default=None),
    )


def _misfit(trace: Trace, features: FeatureRows, expected: Expected) -> Refusal | None:
    if trace.target_fingerprint != expected.target_fingerprint:
        ours, theirs = expected.target_fingerprint[:12], trace.target_fingerprint[:12]
        return Refusal("target", f"rows of target {theirs}, this trainer learns for {ours}")
    if features.layer_ids != expected.layer_ids:
        return Refusal(
            "layers", f"layers {features.layer_ids} tapped, expected {expected.layer_ids}"
        )
    if features.rows.shape[2] != expected.hidden_size:
        width = features.rows.shape[2]
        return Refusal("shape", f"rows are {width} wide, expected {expected.hidden_size}")
    largest = int(trace.token_ids.max())
    if largest >= expected.vocab_size:
        return Refusal("vocabulary", f"token {largest} is not below {expected.vocab_size}")
    return None


def _rows_with_loss(positions_N: Tensor, first: int, num_tokens: int) -> Tensor:
    """Positions whose row can be trained: known, as is the one before, and a token follows."""
    follows = torch.diff(positions_N, prepend=positions_N[:1] - 2) == 1
    return positions_N[follows & (positions_N >= first) & (positions_N + 1 < num_tokens)]


def cut(num_tokens: int, first_loss: int, max_sequence: int) -> tuple[Piece, ...]:
    """Pieces whose rows with a loss are each row of first_loss .. num_tokens - 2 exactly once.

    Every piece carries at least a quarter of ``max_sequence`` as context, where there is as much
    before it: a row early in a piece would else see less than it will when serving.
    """
    pieces = []
    row = first_loss
    while row < num_tokens - 1:
        start = max(0, min(row - max_sequence // 4, num_tokens - max_sequence))
        stop = min(num_tokens, start + max_sequence)
        pieces.append(Piece(start, stop, row))
        row = stop - 1  # its next token is in the next piece
    return tuple(pieces)


def collate(parts: Sequence[tuple[Sample, Piece]]) -> TTTBatch:
    """Pad pieces to the longest, as float32 on the CPU."""
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
    """Write one piece into row ``b`` of a batch that is being built."""
    length = piece.stop - piece.start
    batch.token_ids_BS[b, :length] = sample.token_ids_T[piece.start : piece.stop]
    batch.positions_BS[b] = torch.arange(batch.positions_BS.shape[1]) + piece.start
    inside = (sample.positions_N >= piece.start) & (sample.positions_N < piece.stop)
    place = sample.positions_N[inside] - piece.start
    scale = None if sample.scale is None else sample.scale[inside]
    rows = _widen(sample.rows[inside], scale)
    batch.features_BSF[b, place] = rows[:, :-1].flatten(1)
    batch.last_hidden_BSH[b, place] = rows[:, -1]
    batch.known_BS[b, place] = True
    batch.loss_BS[b, place] = (place >= piece.loss_from - piece.start) & (place + 1 < length)


def _widen(rows: Tensor, scale: Tensor | None) -> Tensor:
    """Packed rows -> float32."""
    wide = rows.float()
    return wide if scale is None else wide * scale[..., None]
