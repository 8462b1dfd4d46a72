"""Confidence in draft tokens, the lengths that drafts are cut to, and the rows of a verification
that is cut; see ``specops.allocation``.

``confidence`` reads each row of logits once: every lane of a program keeps the two largest logits
it has seen, the sum of ``exp(x)`` and that of ``x exp(x)``, both relative to its largest, and the
lanes are combined at the end. Rows of up to 32,768 logits take one launch; longer ones are split
into parts, which a second launch combines.

``cut_drafts`` is one launch, in which one program holds the positions of the whole batch: a thread
has a request and its positions, so survival is a product within a thread. The lowest survival that
a budget leaves is found by bisection over the bits of floats, which order numbers that are not
negative as the floats do; a second bisection over (position, request) shares what is left among
positions of this survival. Both end as soon as a count is right, usually after about half of 30
steps. Further programs of the launch note what the cut was decided by. A batch with more than 1,024
requests or 16,384 positions, counted in tiles, is cut by the definition.

``pack_rows`` is one launch with a program for each request, which adds up the lengths before it.

Shapes: R requests, K draft tokens, Q = K + 1, D draft vocabulary, F figures, C columns of what is
noted, T packed rows.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from specops import allocation
from specops.allocation import (
    ENTROPY,
    LEAST_TOP,
    MARGIN,
    NUM_FIGURES,
    NUM_HEAD_INPUTS,
    TOP,
    CutValues,
    HeadWeights,
    PackedRows,
    Score,
)

_SPAN = 2048
"""Logits that a program reads at once."""
_PART = 16
"""Spans of a part, at least: reading them takes about as long as the second launch."""
_MOST_PARTS = 16
_PROGRAMS = 264
"""Two on each of an H200's multiprocessors; more rows are not split."""

_BATCHES = (32, 256, 1024)
"""Requests that the programs of cuts are compiled for."""
_LEAST_DRAFT = 8
"""Drafts of up to this length share a program."""
_MOST_POSITIONS = 16_384
"""32 in each of 512 threads."""
_NOTED = 4
"""Numbers that a thread notes."""

_LEAST_PLACES = 32
"""Rows of a request that are written at once; a verification has at most 17."""
_SUMMED = 256
"""Lengths added, and rows of padding written, at once."""

_TOP, _ENTROPY, _MARGIN = tl.constexpr(TOP), tl.constexpr(ENTROPY), tl.constexpr(MARGIN)
_FIGURES, _INPUTS = tl.constexpr(NUM_FIGURES), tl.constexpr(NUM_HEAD_INPUTS)
_LEAST_TOP = tl.constexpr(LEAST_TOP)
_BY_COLUMN, _BY_ENTROPY, _BY_HEAD = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)
_CLOSED = tl.constexpr(-1)
_ABOVE_ALL = tl.constexpr(0x3F800002)
"""Two above the bits of 1.0, so that bisection comes across a number that no survival reaches."""
_FAR = tl.constexpr(1e30)
"""In place of larger distances, so that 0 times them is 0."""
_LARGEST = tl.constexpr(1e38)
"""In place of infinite logits, so that the distance of two is 0."""
_PER_REQUEST = ("offered_ptr", "temperature_ptr", "threshold_ptr", "budget_ptr", "gamma_ptr")
"""Fields of matrices, so their alignment depends on the batch size."""


# ---- confidence --------------------------------------------------------------------------------


@triton.jit
def _distance(x, y):
    return tl.minimum(tl.abs(x - y), _FAR)


@triton.jit
def _joined(tops, seconds, totals, slopes, SIZE: tl.constexpr):
    """The two largest logits of all lanes, and their sums relative to the largest."""
    lane = tl.arange(0, SIZE)
    top = tl.max(tops, axis=0)
    leader = tl.min(tl.where(tops == top, lane, SIZE), axis=0)
    second = tl.max(tl.where(lane == leader, seconds, tops), axis=0)
    distance = _distance(tops, top)
    shrink = tl.exp(-distance)
    total = tl.sum(totals * shrink, axis=0)
    slope = tl.sum(shrink * (slopes - totals * distance), axis=0)
    return top, second, total, slope


@triton.jit
def _store_figures(figures_ptr, top, second, total, slope, log_vocab):
    """The three figures of a row; a row whose largest logit is not finite has no confidence."""
    is_sound = tl.abs(top) < _LARGEST
    entropy = tl.maximum(tl.log(total) - slope / total, 0.0)
    lead = (1 - tl.exp(-_distance(top, second))) / total
    tl.store(figures_ptr + _TOP, tl.where(is_sound, 1 / total, 0.0))
    tl.store(figures_ptr + _ENTROPY, tl.where(is_sound, entropy, log_vocab))
    tl.store(figures_ptr + _MARGIN, tl.where(is_sound, lead, 0.0))


@triton.jit
def _load_logits(row_ptr, ids, vocab):
    """float32 within the largest numbers; NaN as the largest, because a maximum would skip it."""
    x = tl.load(row_ptr + ids, mask=ids < vocab, other=float("-inf")).to(tl.float32)
    x = tl.where(x != x, _LARGEST, x)
    return tl.maximum(tl.minimum(x, _LARGEST), -_LARGEST)


@triton.jit(do_not_specialize=["num_parts", "num_spans"])
def _confidence_of_part(
    logits_ptr, row_stride, parts_ptr, figures_ptr, vocab, num_parts, num_spans, log_vocab,
    SPAN: tl.constexpr, IS_WHOLE: tl.constexpr,
):  # fmt: skip
    """Process one part of a row, ``num_spans`` spans; a whole row is completed."""
    row, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    row_ptr = logits_ptr + row * row_stride
    start = part * num_spans * SPAN
    lane = tl.arange(0, SPAN)
    tops = _load_logits(row_ptr, start + lane, vocab)
    seconds = tl.full([SPAN], -_LARGEST, tl.float32)
    totals = tl.full([SPAN], 1.0, tl.float32)
    slopes = tl.full([SPAN], 0.0, tl.float32)
    end = tl.minimum(start + num_spans * SPAN, vocab)
    for first in tl.range(start + SPAN, end, SPAN, num_stages=3):
        x = _load_logits(row_ptr, first + lane, vocab)
        distance = _distance(x, tops)
        shrink = tl.exp(-distance)
        is_top = x > tops
        slopes = tl.where(is_top, shrink * (slopes - totals * distance), slopes - shrink * distance)
        totals = tl.where(is_top, totals * shrink + 1, totals + shrink)
        seconds = tl.maximum(seconds, tl.minimum(x, tops))
        tops = tl.maximum(tops, x)
    top, second, total, slope = _joined(tops, seconds, totals, slopes, SPAN)
    if IS_WHOLE:
        _store_figures(figures_ptr + row * _FIGURES, top, second, total, slope, log_vocab)
    else:
        slot = parts_ptr + (row * num_parts + part) * 4
        tl.store(slot, top)
        tl.store(slot + 1, second)
        tl.store(slot + 2, total)
        tl.store(slot + 3, slope)


@triton.jit(do_not_specialize=["num_parts"])
def _join_confidence(parts_ptr, figures_ptr, num_parts, log_vocab, PARTS_UP: tl.constexpr):
    """Combine the parts of one row."""
    row = tl.program_id(0).to(tl.int64)
    part = tl.arange(0, PARTS_UP)
    is_part = part < num_parts
    slot = parts_ptr + (row * num_parts + part) * 4
    tops = tl.load(slot, mask=is_part, other=-_LARGEST)
    seconds = tl.load(slot + 1, mask=is_part, other=-_LARGEST)
    totals = tl.load(slot + 2, mask=is_part, other=0.0)
    slopes = tl.load(slot + 3, mask=is_part, other=0.0)
    top, second, total, slope = _joined(tops, seconds, totals, slopes, PARTS_UP)
    _store_figures(figures_ptr + row * _FIGURES, top, second, total, slope, log_vocab)


def confidence(logits_RD: Tensor, *, span: int = _SPAN, spans_of_part: int = _PART) -> Tensor:
    """See ``specops.allocation.confidence``. Can be captured in a CUDA graph.

    Args:
        span: logits a program reads at once, a power of two.
        spans_of_part: rows are split into parts of at least so many spans.

    Raises:
        ValueError: rows are not contiguous, or have less than two logits.
    """
    num_rows, vocab_size = logits_RD.shape
    if logits_RD.stride(1) != 1 or vocab_size < 2:
        raise ValueError(
            f"logits must be contiguous rows of at least two logits, "
            f"got {list(logits_RD.shape)} by {logits_RD.stride()}"
        )
    figures = torch.empty((num_rows, NUM_FIGURES), device=logits_RD.device)
    if not num_rows:
        return figures
    spans = triton.cdiv(vocab_size, span)
    wanted = min(triton.cdiv(spans, spans_of_part), _MOST_PARTS, max(1, _PROGRAMS // num_rows))
    num_spans = triton.cdiv(spans, wanted)
    num_parts = triton.cdiv(spans, num_spans)
    is_whole, log_vocab = num_parts == 1, math.log(vocab_size)
    parts = None if is_whole else torch.empty((num_rows, num_parts, 4), device=logits_RD.device)
    _confidence_of_part[(num_rows, num_parts)](
        logits_RD, logits_RD.stride(0), parts, figures, vocab_size, num_parts, num_spans, log_vocab,
        SPAN=span, IS_WHOLE=is_whole, num_warps=8,
    )  # fmt: skip
    if not is_whole:
        _join_confidence[(num_rows,)](
            parts, figures, num_parts, log_vocab, PARTS_UP=_MOST_PARTS, num_warps=1
        )
    return figures


# ---- lengths -----------------------------------------------------------------------------------


@triton.jit
def _tanh(x):
    """By the exponential of a number that is never positive, so that none overflows."""
    shrink = tl.exp(-2 * tl.abs(x))
    size = (1 - shrink) / (1 + shrink)
    return tl.where(x < 0, -size, size)


@triton.jit
def _sigmoid(x):
    shrink = tl.exp(-tl.abs(x))
    return tl.where(x < 0, shrink, 1.0) / (1 + shrink)


@triton.jit
def head_score(
    top, entropy, margin, place, temperature, mean_ptr, scale_ptr, w1_ptr, b1_ptr, w2_ptr, b2_ptr,
    HIDDEN: tl.constexpr,
):  # fmt: skip
    """``allocation.head_scores`` of blocks of figures, of one shape or broadcast to it."""
    log_top = tl.log(tl.where(top < _LEAST_TOP, _LEAST_TOP, top))  # a NaN stays one
    a = (log_top - tl.load(mean_ptr)) * tl.load(scale_ptr)
    b = (entropy - tl.load(mean_ptr + 1)) * tl.load(scale_ptr + 1)
    c = (margin - tl.load(mean_ptr + 2)) * tl.load(scale_ptr + 2)
    d = (place - tl.load(mean_ptr + 3)) * tl.load(scale_ptr + 3)
    e = (temperature - tl.load(mean_ptr + 4)) * tl.load(scale_ptr + 4)
    total = tl.zeros_like(top) + tl.load(b2_ptr)
    for unit in tl.range(0, HIDDEN, loop_unroll_factor=4):
        w1 = w1_ptr + unit * _INPUTS
        x = a * tl.load(w1) + b * tl.load(w1 + 1) + c * tl.load(w1 + 2)
        x += d * tl.load(w1 + 3) + e * tl.load(w1 + 4) + tl.load(b1_ptr + unit)
        total += _tanh(x) * tl.load(w2_ptr + unit)
    return _sigmoid(total)


@triton.jit
def _note(
    block, figures_ptr, offered_ptr, noted_ptr, noted_stride, num_requests, num_draft,
    NOTED: tl.constexpr,
):  # fmt: skip
    """Write some of what the cut is decided by."""
    width = 1 + num_draft * _FIGURES
    at = block * NOTED + tl.arange(0, NOTED)
    request, column = at // width, at % width
    is_noted = request < num_requests
    figure = tl.load(
        figures_ptr + request * (width - 1) + column - 1, mask=is_noted & (column > 0), other=0.0
    )
    offered = tl.load(offered_ptr + request, mask=is_noted & (column == 0), other=0)
    number = tl.where(column == 0, offered.to(tl.float32), figure)
    tl.store(noted_ptr + request * noted_stride + column, number, mask=is_noted)


@triton.jit
def _with_budget(keys, order, num_open, room, POSITIONS: tl.constexpr):
    """Whether each position is among the ``room`` first ones, by key downwards and then by order.

    Args:
        keys: bits of survivals, or ``_CLOSED``.
        order: numbers of 0..POSITIONS - 1, each once.
    """
    low = num_open * 0
    high = low + _ABOVE_ALL
    num_low = num_open  # from low on
    num_high = low  # from high on
    while (num_low > room) & (high - low > 1):
        middle = (low + high) // 2
        count = tl.sum((keys >= middle).to(tl.int32), axis=None)
        is_enough = count >= room
        low = tl.where(is_enough, middle, low)
        num_low = tl.where(is_enough, count, num_low)
        high = tl.where(is_enough, high, middle)
        num_high = tl.where(is_enough, num_high, count)
    # Unless the count is right, these are of one survival, and not all of them have room.
    is_last = (keys >= low) & (keys < high)
    wanted = room - num_high
    num_last = num_low - num_high
    begin = num_open * 0
    end = begin + POSITIONS
    while num_last > wanted:
        middle = (begin + end) // 2
        count = tl.sum((is_last & (order < middle)).to(tl.int32), axis=None)
        is_enough = count >= wanted
        end = tl.where(is_enough, middle, end)
        num_last = tl.where(is_enough, count, num_last)
        begin = tl.where(is_enough, begin, middle)
    return (keys >= high) | (is_last & (order < end))


@triton.jit(
    do_not_specialize=["per_place", "column", "noted_stride", "num_requests", "num_draft",
                       "cumulative"],
    do_not_specialize_on_alignment=_PER_REQUEST,
)  # fmt: skip
def _cut(
    figures_ptr, per_place, column, offered_ptr, temperature_ptr,
    threshold_ptr, budget_ptr, gamma_ptr,
    mean_ptr, scale_ptr, w1_ptr, b1_ptr, w2_ptr, b2_ptr, noted_ptr, noted_stride, lens_ptr,
    num_requests, num_draft, cumulative,
    BY: tl.constexpr, HIDDEN: tl.constexpr, HAS_NOTED: tl.constexpr, NOTED: tl.constexpr,
    DRAFT_UP: tl.constexpr, REQUESTS_UP: tl.constexpr,
):  # fmt: skip
    """The first program cuts all drafts; the others note what by."""
    if HAS_NOTED:
        block = tl.program_id(0) - 1
        if block >= 0:
            _note(
                block, figures_ptr, offered_ptr, noted_ptr, noted_stride, num_requests, num_draft,
                NOTED,
            )  # fmt: skip
            return
    place, request = tl.arange(0, DRAFT_UP)[:, None], tl.arange(0, REQUESTS_UP)
    is_real = (place < num_draft) & (request < num_requests)[None, :]
    at = figures_ptr + (request[None, :] * num_draft + place) * per_place
    if BY == _BY_COLUMN:
        score = tl.load(at + column, mask=is_real, other=0.0)
    else:
        entropy = tl.load(at + _ENTROPY, mask=is_real, other=0.0)
        if BY == _BY_ENTROPY:
            score = 1 - tl.sqrt_rn(tl.load(gamma_ptr) * entropy)
        else:
            temperature = tl.load(temperature_ptr + request, mask=request < num_requests, other=1.0)
            score = head_score(
                tl.load(at + _TOP, mask=is_real, other=1.0), entropy,
                tl.load(at + _MARGIN, mask=is_real, other=0.0),
                place.to(tl.float32), temperature[None, :],
                mean_ptr, scale_ptr, w1_ptr, b1_ptr, w2_ptr, b2_ptr, HIDDEN,
            )  # fmt: skip
    score = tl.where(score > 0, tl.minimum(score, 1.0), 0.0)  # NaN is 0

    threshold = tl.load(threshold_ptr)
    offered = tl.load(offered_ptr + request, mask=request < num_requests, other=0)
    is_open = offered > 0
    product = tl.full([REQUESTS_UP], 1.0, tl.float64)
    wanted = tl.zeros([REQUESTS_UP], tl.int32)
    keys = tl.full([DRAFT_UP, REQUESTS_UP], _CLOSED, tl.int32)
    for k in tl.static_range(DRAFT_UP):
        own = tl.sum(tl.where(place == k, score, 0.0), axis=0)
        product *= own
        survival = product.to(tl.float32)
        judged = tl.where(cumulative > 0, survival, own)
        is_open = is_open & (k < num_draft) & (k < offered) & (judged >= threshold)
        wanted += is_open.to(tl.int32)
        bits = survival.to(tl.int32, bitcast=True)
        keys = tl.where((place == k) & is_open[None, :], bits[None, :], keys)

    num_open = tl.sum(wanted, axis=0)
    budget = tl.load(budget_ptr)
    most = tl.ceil(tl.minimum(budget, num_open.to(tl.float32)))
    room = tl.where(budget > 0, most, 0.0).to(tl.int32)  # of NaN none
    order = place * REQUESTS_UP + request[None, :]
    stays = _with_budget(keys, order, num_open, room, DRAFT_UP * REQUESTS_UP)
    lens = tl.sum(stays.to(tl.int32), axis=0).to(tl.int64)
    tl.store(lens_ptr + request, lens, mask=request < num_requests)


def _tile(num_requests: int, num_draft: int) -> tuple[int, int] | None:
    """Requests and positions of a program that holds the batch; ``None``: there is none."""
    draft_up = max(_LEAST_DRAFT, int(triton.next_power_of_2(num_draft)))
    for requests_up in _BATCHES:
        if num_requests <= requests_up and requests_up * draft_up <= _MOST_POSITIONS:
            return requests_up, draft_up
    return None


def _check(**tensors: Tensor) -> None:
    for name, tensor in tensors.items():
        dtype = torch.int64 if name == "offered" else torch.float32
        if tensor.dtype != dtype or not tensor.is_contiguous():
            raise ValueError(
                f"{name} must be contiguous {dtype}, got {tensor.dtype} by {tensor.stride()}"
            )


def allocate(
    scores_RK: Tensor,
    offered_R: Tensor,
    threshold: Tensor,
    budget: Tensor,
    *,
    cumulative: bool,
) -> Tensor:
    """See ``specops.allocation.allocate``. Can be captured in a CUDA graph.

    Raises:
        ValueError: the scores, the threshold or the budget are not float32, the lengths not int64,
            or one of them is not contiguous.
    """
    num_requests, num_draft = scores_RK.shape
    _check(scores=scores_RK, offered=offered_R, threshold=threshold, budget=budget)
    tile = _tile(num_requests, num_draft)
    if tile is None:
        return allocation.allocate(scores_RK, offered_R, threshold, budget, cumulative=cumulative)
    lens = torch.empty_like(offered_R)
    if not num_requests:
        return lens
    requests_up, draft_up = tile
    _cut[(1,)](
        scores_RK, 1, 0, offered_R, None, threshold, budget, None,
        None, None, None, None, None, None, None, 0, lens, num_requests, num_draft, int(cumulative),
        BY=_BY_COLUMN, HIDDEN=0, HAS_NOTED=False, NOTED=0,
        DRAFT_UP=draft_up, REQUESTS_UP=requests_up, num_warps=_num_warps(requests_up),
    )  # fmt: skip
    return lens


def _num_warps(requests_up: int) -> int:
    """A thread for each request, and at most 512."""
    return min(16, requests_up // 32)


def cut_drafts(
    figures_RKF: Tensor,
    offered_R: Tensor,
    temperature_R: Tensor,
    values: CutValues,
    head: HeadWeights,
    noted_RC: Tensor | None = None,
    *,
    score: Score,
    cumulative: bool,
) -> Tensor:
    """See ``specops.allocation.cut_drafts``. Can be captured in a CUDA graph. Lengths are equal
    where scores are; those of a head may differ in their last bits.

    Raises:
        ValueError: a tensor has the wrong dtype or is not contiguous.
    """
    num_requests, num_draft = figures_RKF.shape[:2]
    numbers = {"threshold": values.threshold, "budget": values.budget, "gamma": values.gamma}
    weights = {name: getattr(head, name) for name in HeadWeights.__slots__}
    _check(figures=figures_RKF, offered=offered_R, temperature=temperature_R, **numbers, **weights)
    tile = _tile(num_requests, num_draft)
    if tile is None:
        return allocation.cut_drafts(
            figures_RKF, offered_R, temperature_R, values, head, noted_RC,
            score=score, cumulative=cumulative,
        )  # fmt: skip
    lens = torch.empty_like(offered_R)
    if not num_requests:
        return lens
    requests_up, draft_up = tile
    num_warps = _num_warps(requests_up)
    noted_by_program = 32 * num_warps * _NOTED
    by = {"entropy": _BY_ENTROPY, "head": _BY_HEAD}.get(score, _BY_COLUMN)
    num_noted = 0 if noted_RC is None else num_requests * (1 + NUM_FIGURES * num_draft)
    _cut[(1 + triton.cdiv(num_noted, noted_by_program),)](
        figures_RKF, NUM_FIGURES, MARGIN if score == "margin" else TOP, offered_R, temperature_R,
        *numbers.values(), *weights.values(), noted_RC,
        0 if noted_RC is None else noted_RC.stride(0), lens,
        num_requests, num_draft, int(cumulative),
        BY=by, HIDDEN=len(head.b1_H), HAS_NOTED=noted_RC is not None,
        NOTED=noted_by_program, DRAFT_UP=draft_up, REQUESTS_UP=requests_up, num_warps=num_warps,
    )  # fmt: skip
    return lens


# ---- packed rows -------------------------------------------------------------------------------


@triton.jit(do_not_specialize=["num_requests", "num_draft", "num_rows"])
def _pack(
    lens_ptr, at_ptr, request_ptr, is_real_ptr, of_ptr, num_requests, num_draft, num_rows,
    PLACES: tl.constexpr, SUMMED: tl.constexpr,
):  # fmt: skip
    """Write the rows of one request; the last program writes padding."""
    request = tl.program_id(0)
    begin = request * 0
    for first in range(0, request, SUMMED):
        before = first + tl.arange(0, SUMMED)
        lens = tl.load(lens_ptr + before, mask=before < request, other=-1)
        begin += tl.sum(lens.to(tl.int32) + 1, axis=0)
    if request < num_requests:
        num = tl.load(lens_ptr + request).to(tl.int32)
        place = tl.arange(0, PLACES)
        row = begin + place
        is_row = (place <= num) & (row < num_rows)
        first_row = request.to(tl.int64) * (num_draft + 1)
        tl.store(at_ptr + row, first_row + place, mask=is_row)
        tl.store(request_ptr + row, (place * 0 + request).to(tl.int64), mask=is_row)
        tl.store(is_real_ptr + row, place >= 0, mask=is_row)
        of = (begin + tl.minimum(place, num)).to(tl.int64)
        tl.store(of_ptr + first_row + place, of, mask=place <= num_draft)
    else:
        for first in range(begin, num_rows, SUMMED):
            row = first + tl.arange(0, SUMMED)
            is_row = row < num_rows
            none = (row * 0).to(tl.int64)
            tl.store(at_ptr + row, none, mask=is_row)
            tl.store(request_ptr + row, none + num_requests - 1, mask=is_row)
            tl.store(is_real_ptr + row, row < 0, mask=is_row)


def pack_rows(lens_R: Tensor, num_draft: int, capacity: int) -> PackedRows:
    """See ``specops.allocation.pack_rows``. Can be captured in a CUDA graph.

    Raises:
        ValueError: the lengths are not int64, or not contiguous.
    """
    if lens_R.dtype != torch.int64 or not lens_R.is_contiguous():
        raise ValueError(
            f"lens must be contiguous torch.int64, got {lens_R.dtype} by {lens_R.stride()}"
        )
    num_requests, device = len(lens_R), lens_R.device
    num_rows = num_requests + capacity
    at = torch.empty(num_rows, dtype=torch.int64, device=device)
    request = torch.empty_like(at)
    is_real = torch.empty(num_rows, dtype=torch.bool, device=device)
    of = torch.empty((num_requests, num_draft + 1), dtype=torch.int64, device=device)
    _pack[(num_requests + 1,)](
        lens_R, at, request, is_real, of, num_requests, num_draft, num_rows,
        PLACES=max(_LEAST_PLACES, int(triton.next_power_of_2(num_draft + 1))), SUMMED=_SUMMED,
        num_warps=1,
    )  # fmt: skip
    return PackedRows(at, request, is_real, of)
