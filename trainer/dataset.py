"""Turn traces into training samples.

A trace that does not fit the target is refused with a reason and never reaches a batch. What can be
said of a trace alone, such as that its rows are finite, the decoder has checked.

Shapes: N captured rows of a trace.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
import torch
from numpy.typing import NDArray

from buffer.deletions import Owner
from buffer.records import Count, FeatureRows, Real, Rounds, Trace
from drafters.samples import Piece, Sample, Steps
from policies.draws.surprise import surprise_of
from policies.outcomes import Drafted, outcomes_of
from policies.preference import row_weights

RefusalReason = Literal["no_features", "target", "layers", "shape", "vocabulary", "short"]
REFUSAL_REASONS: tuple[RefusalReason, ...] = get_args(RefusalReason)

ROW_TYPES = {
    "bfloat16": torch.bfloat16,
    "float8_e4m3fn": torch.float8_e4m3fn,
    "float32": torch.float32,
}


@dataclass(frozen=True, slots=True)
class Emphasis:
    """Weight of the rows at which drafts were rejected."""

    kind: str
    """Kind of the drafter in training; drafts of others do not count."""
    rejected_weight: float
    """See ``policies.preference``."""


@dataclass(frozen=True, slots=True)
class Expected:
    """Target and tapped layers that a trace must come from."""

    target_fingerprint: str
    layer_ids: tuple[int, ...]
    """Layers that the drafter reads. Traces may hold further ones, for other drafters."""
    hidden_size: int
    vocab_size: int
    emphasis: Emphasis | None = None
    """Rows that weigh more than others; ``None``: all the same."""
    surprised: str | None = None
    """Kind of the drafter whose rejected drafts make a trace surprising; ``None``: nobody asks."""
    counted: str | None = None
    """Kind of the drafter whose steps are counted, see ``Sample.steps``; ``None``: nobody asks."""
    rewarded: str | None = None
    """Kind of the drafter whose draft tokens are rewarded, see ``Sample.outcome_T3``; ``None``:
    nobody asks."""
    is_alone: bool = True
    """No other drafter of the run learns, so that versions are this one's whatever drafted."""


@dataclass(frozen=True, slots=True)
class Refusal:
    """Reason why a trace is not trained on."""

    reason: RefusalReason
    text: str


def key_of(trace: Trace) -> str:
    """Unique name of a trace."""
    return name_of(trace.producer, trace.epoch, trace.seq)


def name_of(producer: str, epoch: int, seq: int) -> str:
    """See ``key_of``."""
    return f"{producer}/{epoch}/{seq}"


def triple_of(key: str) -> tuple[str, int, int]:
    """Producer, epoch and sequence number of a trace's name."""
    producer, epoch, seq = key.rsplit("/", 2)
    return producer, int(epoch), int(seq)


def sample_of(
    trace: Trace, expected: Expected, max_sequence: int, train_on_prompts: bool = False
) -> Sample | Refusal:
    """Check a trace and cut it into pieces.

    Args:
        trace: decoded by ``buffer.codec``, which checks that it is consistent.
        expected: target and layers of this run.
        max_sequence: maximum number of positions in a piece.
        train_on_prompts: also train on rows whose next token is part of the prompt.
    """
    features = trace.features
    if features is None or features.positions.size == 0:
        return Refusal("no_features", "no hidden rows were captured")
    refusal = _misfit(trace, features, expected)
    if refusal is not None:
        return refusal
    first = 0 if train_on_prompts else max(trace.prompt_length - 1, 0)
    trained = _rows_with_loss(features.positions, first, trace.token_ids.size)
    pieces = tuple(
        piece
        for piece in cut(trace.token_ids.size, first, max_sequence)
        if _num_below(trained, piece.loss_from) < _num_below(trained, piece.stop - 1)
    )
    if not pieces:
        return Refusal("short", "no two captured rows in a row are followed by a generated token")
    rows = torch.from_numpy(features.rows).view(ROW_TYPES[features.dtype])
    scale = None if features.scale is None else torch.from_numpy(features.scale)
    if features.layer_ids != expected.layer_ids:
        own = [*map(features.layer_ids.index, expected.layer_ids), len(features.layer_ids)]
        rows = rows[:, own]
        scale = None if scale is None else scale[:, own]
    return Sample(
        key_of(trace),
        torch.from_numpy(trace.token_ids.astype(np.int64)),
        torch.from_numpy(features.positions.astype(np.int64)),
        rows,
        scale,
        pieces,
        trained.size,
        trace.sampling,
        _version(trace.rounds, expected),
        _weights(trace, expected.emphasis),
        trace.domain,
        None if expected.surprised is None else surprise_of(trace.rounds, expected.surprised),
        Owner(trace.tenant, trace.finished_unix_ms),
        None if expected.counted is None else _steps(trace.rounds, expected.counted),
        None if expected.rewarded is None else _outcomes(trace, expected.rewarded),
    )


def _outcomes(trace: Trace, kind: str) -> torch.Tensor:
    """``Sample.outcome_T3``."""
    own = (one for one in trace.rounds if one.drafter == kind)
    drafted = (Drafted(x.anchor, x.draft_ids, x.num_accepted, x.q_logp) for x in own)
    found = outcomes_of(trace.token_ids.size, drafted)
    columns = found.depth_T, found.rejected_T, found.q_logp_T.view(np.int32)
    return torch.from_numpy(np.stack(columns, axis=1))


def _version(rounds: Rounds, expected: Expected) -> int | None:
    """Newest version of the drafter in training that served the request; ``None`` if none did."""
    versions_R = rounds.counts[Count.VERSION]
    if not expected.is_alone:
        kind, drafters = expected.counted, rounds.drafters
        index = drafters.index(kind) if kind in drafters else -1
        versions_R = versions_R[rounds.counts[Count.DRAFTER] == index]
    return int(versions_R.max()) if versions_R.size else None


def _steps(rounds: Rounds, kind: str) -> Steps:
    counts, drafters = rounds.counts, rounds.drafters
    index = drafters.index(kind) if kind in drafters else -1
    return Steps(
        batch_R=counts[Count.BATCH],
        draft_k_R=counts[Count.DRAFT_K],
        num_drafted_R=counts[Count.NUM_DRAFTED],
        num_accepted_R=counts[Count.NUM_ACCEPTED],
        version_R=counts[Count.VERSION],
        is_own_R=(counts[Count.DRAFTER] == index) & (counts[Count.DRAFT_K] > 0),
        step_s_R=rounds.reals[Real.STEP_S],
    )


def _weights(trace: Trace, emphasis: Emphasis | None) -> torch.Tensor | None:
    """``Sample.weight_T``."""
    if emphasis is None:
        return None
    own = (one for one in trace.rounds if one.drafter == emphasis.kind)
    rounds = [(one.anchor, len(one.draft_ids), one.num_accepted) for one in own]
    return torch.from_numpy(row_weights(trace.token_ids.size, rounds, emphasis.rejected_weight))


def _misfit(trace: Trace, features: FeatureRows, expected: Expected) -> Refusal | None:
    if trace.target_fingerprint != expected.target_fingerprint:
        ours, theirs = expected.target_fingerprint[:12], trace.target_fingerprint[:12]
        return Refusal("target", f"rows of target {theirs}, this trainer learns for {ours}")
    if not set(expected.layer_ids) <= set(features.layer_ids):
        return Refusal(
            "layers", f"layers {features.layer_ids} tapped, expected {expected.layer_ids}"
        )
    if features.rows.shape[2] != expected.hidden_size:
        width = features.rows.shape[2]
        return Refusal("shape", f"rows are {width} wide, expected {expected.hidden_size}")
    rounds = trace.rounds
    largest = max(
        int(ids.max())
        for ids in (trace.token_ids, rounds.draft_ids, rounds.counts[Count.NEXT_ID])
        if ids.size
    )
    if largest >= expected.vocab_size:
        return Refusal("vocabulary", f"token {largest} is not below {expected.vocab_size}")
    return None


def _rows_with_loss(
    positions_N: NDArray[np.int32], first: int, num_tokens: int
) -> NDArray[np.int32]:
    """Positions of rows to train on, ascending: captured, like the preceding row, and with a next
    token."""
    follows: NDArray[np.int32] = positions_N[1:][positions_N[1:] - positions_N[:-1] == 1]
    return follows[_num_below(follows, first) : _num_below(follows, num_tokens - 1)]


def _num_below(ascending: NDArray[np.int32], bound: int) -> int:
    return int(ascending.searchsorted(bound))


def cut(num_tokens: int, first_loss: int, max_sequence: int) -> tuple[Piece, ...]:
    """Cut a trace into pieces that train each row of first_loss .. num_tokens - 2 exactly once.

    If the trace is long enough, a quarter of ``max_sequence`` or more of each piece is context:
    without it, early rows of a piece would see less than they do when serving.
    """
    pieces = []
    row = first_loss
    while row < num_tokens - 1:
        start = max(0, min(row - max_sequence // 4, num_tokens - max_sequence))
        stop = min(num_tokens, start + max_sequence)
        pieces.append(Piece(start, stop, row))
        row = stop - 1  # its next token is in the next piece
    return tuple(pieces)
