"""Drafts from text, in two launches; see ``specops.matches``.

Several programs share a request. Each compares the last tokens with its part of the request's own
text and of the ring, a span at a time, and keeps the best score of each of its lanes; the second
launch combines the parts and reads what followed. Nearly all positions differ in the last token
already, so a span costs little more than reading it once, from the L2 cache after the first
request.

Shapes: L lanes, N positions of a lane, R requests, M positions of the ring, K draft tokens.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from specops.matches import BLOCK, END, LENGTH_BITS, MOST_VOTES, Bounds, RingText, TextDrafts

_SPAN = 2048  # positions that a program compares at once
_MOST_PARTS = 64
_PROGRAMS = 1056  # 8 on each of an H200's 132 multiprocessors
_BLOCK = tl.constexpr(BLOCK)
_END = tl.constexpr(END)
_LENGTH_BITS = tl.constexpr(LENGTH_BITS)
_NOTHING = tl.constexpr(-2)  # no token, and no end of a text
_LATE = tl.constexpr((1 << LENGTH_BITS) - 1)
assert MOST_VOTES == 4, "programs keep four scores"


@triton.jit
def _with_best(tops, first, second, third, fourth):
    """The four best scores, with those of a span among them; all scores differ."""
    top = tl.max(tops, axis=0)
    while top > fourth:
        tops = tl.where(tops == top, 0, tops)
        less = tl.minimum(first, top)
        first = tl.maximum(first, top)
        top, less = less, tl.minimum(second, less)
        second = tl.maximum(second, top)
        top, less = less, tl.minimum(third, less)
        third = tl.maximum(third, top)
        fourth = tl.maximum(fourth, less)
        top = tl.max(tops, axis=0)
    return first, second, third, fourth


@triton.jit
def _scores(ids_ptr, position, is_match, late, text_ptr, length, shortest, longest):
    """Scores of the matches that end at some positions; 0 where they are too short.

    Args:
        is_match: [SPAN] the token there is the request's last one.
    """
    found = is_match.to(tl.int64)
    back = 1
    most = tl.minimum(longest, length)
    is_left = tl.max(is_match.to(tl.int32), axis=0)
    while (is_left > 0) & (back < most):
        token = tl.load(text_ptr + length - 1 - back)
        at = position - back
        there = tl.load(ids_ptr + at, mask=is_match & (at >= 0), other=_END)
        is_match = is_match & (there == token)
        found += is_match.to(tl.int64)
        back += 1
        is_left = tl.max(is_match.to(tl.int32), axis=0)
    return tl.where(found >= shortest, (found << _LENGTH_BITS) + late, 0)


@triton.jit(
    do_not_specialize=["texts_stride", "ring_size", "num_parts", "shortest", "longest"],
    do_not_specialize_on_alignment=["lengths_ptr", "spaces_ptr"],
)
def _find_matches(
    texts_ptr, texts_stride, lanes_ptr, lengths_ptr, spaces_ptr, ring_ptr, ring_spaces_ptr,
    ring_bounds_ptr, ring_size, scores_ptr, num_parts, shortest, longest,
    SPAN: tl.constexpr, HAS_RING: tl.constexpr, BY_PAIR: tl.constexpr,
):  # fmt: skip
    """The best scores in one part of what a request searches."""
    request, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    length = tl.load(lengths_ptr + request)
    text = texts_ptr + tl.load(lanes_ptr + request).to(tl.int64) * texts_stride
    last = tl.load(text + length - 1)
    # Few positions have the same pair of tokens, and a span without any costs two reads.
    before = tl.load(text + length - 2, mask=length > 1, other=_NOTHING)
    lane = tl.arange(0, SPAN)
    # Scores are at least the shortest match's, so nothing is found that is not above these.
    a = length * 0
    b = a
    c = a
    d = a
    for start in tl.range(part * SPAN, length - 1, num_parts * SPAN):
        position = (start + lane).to(tl.int64)
        token = tl.load(text + position, mask=position < length - 1, other=_END)
        is_match = token == last
        if BY_PAIR:
            is_there = (position > 0) & (position < length)
            there = tl.load(text + position - 1, mask=is_there, other=_END)
            is_match = is_match & (there == before)
        if tl.max(is_match.to(tl.int32), axis=0) > 0:
            late = ring_size + 1 + position
            tops = _scores(text, position, is_match, late, text, length, shortest, longest)
            a, b, c, d = _with_best(tops, a, b, c, d)
    if HAS_RING:
        space = tl.load(spaces_ptr + request)
        next_start, filled = tl.load(ring_bounds_ptr), tl.load(ring_bounds_ptr + 1)
        for start in tl.range(part * SPAN, filled, num_parts * SPAN):
            position = (start + lane).to(tl.int64)
            token = tl.load(ring_ptr + position, mask=position < filled, other=_END)
            is_match = token == last
            if BY_PAIR:
                is_there = (position > 0) & (position < filled)
                former = tl.load(ring_ptr + position - 1, mask=is_there, other=_END)
                is_match = is_match & (former == before)
            if tl.max(is_match.to(tl.int32), axis=0) > 0:
                follower = tl.load(
                    ring_ptr + position + 1, mask=is_match & (position + 1 < ring_size), other=_END
                )
                own = tl.load(ring_spaces_ptr + position // _BLOCK, mask=is_match, other=-1)
                is_match = is_match & (follower != _END) & (own == space)
                age = next_start - 1 - position
                late = ring_size - tl.where(age < 0, age + ring_size, age)
                tops = _scores(ring_ptr, position, is_match, late, text, length, shortest, longest)
                a, b, c, d = _with_best(tops, a, b, c, d)
    row = scores_ptr + (request * num_parts + part) * 4
    tl.store(row, a)
    tl.store(row + 1, b)
    tl.store(row + 2, c)
    tl.store(row + 3, d)


@triton.jit(
    do_not_specialize=["texts_stride", "ring_size", "num_parts", "num_draft"],
    do_not_specialize_on_alignment=["lengths_ptr", "matched_ptr"],
)
def _take_drafts(
    texts_ptr, texts_stride, lanes_ptr, lengths_ptr, ring_ptr, ring_bounds_ptr, ring_size,
    scores_ptr, num_parts, tokens_ptr, counts_ptr, matched_ptr, num_draft,
    SCORES_UP: tl.constexpr, DRAFT_UP: tl.constexpr, HAS_RING: tl.constexpr,
):  # fmt: skip
    """What followed the best matches of one request, by votes."""
    request = tl.program_id(0).to(tl.int64)
    slot = tl.arange(0, SCORES_UP)
    scores = tl.load(
        scores_ptr + request * num_parts * 4 + slot, mask=slot < num_parts * 4, other=0
    )
    rank = tl.arange(0, 4)
    best = tl.max(scores, axis=0)
    votes = tl.zeros([4], tl.int64)
    for place in tl.static_range(4):
        top = tl.max(scores, axis=0)
        votes = tl.where(rank == place, top, votes)
        scores = tl.where(scores == top, 0, scores)
    late = votes & _LATE
    best_late = best & _LATE
    is_own = best_late > ring_size
    has_vote = (votes >> _LENGTH_BITS) == (best >> _LENGTH_BITS)
    has_vote = has_vote & (best > 0) & ((late > ring_size) == is_own)

    length = tl.load(lengths_ptr + request)
    text = texts_ptr + tl.load(lanes_ptr + request).to(tl.int64) * texts_stride
    number = tl.arange(0, DRAFT_UP)
    is_draft = number < num_draft
    at = late - ring_size - 1
    left = tl.maximum(length - 1 - at, 1)
    index = (at + 1)[:, None] + number[None, :] % left[:, None]
    is_read = has_vote[:, None] & is_draft[None, :]
    after = tl.load(text + index, mask=is_read & is_own, other=_END).to(tl.int64)
    if HAS_RING:
        at = tl.load(ring_bounds_ptr) - 1 - (ring_size - late)
        at = tl.where(at < 0, at + ring_size, at)
        index = (at + 1)[:, None] + number[None, :]
        mask = is_read & (is_own == 0) & (index < ring_size)
        theirs = tl.load(ring_ptr + index, mask=mask, other=_END).to(tl.int64)
        after = tl.where(is_own, after, theirs)

    again = tl.load(text + length - 1).to(tl.int64)
    drafts = tl.where(number == 0, again, 0)
    count = 0
    goes_on = has_vote
    is_over = 0
    for place in tl.range(0, num_draft):
        token = tl.sum(tl.where(number[None, :] == place, after, 0), axis=1)
        goes_on = goes_on & (token != _END)
        agree = (token[:, None] == token[None, :]) & goes_on[None, :]
        num_votes = tl.where(goes_on, tl.sum(agree.to(tl.int32), axis=1) * 4 + 3 - rank, -1)
        most = tl.max(num_votes, axis=0)
        chosen = tl.max(tl.where(num_votes == most, token, _END), axis=0)
        is_one = (most >= 0) & (is_over == 0)
        drafts = tl.where((number == place) & is_one, chosen, drafts)
        count += is_one.to(tl.int32)
        is_over = tl.where(is_one, is_over, 1)
        goes_on = goes_on & (token == chosen)
    tl.store(tokens_ptr + request * num_draft + number, drafts, mask=is_draft)
    tl.store(counts_ptr + request, tl.maximum(count, 1).to(tl.int64))
    matched = best >> _LENGTH_BITS
    tl.store(matched_ptr + request, tl.where(is_own, matched, -matched))


def text_drafts(
    texts_LN: Tensor,
    lanes_R: Tensor,
    lengths_R: Tensor,
    spaces_R: Tensor,
    ring: RingText | None,
    num_draft: int,
    bounds: Bounds,
) -> TextDrafts:
    """See ``specops.matches.text_drafts``, which has the same arguments and result. Can be captured
    in a CUDA graph.

    Raises:
        ValueError: a tensor has the wrong dtype or is not contiguous.
    """
    num_requests, device = len(lanes_R), texts_LN.device
    for name, tensor, dtype in (
        ("texts", texts_LN, torch.int32), ("lanes", lanes_R, torch.int32),
        ("lengths", lengths_R, torch.int64), ("spaces", spaces_R, torch.int64),
    ):  # fmt: skip
        if tensor.dtype != dtype or not tensor.is_contiguous():
            raise ValueError(f"{name} must be contiguous {dtype}, got {tensor.dtype}")
    has_ring = ring is not None
    ring_ids = ring_spaces = ring_bounds = texts_LN  # of no ring: never read
    if ring is not None:
        ring_ids, ring_spaces, ring_bounds = ring.ids_M, ring.spaces_B, ring.bounds_2
    size = len(ring_ids) if has_ring else 0
    longest_text = max(size, texts_LN.shape[1])
    wanted = max(1, _PROGRAMS // num_requests)
    parts = min(_MOST_PARTS, triton.cdiv(longest_text, _SPAN), wanted)
    scores = torch.empty((num_requests, parts, MOST_VOTES), dtype=torch.int64, device=device)
    tokens = torch.empty((num_requests, num_draft), dtype=torch.int64, device=device)
    counts, matched = torch.empty((2, num_requests), dtype=torch.int64, device=device)
    _find_matches[(num_requests, parts)](
        texts_LN, texts_LN.stride(0), lanes_R, lengths_R, spaces_R,
        ring_ids, ring_spaces, ring_bounds, size, scores, parts, bounds.shortest,
        bounds.longest,
        SPAN=_SPAN, HAS_RING=has_ring, BY_PAIR=bounds.shortest > 1, num_warps=8,
    )  # fmt: skip
    _take_drafts[(num_requests,)](
        texts_LN, texts_LN.stride(0), lanes_R, lengths_R, ring_ids, ring_bounds, size,
        scores, parts, tokens, counts, matched, num_draft,
        SCORES_UP=MOST_VOTES * _MOST_PARTS,
        DRAFT_UP=max(16, int(triton.next_power_of_2(num_draft))),
        HAS_RING=has_ring, num_warps=1,
    )  # fmt: skip
    return TextDrafts(tokens, counts, matched)
