"""Drafts from text, in two launches; see ``specops.matches``.

The first launch compares. A program for finished texts reads spans of the ring for a group of
requests at once: each position is compared with the last two tokens of all of them and notes those
that it matches, a bit for each. Only requests that some position matches are looked at one by one,
for how long their matches are; a program keeps the four best scores of each of its requests. Spans
are read from the newest on, so where a request's last tokens are everywhere, older spans count only
with longer matches, and are left after a comparison or two. Programs for requests' own text do the
same for one request each. The second launch combines what the programs have found and reads what
followed.

Shapes: L lanes, N positions of a lane, R requests, M positions of the ring, K draft tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from specops.matches import BLOCK, END, LENGTH_BITS, MOST_VOTES, Bounds, RingText, TextDrafts


@dataclass(frozen=True, slots=True)
class Programs:
    """How the search is shared out to programs. It changes how long it takes, and nothing else."""

    group: int
    """Requests that a program reads the ring for: a power of two up to 32."""
    span: int
    """Positions that it compares at once: a power of two, at least ``BLOCK``. Four for each thread
    fit its registers."""
    warps: int
    registers: int = 128
    """Most that a thread uses; 65,536 divided by those of a program are on a multiprocessor."""
    parts: int = 112
    """Most programs that share the ring for a group, or a request's own text."""


FEW, MANY = Programs(8, 2048, 16), Programs(8, 512, 4)
FEW_REQUESTS = 16
"""Finished texts are searched for as many as ``FEW`` says, for more as ``MANY`` does."""
_MOST_OWN_PARTS, _MOST_RING_PARTS = 16, 112
# 2 and 8 on each of an H200's 132 multiprocessors. Most requests' own text is a fraction of a lane.
_OWN_PROGRAMS, _RING_PROGRAMS = 264, 1056
_BLOCK = tl.constexpr(BLOCK)
_END = tl.constexpr(END)
_LENGTH_BITS = tl.constexpr(LENGTH_BITS)
_NOTHING = tl.constexpr(-2)  # no token, and no end of a text
_LATE = tl.constexpr((1 << LENGTH_BITS) - 1)
assert MOST_VOTES == 4, "programs keep four scores"


@triton.jit
def _score(length, position, next_start, size):
    """A match's score; ``next_start`` is the oldest position, and the one before it the latest."""
    age = next_start - 1 - position
    late = size - tl.where(age < 0, age + size, age)
    return (length.to(tl.int64) << _LENGTH_BITS) + late


@triton.jit
def _length_of_matches(
    ids_ptr, start, is_match, is_left, text_ptr, length, longest, SPAN: tl.constexpr,
    BY_PAIR: tl.constexpr,
):  # fmt: skip
    """Lengths of the matches that end at some positions, 0 where there is none, and the longest.

    Args:
        is_match: [SPAN] the token there is the request's last one, and by pair the one before it.
        is_left: int32, 0: there is none, or none is wanted; 1: there probably is one, and the
            longest has that length at least.
    """
    lane = tl.arange(0, SPAN)
    most = tl.minimum(longest, length)
    back = tl.full((), 2 if BY_PAIR else 1, tl.int32)
    found = tl.where(is_match, back, 0)
    reached = is_left * back
    while (is_left > 0) & (back < most):
        token = tl.load(text_ptr + length - 1 - back)
        there = tl.load(
            ids_ptr + start - back + lane, mask=is_match & (lane >= back - start), other=_END
        )
        is_match = is_match & (there == token)
        found += is_match.to(tl.int32)
        back += 1
        is_left = tl.max(is_match.to(tl.int32), axis=0)
        reached += is_left
    return found, reached


@triton.jit
def _with_best(
    lengths, start, next_start, size, first, second, third, fourth, SPAN: tl.constexpr
):  # fmt: skip
    """The four best scores, with those of a span among them.

    Args:
        lengths: [SPAN] int32 of the matches at the positions from ``start`` on; 0 for none.
    """
    # Lengths and order in a span fit 32 bits. Where the oldest text begins within it, what is
    # before it is later than what is behind.
    turn = next_start - start
    turn = tl.where((turn > 0) & (turn < SPAN), turn, 0)
    rank = (tl.arange(0, SPAN) - turn) & (SPAN - 1)
    keys = tl.where(lengths > 0, lengths * SPAN + rank, 0)
    key = tl.max(keys, axis=0)
    position = start + ((key + turn) & (SPAN - 1))
    top = _score(key // SPAN, position, next_start, size)
    while (key > 0) & (top > fourth):
        keys = tl.where(keys == key, 0, keys)
        less = tl.minimum(first, top)
        first = tl.maximum(first, top)
        top, less = less, tl.minimum(second, less)
        second = tl.maximum(second, top)
        top, less = less, tl.minimum(third, less)
        third = tl.maximum(third, top)
        fourth = tl.maximum(fourth, less)
        key = tl.max(keys, axis=0)
        position = start + ((key + turn) & (SPAN - 1))
        top = _score(key // SPAN, position, next_start, size)
    return first, second, third, fourth


@triton.jit
def _find_in_own_text(
    texts_ptr, texts_stride, lanes_ptr, lengths_ptr, ring_size, row_ptr, request, part, num_parts,
    shortest, longest, SPAN: tl.constexpr, BY_PAIR: tl.constexpr,
):  # fmt: skip
    """The best scores in one part of a request's own text."""
    length = tl.load(lengths_ptr + request).to(tl.int32)
    text = texts_ptr + tl.load(lanes_ptr + request).to(tl.int64) * texts_stride
    last = tl.load(text + length - 1)
    before = tl.load(text + length - 2, mask=length > 1, other=_NOTHING)
    lane = tl.arange(0, SPAN)
    size = ring_size + length  # as of a ring whose latest position is the text's last one
    a = tl.full((), 0, tl.int64)
    b = a
    c = a
    d = a
    for start in tl.range(part * SPAN, length - 1, num_parts * SPAN):
        is_there = lane < length - 1 - start
        is_match = tl.load(text + start + lane, mask=is_there, other=_END) == last
        if BY_PAIR:
            is_there = is_there & (lane > -start)
            former = tl.load(text + start - 1 + lane, mask=is_there, other=_END)
            is_match = is_match & (former == before)
        is_left = tl.max(is_match.to(tl.int32), axis=0)
        found, reached = _length_of_matches(
            text, start, is_match, is_left, text, length, longest, SPAN, BY_PAIR
        )
        if (reached > 0) & (reached >= shortest):
            found = tl.where(found >= shortest, found, 0)
            a, b, c, d = _with_best(found, start, length, size, a, b, c, d, SPAN)
    tl.store(row_ptr, a)
    tl.store(row_ptr + 1, b)
    tl.store(row_ptr + 2, c)
    tl.store(row_ptr + 3, d)


@triton.jit
def _last_pairs(
    texts_ptr, texts_stride, lanes_ptr, lengths_ptr, num_requests, begin, GROUP: tl.constexpr,
    BY_PAIR: tl.constexpr,
):  # fmt: skip
    """The ``_pair`` of the last two tokens of each request of a group, or the last one."""
    pairs = ()
    for number in tl.static_range(GROUP):
        is_one = begin + number < num_requests
        length = tl.load(lengths_ptr + begin + number, mask=is_one, other=0)
        lane = tl.load(lanes_ptr + begin + number, mask=is_one, other=0).to(tl.int64)
        end = texts_ptr + lane * texts_stride + length
        pair = tl.load(end - 1, mask=length > 0, other=_NOTHING)
        if BY_PAIR:
            pair = _pair(tl.load(end - 2, mask=length > 1, other=_NOTHING), pair)
        # Triton neither unpacks nor annotates.
        pairs = pairs + (pair,)  # type: ignore[assignment]  # noqa: RUF005
    return pairs


@triton.jit
def _pair(former, token):
    """A number that few other pairs of tokens have, and none of ids below 2^16."""
    return token ^ (former << 16)


@triton.jit
def _lengths_in_ring(
    ring_ptr, ring_spaces_ptr, ring_size, start, former, may_match, text_ptr, length, space,
    shortest, longest, fourth, SPAN: tl.constexpr, BY_PAIR: tl.constexpr,
):  # fmt: skip
    """[SPAN] lengths of one request's matches, 0 where they do not count, and whether one may.

    Args:
        may_match: [SPAN] where its last pair may be.
        fourth: its fourth best score so far, of later spans.
    """
    is_match = may_match
    if BY_PAIR:
        # With the same token before it, the same number is that of the same last token.
        before = tl.load(text_ptr + length - 2, mask=length > 1, other=_NOTHING)
        is_match = is_match & (former == before)
    must_exceed = (fourth >> _LENGTH_BITS).to(tl.int32)
    is_left = (tl.minimum(longest, length) > must_exceed).to(tl.int32)
    lengths, reached = _length_of_matches(
        ring_ptr, start, is_match, is_left, text_ptr, length, longest, SPAN, BY_PAIR
    )
    counts = (reached > must_exceed) & (reached >= shortest)
    if counts:
        is_match = lengths >= shortest
        lane = tl.arange(0, SPAN)
        is_there = is_match & (lane < ring_size - start - 1)
        follower = tl.load(ring_ptr + start + 1 + lane, mask=is_there, other=_END)
        here = tl.load(ring_spaces_ptr + start // _BLOCK + lane // _BLOCK, mask=is_match, other=-1)
        lengths = tl.where(is_match & (follower != _END) & (here == space), lengths, 0)
    return lengths, counts


@triton.jit
def _find_in_ring(
    texts_ptr, texts_stride, lanes_ptr, lengths_ptr, spaces_ptr, ring_ptr, ring_spaces_ptr,
    ring_bounds_ptr, ring_size, row_ptr, row_stride, num_requests, begin, part, num_parts,
    shortest, longest, SPAN: tl.constexpr, GROUP: tl.constexpr, BY_PAIR: tl.constexpr,
):  # fmt: skip
    """The best scores of a group of requests, from ``begin`` on, in one part of the ring."""
    pairs = _last_pairs(
        texts_ptr, texts_stride, lanes_ptr, lengths_ptr, num_requests, begin, GROUP, BY_PAIR
    )
    size_of_group = tl.minimum(num_requests - begin, GROUP)
    everyone = tl.full((), 0xFFFFFFFF, tl.uint32) >> (32 - size_of_group).to(tl.uint32)
    number, lane = tl.arange(0, GROUP), tl.arange(0, SPAN)
    a = tl.zeros([GROUP], tl.int64)
    b = a
    c = a
    d = a
    next_start = tl.load(ring_bounds_ptr).to(tl.int32)
    filled = tl.load(ring_bounds_ptr + 1).to(tl.int32)
    num_spans = tl.cdiv(ring_size, SPAN)
    # From the newest span on. The one that the oldest text begins in, too, is the first.
    newest = tl.where(next_start > 0, next_start - 1, ring_size - 1) // SPAN
    for age in tl.range(part, num_spans, num_parts):
        start = tl.where(newest < age, newest - age + num_spans, newest - age) * SPAN
        is_there = lane < tl.multiple_of(filled - start, _BLOCK)
        token = tl.load(ring_ptr + start + lane, mask=is_there, other=_END)
        former = token
        pair = token
        if BY_PAIR:
            is_former = is_there & (lane > -start)
            former = tl.load(ring_ptr + start - 1 + lane, mask=is_former, other=_END)
            pair = _pair(former, token)
        matched_by = tl.zeros([SPAN], tl.uint32)
        for bit in tl.static_range(GROUP):
            matched_by |= tl.where(pair == pairs[bit], 1 << bit, 0).to(tl.uint32)
        matched_by = tl.where(is_there, matched_by & everyone, 0)
        left = tl.max(matched_by, axis=0)
        while left > 0:
            # The highest bit, from the exponent; the next one is cleared, so nothing rounds up.
            exponent = (left - (left & (left >> 1))).to(tl.float32).to(tl.int32, bitcast=True)
            who = (exponent >> 23) - 127
            shift = who.to(tl.uint32)
            may_match = ((matched_by >> shift) & 1) > 0
            matched_by &= (tl.full((), 1, tl.uint32) << shift) - 1
            left = tl.max(matched_by, axis=0)
            is_who = number == who
            fourth = tl.sum(tl.where(is_who, d, 0), axis=0)
            request = begin + who
            text = texts_ptr + tl.load(lanes_ptr + request).to(tl.int64) * texts_stride
            length = tl.load(lengths_ptr + request).to(tl.int32)
            space = tl.load(spaces_ptr + request)
            lengths, counts = _lengths_in_ring(
                ring_ptr, ring_spaces_ptr, ring_size, start, former, may_match, text, length,
                space, shortest, longest, fourth, SPAN, BY_PAIR,
            )  # fmt: skip
            if counts:
                first = tl.sum(tl.where(is_who, a, 0), axis=0)
                second = tl.sum(tl.where(is_who, b, 0), axis=0)
                third = tl.sum(tl.where(is_who, c, 0), axis=0)
                first, second, third, fourth = _with_best(
                    lengths, start, next_start, ring_size, first, second, third, fourth, SPAN
                )
                a = tl.where(is_who, first, a)
                b = tl.where(is_who, second, b)
                c = tl.where(is_who, third, c)
                d = tl.where(is_who, fourth, d)
    row = row_ptr + (begin + number).to(tl.int64) * row_stride
    is_one = number < size_of_group
    tl.store(row, a, mask=is_one)
    tl.store(row + 1, b, mask=is_one)
    tl.store(row + 2, c, mask=is_one)
    tl.store(row + 3, d, mask=is_one)


@triton.jit(
    do_not_specialize=[
        "texts_stride", "ring_size", "num_requests", "own_parts", "ring_parts", "shortest",
        "longest",
    ],
    do_not_specialize_on_alignment=["lengths_ptr", "spaces_ptr"],
)  # fmt: skip
def _find_matches(
    texts_ptr, texts_stride, lanes_ptr, lengths_ptr, spaces_ptr, ring_ptr, ring_spaces_ptr,
    ring_bounds_ptr, ring_size, scores_ptr, num_requests, own_parts, ring_parts, shortest, longest,
    SPAN: tl.constexpr, GROUP: tl.constexpr, HAS_RING: tl.constexpr, BY_PAIR: tl.constexpr,
):  # fmt: skip
    """The best scores in one part of a request's own text, or of a group's in one of the ring."""
    program = tl.program_id(0)
    row_stride = (own_parts + ring_parts) * 4
    num_own = num_requests * own_parts
    if program < num_own:
        request, part = program // own_parts, program % own_parts
        row = scores_ptr + request.to(tl.int64) * row_stride + part * 4
        _find_in_own_text(
            texts_ptr, texts_stride, lanes_ptr, lengths_ptr, ring_size, row, request, part,
            own_parts, shortest, longest, SPAN, BY_PAIR,
        )  # fmt: skip
    elif HAS_RING:
        group, part = (program - num_own) // ring_parts, (program - num_own) % ring_parts
        _find_in_ring(
            texts_ptr, texts_stride, lanes_ptr, lengths_ptr, spaces_ptr, ring_ptr, ring_spaces_ptr,
            ring_bounds_ptr, ring_size, scores_ptr + (own_parts + part) * 4, row_stride,
            num_requests, group * GROUP, part, ring_parts, shortest, longest, SPAN, GROUP, BY_PAIR,
        )  # fmt: skip


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


def _parts(num_positions: int, span: int, most: int) -> int:
    """At most so many programs that share a search, all with about as many spans."""
    spans = int(triton.cdiv(num_positions, span))
    return int(triton.cdiv(spans, triton.cdiv(spans, max(1, min(spans, most)))))


def text_drafts(
    texts_LN: Tensor,
    lanes_R: Tensor,
    lengths_R: Tensor,
    spaces_R: Tensor,
    ring: RingText | None,
    num_draft: int,
    bounds: Bounds,
    *,
    programs: Programs | None = None,
) -> TextDrafts:
    """See ``specops.matches.text_drafts``, which has the same arguments and result. Can be captured
    in a CUDA graph.

    Args:
        programs: ``None``: by the number of requests.

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
    if programs is None:
        programs = FEW if has_ring and num_requests <= FEW_REQUESTS else MANY
    own_parts = min(programs.parts, _MOST_OWN_PARTS, _OWN_PROGRAMS // num_requests)
    own_parts = _parts(texts_LN.shape[1], programs.span, own_parts)
    groups = ring_parts = 0
    if has_ring:
        groups = triton.cdiv(num_requests, programs.group)
        ring_parts = min(programs.parts, _MOST_RING_PARTS, _RING_PROGRAMS // groups)
        ring_parts = _parts(size, programs.span, ring_parts)
    parts = own_parts + ring_parts
    scores = torch.empty((num_requests, parts, MOST_VOTES), dtype=torch.int64, device=device)
    tokens = torch.empty((num_requests, num_draft), dtype=torch.int64, device=device)
    counts, matched = torch.empty((2, num_requests), dtype=torch.int64, device=device)
    _find_matches[(num_requests * own_parts + groups * ring_parts,)](
        texts_LN, texts_LN.stride(0), lanes_R, lengths_R, spaces_R, ring_ids, ring_spaces,
        ring_bounds, size, scores, num_requests, own_parts, ring_parts, bounds.shortest,
        bounds.longest, SPAN=programs.span, GROUP=programs.group, HAS_RING=has_ring,
        BY_PAIR=bounds.shortest > 1, num_warps=programs.warps, maxnreg=programs.registers,
    )  # fmt: skip
    _take_drafts[(num_requests,)](
        texts_LN, texts_LN.stride(0), lanes_R, lengths_R, ring_ids, ring_bounds, size,
        scores, parts, tokens, counts, matched, num_draft,
        SCORES_UP=MOST_VOTES * (_MOST_OWN_PARTS + _MOST_RING_PARTS),
        DRAFT_UP=max(16, int(triton.next_power_of_2(num_draft))),
        HAS_RING=has_ring, num_warps=1,
    )  # fmt: skip
    return TextDrafts(tokens, counts, matched)
