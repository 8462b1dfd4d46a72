"""Gathering a round's lanes and committing to them, one launch each; see ``specops.lanes``.

Shapes: L lanes, R requests of a round, F integer fields, P pages of a lane, K draft tokens,
Q = K + 1.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from specops.lanes import ClosedRound, Column, Field, Input, LaneState, OpenedRound, most_drafts
from specops.overlap_triton import wait_for_previous
from specops.verify_logits import LogitVerdict, Rule

_PAGES = 1024  # copied by one program

_LENGTH = tl.constexpr(int(Field.LENGTH))
_NONCE = tl.constexpr(int(Field.NONCE))
_ANCHOR = tl.constexpr(int(Field.ANCHOR))
_LIMIT = tl.constexpr(int(Field.LIMIT))
_CAP = tl.constexpr(int(Field.CAP))
_BY_MATCH = tl.constexpr(int(Field.BY_MATCH))
_CAPTURES = tl.constexpr(int(Field.CAPTURES))
_GIVEN = tl.constexpr(int(Input.DRAFTED))
_GIVEN_TOKENS = tl.constexpr(int(Input.TOKENS))
_MATCH = tl.constexpr(int(Rule.MATCH))
_ACCEPTED = tl.constexpr(int(Column.ACCEPTED))
_NEXT = tl.constexpr(int(Column.NEXT))
_DRAFTED = tl.constexpr(int(Column.DRAFTED))
_CAPTURED = tl.constexpr(int(Column.CAPTURED))
_TOKENS = tl.constexpr(int(Column.TOKENS))


def _places(num_query: int) -> int:
    """Q rounded up; the same up to 32 rows, so that they share one compiled kernel."""
    return max(32, int(triton.next_power_of_2(num_query)))


@triton.jit(
    do_not_specialize=[
        "inputs_stride", "num_lanes", "num_pages", "page_size", "num_requests", "num_query", "rule",
    ],
    do_not_specialize_on_alignment=["inputs_ptr"],
)  # fmt: skip
def _open_round(
    inputs_ptr, inputs_stride, ints_ptr, floats_ptr, pages_ptr,
    out_lanes_ptr, out_ints_ptr, out_floats_ptr, out_pages_ptr, by_match_ptr, rules_ptr, nonces_ptr,
    lens_ptr, anchor_at_ptr, draft_at_ptr, draft_positions_ptr, positions_ptr, slots_ptr, block_ptr,
    given_ptr, num_lanes, num_pages, page_size, num_requests, num_query, rule,
    NUM_FIELDS: tl.constexpr, FIELDS_UP: tl.constexpr, NUM_REALS: tl.constexpr,
    REALS_UP: tl.constexpr, QUERY_UP: tl.constexpr, PAGES: tl.constexpr, IS_GIVEN: tl.constexpr,
):  # fmt: skip
    """Gather some pages of one request; the program of the first pages gathers everything else."""
    request, piece = tl.program_id(0).to(tl.int64), tl.program_id(1)
    given_row = inputs_ptr + request * inputs_stride
    lane = tl.load(given_row)
    page = piece * PAGES + tl.arange(0, PAGES)
    own_pages = pages_ptr + lane * num_pages
    held = tl.load(own_pages + page, mask=page < num_pages, other=0)
    tl.store(out_pages_ptr + request * num_pages + page, held, mask=page < num_pages)
    if piece > 0:
        return
    field = tl.arange(0, FIELDS_UP)
    values = tl.load(ints_ptr + field * num_lanes + lane, mask=field < NUM_FIELDS, other=0)
    tl.store(out_ints_ptr + field * num_requests + request, values, mask=field < NUM_FIELDS)
    real = tl.arange(0, REALS_UP)
    values = tl.load(floats_ptr + real * num_lanes + lane, mask=real < NUM_REALS, other=0.0)
    tl.store(out_floats_ptr + real * num_requests + request, values, mask=real < NUM_REALS)
    length = tl.load(ints_ptr + _LENGTH * num_lanes + lane)
    by_match = tl.load(ints_ptr + _BY_MATCH * num_lanes + lane) != 0
    nonce = tl.load(ints_ptr + _NONCE * num_lanes + lane) + 1
    tl.store(out_lanes_ptr + request, lane.to(tl.int32))
    tl.store(by_match_ptr + request, by_match)
    tl.store(rules_ptr + request, tl.where(by_match, _MATCH, rule).to(tl.int64))
    tl.store(nonces_ptr + request, tl.where(by_match, 0, nonce))
    tl.store(anchor_at_ptr + request, (length - 1).to(tl.int32))
    tl.store(draft_at_ptr + request, length.to(tl.int32))
    left = tl.load(ints_ptr + _LIMIT * num_lanes + lane) - length - 1
    num_drafted = tl.minimum(tl.load(ints_ptr + _CAP * num_lanes + lane), left)
    num_drafted = tl.minimum(tl.maximum(num_drafted, 0), num_query - 1)
    place = tl.arange(0, QUERY_UP)
    is_row = place < num_query
    is_draft = is_row & (place > 0)
    token = tl.load(ints_ptr + _ANCHOR * num_lanes + lane) + tl.zeros([QUERY_UP], tl.int64)
    row = request * num_query + place
    if IS_GIVEN:
        num_drafted = tl.minimum(num_drafted, tl.load(given_row + _GIVEN))
        given = tl.load(given_row + _GIVEN_TOKENS - 1 + place, mask=is_draft, other=0)
        tl.store(given_ptr + row - request - 1, given, mask=is_draft)  # rows of K, not of Q
        token = tl.where(is_draft, given, token)
        tl.store(block_ptr + row, token, mask=is_row)
    else:
        tl.store(block_ptr + row, token, mask=place == 0)
    tl.store(lens_ptr + request, num_drafted)
    is_position = place < tl.maximum(num_query - 1, 1)
    tl.store(draft_positions_ptr + place * num_requests + request, length + place, mask=is_position)
    position = length - 1 + place
    index = tl.maximum(position, 0)
    page = index // page_size
    is_held = is_row & (position >= 0) & (page < num_pages)
    slot = tl.load(own_pages + page, mask=is_held, other=0).to(tl.int64) * page_size
    slot = tl.where(is_held, slot + index % page_size, 0)
    tl.store(positions_ptr + row, tl.where(position >= 0, position, -1), mask=is_row)
    tl.store(slots_ptr + row, slot, mask=is_row)


def open_round(
    state: LaneState,
    inputs_RI: Tensor,
    num_draft: int,
    page_size: int,
    rule: Rule,
    *,
    is_given: bool,
) -> OpenedRound:
    """See ``specops.lanes.open_round``, which has the same arguments and result. Can be captured in
    a CUDA graph.

    Raises:
        ValueError: the state, or a row of the inputs, has the wrong dtype or is not contiguous.
    """
    _check_state(state)
    _check_rows("inputs", inputs_RI)
    num_requests, num_query, device = len(inputs_RI), num_draft + 1, inputs_RI.device
    num_fields, num_lanes = state.ints_FL.shape
    num_reals, num_pages = len(state.floats_3L), state.pages_LP.shape[1]

    def empty(*shape: int, dtype: torch.dtype = torch.int64) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=device)

    opened = OpenedRound(
        lanes_R=empty(num_requests, dtype=torch.int32),
        ints_FR=empty(num_fields, num_requests),
        floats_3R=empty(num_reals, num_requests, dtype=torch.float32),
        pages_RP=empty(num_requests, num_pages, dtype=torch.int32),
        by_match_R=empty(num_requests, dtype=torch.bool),
        rules_R=empty(num_requests),
        nonces_R=empty(num_requests),
        lens_R=empty(num_requests),
        anchor_at_R=empty(num_requests, dtype=torch.int32),
        draft_at_R=empty(num_requests, dtype=torch.int32),
        draft_positions_KR=empty(max(num_draft, 1), num_requests),
        positions_T=empty(num_requests * num_query),
        slots_T=empty(num_requests * num_query),
        block_RQ=empty(num_requests, num_query),
        given_RK=empty(num_requests, num_draft) if is_given else None,
    )
    _open_round[(num_requests, triton.cdiv(num_pages, _PAGES))](
        inputs_RI, inputs_RI.stride(0), state.ints_FL, state.floats_3L, state.pages_LP,
        opened.lanes_R, opened.ints_FR, opened.floats_3R, opened.pages_RP, opened.by_match_R,
        opened.rules_R, opened.nonces_R, opened.lens_R, opened.anchor_at_R, opened.draft_at_R,
        opened.draft_positions_KR, opened.positions_T, opened.slots_T, opened.block_RQ,
        opened.given_RK, num_lanes, num_pages, page_size, num_requests, num_query, int(rule),
        NUM_FIELDS=num_fields, FIELDS_UP=int(triton.next_power_of_2(num_fields)),
        NUM_REALS=num_reals, REALS_UP=int(triton.next_power_of_2(num_reals)),
        QUERY_UP=_places(num_query), PAGES=_PAGES, IS_GIVEN=is_given, num_warps=4,
    )  # fmt: skip
    return opened


def _check_rows(name: str, rows: Tensor) -> None:
    """Refuse a matrix whose rows are not int64, or whose rows' elements are not adjacent. The
    stride of a single column means nothing, and torch leaves any value there."""
    is_adjacent = rows.shape[1] < 2 or rows.stride(1) == 1
    if rows.dtype != torch.int64 or not is_adjacent:
        raise ValueError(
            f"{name} must be rows of adjacent int64, got {rows.dtype} of strides {rows.stride()}"
        )


def _check_state(state: LaneState) -> None:
    for name, tensor, dtype in (
        ("ints", state.ints_FL, torch.int64),
        ("floats", state.floats_3L, torch.float32),
        ("pages", state.pages_LP, torch.int32),
    ):
        if tensor.dtype != dtype or not tensor.is_contiguous():
            raise ValueError(f"{name} must be contiguous {dtype}, got {tensor.dtype}")
    if (texts := state.texts_LN) is not None and texts.dtype != torch.int32:
        raise ValueError(f"texts must be rows of int32, got {texts.dtype}")
    assert len(state.ints_FL) >= len(Field) and len(state.floats_3L) >= 3


@triton.jit
def _store_bits(out_ptr, reals_ptr, place, is_draft):
    reals = tl.load(reals_ptr + place, mask=is_draft, other=0.0).to(tl.float64)
    tl.store(out_ptr + place, reals.to(tl.int64, bitcast=True), mask=is_draft)


@triton.jit(
    do_not_specialize=[
        "draft_stride", "outputs_stride", "texts_stride", "most_drafts", "num_lanes",
        "num_requests", "num_draft",
    ],
    do_not_specialize_on_alignment=["draft_ptr"],
)  # fmt: skip
def _close_round(
    ints_ptr, lanes_ptr, fields_ptr, lens_ptr, draft_ptr, draft_stride, best_ptr,
    accepted_ptr, following_ptr, logp_ptr, logq_ptr, outputs_ptr, outputs_stride,
    emitted_ptr, next_ptr, count_ptr, captured_ptr, anchor_row_ptr, texts_ptr, texts_stride,
    most_drafts, num_lanes, num_requests, num_draft,
    QUERY_UP: tl.constexpr, BY_BEST: tl.constexpr, HAS_LOGQ: tl.constexpr, HAS_TEXTS: tl.constexpr,
    OVERLAP: tl.constexpr,
):  # fmt: skip
    """Commit one request's round."""
    if OVERLAP:
        wait_for_previous()
    request = tl.program_id(0).to(tl.int64)
    place = tl.arange(0, QUERY_UP)
    is_draft = place < num_draft
    is_row = place <= num_draft
    row = request * (num_draft + 1) + place
    lane = tl.load(lanes_ptr + request)
    num_drafted = tl.load(lens_ptr + request)
    token = tl.load(draft_ptr + request * draft_stride + place, mask=is_draft, other=0)
    if BY_BEST:
        best = tl.load(best_ptr + row, mask=is_row, other=0)
        is_lost = (place < num_drafted) & (token != best)
        accepted = tl.min(tl.where(is_lost, place.to(tl.int64), num_drafted), axis=0)
        following = tl.sum(tl.where(place == accepted, best, 0), axis=0)
    else:
        accepted = tl.load(accepted_ptr + request)
        following = tl.load(following_ptr + request)
    found = following
    following = tl.maximum(found, 0)
    emitted = tl.where(place < accepted, token, following)
    length = tl.load(fields_ptr + _LENGTH * num_requests + request)
    nonce = tl.load(fields_ptr + _NONCE * num_requests + request)
    anchor = tl.load(fields_ptr + _ANCHOR * num_requests + request)
    limit = tl.load(fields_ptr + _LIMIT * num_requests + request)
    captures = tl.load(fields_ptr + _CAPTURES * num_requests + request)
    count = tl.minimum(accepted + 1, limit - length)
    last = tl.sum(tl.where(place == count - 1, emitted, 0), axis=0)
    own = ints_ptr + lane.to(tl.int64)
    tl.store(own + _LENGTH * num_lanes, length + count)
    tl.store(own + _NONCE * num_lanes, nonce + 1)
    tl.store(own + _ANCHOR * num_lanes, tl.where(count > 0, last, anchor))
    if HAS_TEXTS:
        text = texts_ptr + lane.to(tl.int64) * texts_stride + length
        tl.store(text + place, emitted.to(tl.int32), mask=place < count)
    captured = count * captures
    tl.store(emitted_ptr + row, emitted, mask=is_row)
    tl.store(next_ptr + request, following)
    tl.store(count_ptr + request, count)
    tl.store(captured_ptr + request, captured.to(tl.int32))
    tl.store(anchor_row_ptr + request, request * (num_draft + 1) + accepted)
    output = outputs_ptr + request * outputs_stride
    tl.store(output + _ACCEPTED, accepted)
    tl.store(output + _NEXT, found)
    tl.store(output + _DRAFTED, num_drafted)
    tl.store(output + _CAPTURED, captured)
    tl.store(output + _TOKENS + place, token, mask=is_draft)
    if not BY_BEST:
        reals = output + _TOKENS + most_drafts
        _store_bits(reals, logp_ptr + request * num_draft, place, is_draft)
    if HAS_LOGQ:
        reals = output + _TOKENS + 2 * most_drafts
        _store_bits(reals, logq_ptr + request * num_draft, place, is_draft)


def close_round(
    state: LaneState,
    opened: OpenedRound,
    draft_RK: Tensor,
    verdict: LogitVerdict | Tensor,
    logq_RK: Tensor | None,
    outputs_RC: Tensor,
    *,
    overlap: bool = False,
) -> ClosedRound:
    """See ``specops.lanes.close_round``, which has the same arguments and result. Can be captured
    in a CUDA graph.

    Args:
        overlap: start while the previous kernel still runs (``specops.overlap_triton``).

    Raises:
        ValueError: a tensor has the wrong dtype or is not contiguous; only the rows of drafts and
            outputs need not be adjacent.
    """
    _check_state(state)
    texts = state.texts_LN
    num_requests, num_draft = draft_RK.shape
    num_query = num_draft + 1
    best = accepted = following = logp = None
    if isinstance(verdict, Tensor):
        best = verdict
    else:
        accepted, following, logp = verdict.num_accepted_R, verdict.next_R, verdict.draft_logp_RK
    for tensor, dtype in (
        (best, torch.int64), (accepted, torch.int64), (following, torch.int64),
        (logp, torch.float32), (logq_RK, torch.float32),
    ):  # fmt: skip
        if tensor is not None and not (tensor.dtype == dtype and tensor.is_contiguous()):
            raise ValueError(f"a verdict must be contiguous {dtype}, got {tensor.dtype}")
    for name, rows in (("drafts", draft_RK), ("outputs", outputs_RC)):
        _check_rows(name, rows)

    def empty(*shape: int, dtype: torch.dtype = torch.int64) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=draft_RK.device)

    closed = ClosedRound(
        emitted_RQ=empty(num_requests, num_query),
        next_R=empty(num_requests),
        count_R=empty(num_requests),
        captured_R=empty(num_requests, dtype=torch.int32),
        anchor_row_R=empty(num_requests),
    )
    _close_round[(num_requests,)](
        state.ints_FL, opened.lanes_R, opened.ints_FR, opened.lens_R, draft_RK, draft_RK.stride(0),
        best, accepted, following, logp, logq_RK, outputs_RC, outputs_RC.stride(0),
        closed.emitted_RQ, closed.next_R, closed.count_R, closed.captured_R, closed.anchor_row_R,
        texts, 0 if texts is None else texts.stride(0),
        most_drafts(outputs_RC), state.ints_FL.shape[1], num_requests, num_draft,
        QUERY_UP=_places(num_query), BY_BEST=best is not None, HAS_LOGQ=logq_RK is not None,
        HAS_TEXTS=texts is not None, OVERLAP=overlap, num_warps=1, launch_pdl=overlap,
    )  # fmt: skip
    return closed
