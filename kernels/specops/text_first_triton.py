"""How many tokens of drafts are taken from text, in a launch before drafting and one after the
round; see ``specops.text_first``.

Shapes: R requests, K draft tokens, M the longest draft, G kinds of matches.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from specops import text_first
from specops.text_first import NUM_KINDS, Begun

_KINDS = tl.constexpr(NUM_KINDS)
_HALF = tl.constexpr(NUM_KINDS // 2)
_MOST_TRIES = tl.constexpr(text_first.MOST_TRIES)
_EXPLORE = tl.constexpr(text_first.EXPLORE)
_TEXT_PRIOR = tl.constexpr(text_first.TEXT_PRIOR)
_NEURAL_PRIOR = tl.constexpr(text_first.NEURAL_PRIOR)
_FIRST_RATE = tl.constexpr(text_first.FIRST_RATE)
_RATE_STEP = tl.constexpr(text_first.RATE_STEP)
_NO_MATCH_RATE = tl.constexpr(text_first.NO_MATCH_RATE)
_NEURAL_RATE = tl.constexpr(text_first.NEURAL_RATE)
_NEURAL_ALONE = tl.constexpr(text_first.NEURAL_ALONE)
_TEXT_ALONE = tl.constexpr(text_first.TEXT_ALONE)
_TEXT_FIRST = tl.constexpr(text_first.TEXT_FIRST)
_BOUNDS = tuple(tl.constexpr(bound) for bound in text_first.LONGER_THAN)
assert len(_BOUNDS) == 6, "kernels compare with six lengths"
_B0, _B1, _B2, _B3, _B4, _B5 = _BOUNDS
_SPAN = 64  # requests that a program looks at at once
_PER_REQUEST = ("available_ptr", "lengths_ptr", "matched_ptr", "temperature_ptr")


@triton.jit
def _kind(matched):
    """Kind of a match, see ``text_first.kinds_of``."""
    length = tl.abs(matched)
    longer = (length > _B0).to(tl.int32) + (length > _B1).to(tl.int32)
    longer += (length > _B2).to(tl.int32) + (length > _B3).to(tl.int32)
    longer += (length > _B4).to(tl.int32) + (length > _B5).to(tl.int32)
    return tl.where(length == 0, 0, 1 + longer + _HALF * (matched > 0).to(tl.int32))


@triton.jit
def _on_row(column, index):
    """The same numbers along the other axis."""
    same = index[:, None] == index[None, :]
    return tl.sum(tl.where(same, column[:, None], 0.0), axis=0)


@triton.jit(
    do_not_specialize=["most_draft", "num_requests", "num_draft", "num_passes"],
    do_not_specialize_on_alignment=(*_PER_REQUEST, "lens_ptr", "is_text_ptr"),
)
def _begin_drafts(
    counts_ptr, matched_ptr, available_ptr, temperature_ptr, lanes_ptr, lengths_ptr, lens_ptr,
    begun_ptr, is_text_ptr, most_draft, num_requests, num_draft, num_passes,
    UP: tl.constexpr, KINDS_UP: tl.constexpr,
):  # fmt: skip
    """One request."""
    request = tl.program_id(0)
    kind = _kind(tl.load(matched_ptr + request))
    heat = (tl.load(temperature_ptr + request) > 0).to(tl.int32)
    place = tl.arange(0, UP)
    is_draft = place < num_draft
    each = tl.arange(0, KINDS_UP)
    at = ((heat * _KINDS + kind) * most_draft + place) * 2
    tried = tl.load(counts_ptr + at, mask=is_draft, other=0.0)
    kept = tl.load(counts_ptr + at + 1, mask=is_draft, other=0.0)
    prior = _FIRST_RATE + _RATE_STEP * ((kind + _HALF - 1) % _HALF).to(tl.float32)
    prior = tl.where(kind == 0, _NO_MATCH_RATE, prior)
    text = (kept + _TEXT_PRIOR * prior) / (tried + _TEXT_PRIOR)
    neural_ptr = counts_ptr + 4 * _KINDS * most_draft
    of_all = ((heat * _KINDS + each)[:, None] * most_draft + place[None, :]) * 2
    is_there = (each < _KINDS)[:, None] & is_draft[None, :]
    all_tried = tl.sum(tl.load(neural_ptr + of_all, mask=is_there, other=0.0), axis=0)
    all_kept = tl.sum(tl.load(neural_ptr + of_all + 1, mask=is_there, other=0.0), axis=0)
    overall = (all_kept + _TEXT_PRIOR * _NEURAL_RATE) / (all_tried + _TEXT_PRIOR)
    tried = tl.load(neural_ptr + at, mask=is_draft, other=0.0)
    kept = tl.load(neural_ptr + at + 1, mask=is_draft, other=0.0)
    neural = (kept + _NEURAL_PRIOR * overall) / (tried + _NEURAL_PRIOR)
    log_text = tl.log(tl.where(is_draft, tl.maximum(text, 1e-6), 1.0))
    log_neural = tl.log(tl.where(is_draft, tl.maximum(neural, 1e-6), 1.0))

    # Of n tokens of text, and up to place j: ahead of both lie the places before them.
    before = place[None, :] < place[:, None]
    text_to = tl.sum(tl.where(before, log_text[None, :], 0.0), axis=1)
    neural_to = tl.sum(tl.where(before, log_neural[None, :], 0.0), axis=1)
    is_text = (place[None, :] >= 1) & (place[None, :] <= place[:, None])
    worth = tl.sum(tl.where(is_text, tl.exp(_on_row(text_to, place))[None, :], 0.0), axis=1)
    goes_on = (place[None, :] > place[:, None]) & (place[None, :] <= num_passes)
    gap = _on_row(neural_to, place)[None, :] - neural_to[:, None]
    after = tl.sum(tl.where(goes_on, tl.exp(tl.where(goes_on, gap, 0.0)), 0.0), axis=1)
    worth += tl.exp(text_to) * after
    most = tl.minimum(tl.load(available_ptr + request), num_draft)
    worth = tl.where(place <= most, worth, -1.0)
    begun = tl.min(tl.where(worth == tl.max(worth, axis=0), place, UP), axis=0)
    turn = tl.load(lengths_ptr + request) + 7 * tl.load(lanes_ptr + request)
    begun = tl.where(turn % _EXPLORE == 0, 0, begun)
    length = tl.minimum(tl.load(lens_ptr + request), tl.maximum(begun, num_passes))
    who = tl.where(begun < length, _TEXT_FIRST, _TEXT_ALONE)
    who = tl.where(begun == 0, _NEURAL_ALONE, who)
    tl.store(begun_ptr + request, begun.to(tl.int64))
    tl.store(begun_ptr + num_requests + request, length.to(tl.int64))
    tl.store(begun_ptr + 2 * num_requests + request, who.to(tl.int64))
    tl.store(is_text_ptr + request * num_draft + place, place < begun, mask=is_draft)


@triton.jit(
    do_not_specialize=["most_draft", "num_requests", "num_draft"],
    do_not_specialize_on_alignment=(*_PER_REQUEST, "lens_ptr", "count_ptr"),
)
def _note_kept(
    counts_ptr, matched_ptr, available_ptr, temperature_ptr, begun_ptr, lens_ptr, text_ptr,
    emitted_ptr, count_ptr, judged_ptr, most_draft, num_requests, num_draft, SPAN: tl.constexpr,
):  # fmt: skip
    """All requests with one kind of match, greedy or sampled ones."""
    kind, heat = tl.program_id(0), tl.program_id(1)
    at = counts_ptr + (heat * _KINDS + kind) * most_draft * 2
    neural_at = at + 4 * _KINDS * most_draft
    for start in tl.range(0, num_requests, SPAN):
        request = start + tl.arange(0, SPAN)
        is_one = request < num_requests
        matched = tl.load(matched_ptr + request, mask=is_one, other=0)
        temperature = tl.load(temperature_ptr + request, mask=is_one, other=0.0)
        lens = tl.load(lens_ptr + request, mask=is_one, other=0)
        is_there = is_one & (_kind(matched) == kind) & ((temperature > 0).to(tl.int32) == heat)
        is_own = is_there
        is_there = is_there & (lens > 0)
        available = tl.load(available_ptr + request, mask=is_one, other=0)
        begun = tl.load(begun_ptr + request, mask=is_one, other=0)
        count = tl.load(count_ptr + request, mask=is_one, other=0)
        is_last = start + SPAN >= num_requests
        follows = is_there
        tried = tl.zeros((SPAN,), dtype=tl.int32)
        kept = tl.zeros((SPAN,), dtype=tl.int32)
        for place in tl.range(0, num_draft):
            token = tl.load(text_ptr + request * num_draft + place, mask=is_there, other=0)
            own = tl.load(emitted_ptr + request * (num_draft + 1) + place, mask=is_there, other=0)
            tried += (follows & (count > place)).to(tl.int32)
            is_text = follows & (count > place) & (place < available)
            follows = is_text & (token == own)
            kept += follows.to(tl.int32)
            _add(at + place * 2, is_text, follows, is_last)
            is_neural = is_there & (count > place) & (begun <= place) & (place < lens)
            _add(neural_at + place * 2, is_neural, is_neural & (count > place + 1), is_last)
        tl.store(judged_ptr + request * 2, tried.to(tl.int64), mask=is_own)
        tl.store(judged_ptr + request * 2 + 1, kept.to(tl.int64), mask=is_own)


@triton.jit
def _add(at, was_tried, was_kept, is_last):
    """Count what was tried and kept at one place."""
    tried = tl.load(at) + tl.sum(was_tried.to(tl.float32), axis=0)
    kept = tl.load(at + 1) + tl.sum(was_kept.to(tl.float32), axis=0)
    share = tl.where(is_last & (tried >= _MOST_TRIES), 0.5, 1.0)
    tl.store(at, tried * share)
    tl.store(at + 1, kept * share)


def begin_drafts(
    counts: Tensor,
    matched_R: Tensor,
    available_R: Tensor,
    temperature_R: Tensor,
    lanes_R: Tensor,
    lengths_R: Tensor,
    lens_R: Tensor,
    num_draft: int,
    num_passes: int,
) -> Begun:
    """See ``specops.text_first.begin_drafts``, which has the same arguments and result. Can be
    captured in a CUDA graph."""
    num_requests = len(matched_R)
    begun_3R = matched_R.new_empty((3, num_requests))
    is_text_RK = matched_R.new_empty((num_requests, num_draft), dtype=torch.bool)
    _begin_drafts[(num_requests,)](
        counts, matched_R, available_R, temperature_R, lanes_R, lengths_R, lens_R,
        begun_3R, is_text_RK, counts.shape[3], num_requests, num_draft, num_passes,
        UP=max(16, int(triton.next_power_of_2(num_draft + 1))),
        KINDS_UP=int(triton.next_power_of_2(NUM_KINDS)), num_warps=1,
    )  # fmt: skip
    text_R, new_lens_R, who_R = begun_3R.unbind()
    return Begun(text_R, new_lens_R, who_R, is_text_RK)


def note_kept(
    counts: Tensor,
    matched_R: Tensor,
    available_R: Tensor,
    temperature_R: Tensor,
    begun_R: Tensor,
    lens_R: Tensor,
    text_RK: Tensor,
    emitted_RQ: Tensor,
    count_R: Tensor,
) -> Tensor:
    """See ``specops.text_first.note_kept``, which has the same arguments and result. Can be
    captured in a CUDA graph."""
    num_requests, num_draft = text_RK.shape
    judged_R2 = matched_R.new_empty((num_requests, 2), dtype=torch.int64)
    _note_kept[(NUM_KINDS, 2)](
        counts, matched_R, available_R, temperature_R, begun_R, lens_R, text_RK, emitted_RQ,
        count_R, judged_R2, counts.shape[3], num_requests, num_draft,
        SPAN=_SPAN, num_warps=1,
    )  # fmt: skip
    return judged_R2
