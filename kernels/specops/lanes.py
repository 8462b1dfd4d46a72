"""Per-round bookkeeping: gathering the lanes' state for a round, and committing the verified tokens
to the lanes. The torch definitions.

A lane is the state of one request in flight on the device. A round opens by gathering its lanes and
closes by committing to them; each is one launch in ``lanes_triton``.

Shapes: L lanes, R requests of a round, F integer fields, P pages of a lane, N positions of its
text, K draft tokens, Q = K + 1, T = R * Q rows of the target's pass.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum

import torch
from torch import Tensor

from specops.attention import DecodePass, decode_slots
from specops.rng import Numbering
from specops.sampling import SamplingRows
from specops.verify import verify_match
from specops.verify_logits import LogitVerdict, Rule


class Field(IntEnum):
    """Integer fields of a lane. Those before LIMIT change every round."""

    LENGTH = 0
    """Number of committed tokens, including the anchor."""
    NONCE = 1
    """Number of rounds so far."""
    ANCHOR = 2
    """The last committed token."""
    LIMIT = 3
    """Length at which the request ends."""
    CAP = 4
    """Maximum draft length of the request."""
    KEY = 5
    """Key of the request's random numbers, 64 bits as a signed integer."""
    BY_MATCH = 6
    """1 for a greedy or seeded request, verified by ``match``, else 0."""
    TOP_K = 7
    CAPTURES = 8
    """1 for a request whose rows are captured, else 0."""
    BIASES = 9
    """Number of the request's biases; see ``specops.lane_penalties``."""
    PENALIZES = 10
    """1 for a request with penalties, else 0."""
    SPACE = 11
    """Number of the request's namespace, for drafts from text of other requests."""


class Column(IntEnum):
    """Integers of a round's outcome, one row per request. The draft tokens are followed by the bits
    of their log p and then of their log q, float64, each as wide as the longest draft."""

    ACCEPTED = 0
    NEXT = 1
    """The target's own token, or ``UNSOUND``."""
    DRAFTED = 2
    CAPTURED = 3
    """Number of rows for the capture ring."""
    PICKED = 4
    """Number of the drafter whose draft was taken, where the device has picked; else meaningless,
    and not written when the round is closed."""
    JUDGED = 5
    """Places of text alone that the round decides, and in the next column those at which it would
    have been kept, where the device has picked; likewise."""
    TOKENS = 7
    """The first draft token."""


class Input(IntEnum):
    """Integers that the host passes to a round, one row per request."""

    LANE = 0
    DRAFTED = 1
    """Number of draft tokens that the host provides."""
    PICKED = 2
    """Number of the drafter whose draft is taken, if there are several."""
    TOKENS = 3
    """The first of these tokens."""


@dataclass(frozen=True, slots=True)
class LaneState:
    """The state of all lanes on the device."""

    ints_FL: Tensor
    """[at least F, L] int64, see ``Field``; rounds commit to it in place. Rows after those of
    ``Field`` are only gathered."""
    floats_3L: Tensor
    """[at least 3, L] float32: temperature, top-p, min-p. Rows after those are only
    gathered."""
    pages_LP: Tensor
    """[L, P] int32 page ids; 0 if the lane has none."""
    texts_LN: Tensor | None = None
    """[L, N] int32 tokens of each lane, to which rounds append what they commit; ``None``: nobody
    reads them on the device."""


@dataclass(frozen=True, slots=True)
class OpenedRound:
    """A round's view of its lanes. Each field is contiguous over the requests."""

    lanes_R: Tensor
    """[R] int32."""
    ints_FR: Tensor
    """[at least F, R] int64."""
    floats_3R: Tensor
    """[at least 3, R] float32."""
    pages_RP: Tensor
    """[R, P] int32."""
    by_match_R: Tensor
    """[R] bool."""
    rules_R: Tensor
    """[R] int64 of ``Rule``."""
    nonces_R: Tensor
    """[R] int64: constant for requests verified by ``match``, new in every round for others."""
    lens_R: Tensor
    """[R] int64 in 0..K: number of tokens that may be drafted, or that the host provided. The last
    token of a request is always the target's own."""
    anchor_at_R: Tensor
    """[R] int32 position of the anchor."""
    draft_at_R: Tensor
    """[R] int32 position of the first draft token."""
    draft_positions_KR: Tensor
    """[max(K, 1), R] int64 position of each draft token."""
    positions_T: Tensor
    """[T] int64 positions of the target's rows: the anchor's and the drafts'."""
    slots_T: Tensor
    """[T] int64 slots of these rows."""
    block_RQ: Tensor
    """[R, Q] int64 tokens of these rows; only the anchor is set if a drafter is to draft."""
    given_RK: Tensor | None
    """[R, K] int64 draft tokens provided by the host; ``None``: a drafter is to draft."""

    def sampling(self) -> SamplingRows:
        """The requests' sampling parameters; truncation is assumed, as the host does not know."""
        temperature_R, top_p_R, min_p_R = self.floats_3R[:3].unbind()
        return SamplingRows(
            temperature_R, self.ints_FR[Field.TOP_K], top_p_R, min_p_R,
            truncates=True,
        )  # fmt: skip

    def numbering(self, number: int = 0) -> Numbering:
        """Random numbers from draft token ``number`` on."""
        keys_R, positions_R = self.ints_FR[Field.KEY], self.draft_positions_KR[number]
        return Numbering(keys_R, self.nonces_R, positions_R)


@dataclass(frozen=True, slots=True)
class ClosedRound:
    """What a round decided."""

    emitted_RQ: Tensor
    """[R, Q] int64: kept draft tokens, then the target's own token, repeated; 0 in place of
    ``UNSOUND``, because the lane goes on until the host knows."""
    next_R: Tensor
    """[R] int64, the target's own token after the kept ones; 0 in place of ``UNSOUND``."""
    count_R: Tensor
    """[R] int64 number of emitted tokens committed; fewer if the request has ended."""
    captured_R: Tensor
    """[R] int32 number of rows for the capture ring."""
    anchor_row_R: Tensor
    """[R] int64 index among the T rows of the last kept token. A drafter that computed one row per
    target row, shifted by one, has its output at the new anchor there."""


def open_round(
    state: LaneState,
    inputs_RI: Tensor,
    num_draft: int,
    page_size: int,
    rule: Rule,
    *,
    is_given: bool,
) -> OpenedRound:
    """Gather the lanes of a round. The definition.

    Args:
        inputs_RI: [R, at least 3 + K] int64, see ``Input``; rows need not be adjacent.
        num_draft: K.
        page_size: tokens per page.
        rule: verification rule of requests not verified by ``match``.
        is_given: the inputs hold the draft tokens.
    """
    lanes_R = inputs_RI[:, Input.LANE]
    ints_FR = state.ints_FL.index_select(1, lanes_R)
    pages_RP = state.pages_LP.index_select(0, lanes_R)
    length_R = ints_FR[Field.LENGTH]
    by_match_R = ints_FR[Field.BY_MATCH] != 0
    number_K = torch.arange(max(num_draft, 1), device=lanes_R.device)
    left_R = ints_FR[Field.LIMIT] - length_R - 1
    lens_R = torch.minimum(ints_FR[Field.CAP], left_R).clamp(min=0, max=num_draft)
    given_RK = None
    block_RQ = ints_FR[Field.ANCHOR][:, None].repeat(1, num_draft + 1)
    if is_given:
        lens_R = torch.minimum(lens_R, inputs_RI[:, Input.DRAFTED])
        given_RK = inputs_RI[:, Input.TOKENS : Input.TOKENS + num_draft].contiguous()
        block_RQ[:, 1:] = given_RK
    here = DecodePass(pages_RP, (length_R - 1).int(), page_size)
    return OpenedRound(
        lanes_R=lanes_R.int(),
        ints_FR=ints_FR,
        floats_3R=state.floats_3L.index_select(1, lanes_R),
        pages_RP=pages_RP,
        by_match_R=by_match_R,
        rules_R=torch.where(by_match_R, int(Rule.MATCH), int(rule)),
        nonces_R=torch.where(by_match_R, 0, ints_FR[Field.NONCE] + 1),
        lens_R=lens_R,
        anchor_at_R=here.first_R,
        draft_at_R=length_R.int(),
        draft_positions_KR=length_R + number_K[:, None],
        positions_T=here.positions(num_draft + 1).flatten(),
        slots_T=decode_slots(here, num_draft + 1),
        block_RQ=block_RQ,
        given_RK=given_RK,
    )


def close_round(
    state: LaneState,
    opened: OpenedRound,
    draft_RK: Tensor,
    verdict: LogitVerdict | Tensor,
    logq_RK: Tensor | None,
    outputs_RC: Tensor,
) -> ClosedRound:
    """Commit a round to its lanes and write its outcome for the host. The definition.

    Args:
        state: its integers are updated in place.
        draft_RK: [R, K] int64.
        verdict: the outcome of verifying the draft; or, if all requests are greedy, the target's
            best ids [R, Q] int64, which ``verify_match`` compares here.
        logq_RK: [R, K] float32 log q of the draft tokens; ``None`` if they were not sampled.
        outputs_RC: [R, 7 + 3 * the longest draft] int64, see ``Column``; columns beyond the draft
            are not written.
    """
    num_draft = draft_RK.shape[1]
    if isinstance(verdict, Tensor):
        accepted_R, found_R = verify_match(verdict, draft_RK, opened.lens_R)
        logp_RK = None
    else:
        accepted_R, found_R = verdict.num_accepted_R, verdict.next_R
        logp_RK = verdict.draft_logp_RK
    next_R = found_R.clamp(min=0)
    length_R = opened.ints_FR[Field.LENGTH]
    count_R = torch.minimum(accepted_R + 1, opened.ints_FR[Field.LIMIT] - length_R)
    place = torch.arange(num_draft + 1, device=draft_RK.device)
    padded = torch.nn.functional.pad(draft_RK, (0, 1))
    emitted_RQ = torch.where(place < accepted_R[:, None], padded, next_R[:, None])
    tokens = torch.cat((opened.ints_FR[Field.ANCHOR][:, None], emitted_RQ), dim=1)
    anchor_R = tokens.gather(1, count_R[:, None])[:, 0]
    changed = torch.stack((length_R + count_R, opened.ints_FR[Field.NONCE] + 1, anchor_R))
    lanes_R = opened.lanes_R.long()
    state.ints_FL[: Field.LIMIT].index_copy_(1, lanes_R, changed)
    if state.texts_LN is not None:
        committed_RQ = place < count_R[:, None]
        at_RQ = (length_R[:, None] + place)[committed_RQ]
        of_RQ = lanes_R[:, None].expand_as(committed_RQ)[committed_RQ]
        state.texts_LN[of_RQ, at_RQ] = emitted_RQ[committed_RQ].int()
    captured_R = count_R * opened.ints_FR[Field.CAPTURES]
    decided = torch.stack((accepted_R, found_R, opened.lens_R, captured_R), dim=1)
    outputs_RC[:, : Column.PICKED] = decided
    outputs_RC[:, Column.TOKENS : Column.TOKENS + num_draft] = draft_RK
    for block, reals in enumerate((logp_RK, logq_RK), start=1):
        if reals is not None and num_draft:
            start = Column.TOKENS + block * most_drafts(outputs_RC)
            outputs_RC[:, start : start + num_draft] = reals.double().view(torch.int64)
    request = torch.arange(len(draft_RK), device=draft_RK.device)
    anchor_row_R = request * (num_draft + 1) + accepted_R
    return ClosedRound(emitted_RQ, next_R, count_R, captured_R.int(), anchor_row_R)


def most_drafts(outputs_RC: Tensor) -> int:
    """The longest draft that fits a round's outputs."""
    return (outputs_RC.shape[1] - Column.TOKENS) // 3
