"""Drafts from text: where the last tokens of a request occurred before, and what followed them. The
torch definition; ``matches_triton`` computes the same in two launches.

Two texts are searched, the request's own and a ring of finished ones. The text with the longest
occurrence wins, the request's own on ties. Its latest few occurrences of that length vote on what
follows: the most frequent next token is drafted, that of the latest on ties, and so on among those
that agreed so far, as long as one goes on. Where the request's own text ends before the draft does,
it goes on as if the text repeated itself. A request whose last tokens occurred nowhere drafts its
last token again.

Everything is compared with everything: a GPU reads 400,000 tokens in the time of a launch, and
there is nothing to build, to keep sorted or to look after when text comes or goes.

Shapes: L lanes, N positions of a lane, R requests, M positions of the ring, K draft tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

BLOCK = 128
"""Positions of the ring of one namespace; a text begins at a multiple of it."""
MOST_VOTES = 4
"""Occurrences that vote."""
END = -1
"""Follows every text in the ring, at least once; no token id is negative."""
LENGTH_BITS = 40
"""A match's score: its length, and in so many lower bits how late it is."""
_LATE = (1 << LENGTH_BITS) - 1


@dataclass(frozen=True, slots=True)
class RingText:
    """Finished texts on the device."""

    ids_M: Tensor
    """[M] int32; M is a multiple of ``BLOCK``."""
    spaces_B: Tensor
    """[M / BLOCK] int32 number of the namespace of each block."""
    bounds_2: Tensor
    """[2] int64: where the next text begins, and how many positions were ever written, both
    multiples of ``BLOCK``."""


@dataclass(frozen=True, slots=True)
class TextDrafts:
    """Drafts from text."""

    tokens_RK: Tensor
    """[R, K] int64."""
    counts_R: Tensor
    """[R] int64 in 1..K: how many of them are drafts."""
    matched_R: Tensor
    """[R] int64 length of the match: below 0 if it is in the ring, 0 if there is none."""


@dataclass(frozen=True, slots=True)
class Bounds:
    """Lengths of matches, in tokens."""

    shortest: int
    longest: int
    """Longer ones count as this long."""


def text_drafts(
    texts_LN: Tensor,
    lanes_R: Tensor,
    lengths_R: Tensor,
    spaces_R: Tensor,
    ring: RingText | None,
    num_draft: int,
    bounds: Bounds,
) -> TextDrafts:
    """Drafts of requests.

    Args:
        texts_LN: [L, N] int32 tokens of lanes.
        lanes_R: [R] int32.
        lengths_R: [R] int64 number of committed tokens, at least 1.
        spaces_R: [R] int64 number of each request's namespace.
        ring: ``None``: only the requests' own text is searched.
        num_draft: K, at least 1.
    """
    found = [
        _draft_of(texts_LN[lane, :length], space, ring, num_draft, bounds)
        for lane, length, space in zip(
            lanes_R.tolist(), lengths_R.tolist(), spaces_R.tolist(), strict=True
        )
    ]
    tokens, counts, matched = zip(*found, strict=True)
    return TextDrafts(
        torch.tensor(tokens, device=texts_LN.device),
        torch.tensor(counts, device=texts_LN.device),
        torch.tensor(matched, device=texts_LN.device),
    )


def _draft_of(
    text: Tensor, space: int, ring: RingText | None, num_draft: int, bounds: Bounds
) -> tuple[list[int], int, int]:
    """K tokens, how many of them are drafts, and the length of the match as in ``TextDrafts``."""
    last = text.flip(0)[: bounds.longest]
    number = torch.arange(num_draft, device=text.device)
    before, size = text[:-1], 0 if ring is None else len(ring.ids_M)
    late = size + 1 + torch.arange(len(before), device=text.device)
    own = _latest(_scores(before, last), late)
    theirs = own[:0]
    if ring is not None:
        start, filled = ring.bounds_2.tolist()
        position = torch.arange(size, device=text.device)
        follower = torch.nn.functional.pad(ring.ids_M, (0, 1), value=END)[1:]
        is_here = ring.spaces_B.repeat_interleave(BLOCK) == space
        is_here &= (follower != END) & (position < filled)
        late = size - (start - 1 - position) % size
        theirs = _latest(torch.where(is_here, _scores(ring.ids_M, last), 0), late)
    longest = [int(found[0] >> LENGTH_BITS) if len(found) else 0 for found in (own, theirs)]
    if max(longest) < bounds.shortest:
        return [int(text[-1]), *[0] * (num_draft - 1)], 1, 0
    if longest[0] >= longest[1]:
        at = (own & _LATE) - size - 1
        voters = text[at[:, None] + 1 + number % (len(text) - 1 - at)[:, None]]
    else:
        assert ring is not None
        index = (start - 1 - (size - (theirs & _LATE))) % size + 1
        after = index[:, None] + number
        voters = torch.where(after < size, ring.ids_M[after.clamp(max=size - 1)], END)
        voters = torch.where((voters == END).cumsum(1) > 0, END, voters)
    tokens = _voted(voters.tolist())
    matched = longest[0] if longest[0] >= longest[1] else -longest[1]
    return [*tokens, *[0] * (num_draft - len(tokens))], len(tokens), matched


def _latest(lengths: Tensor, late: Tensor) -> Tensor:
    """[at most MOST_VOTES] scores of the latest of the longest matches, the latest first."""
    scores = ((lengths << LENGTH_BITS) + late)[lengths > 0].sort(descending=True).values
    return scores[:MOST_VOTES][scores[:MOST_VOTES] >> LENGTH_BITS == scores[:1] >> LENGTH_BITS]


def _voted(voters: list[list[int]]) -> list[int]:
    """What followed most occurrences, token by token.

    Args:
        voters: what followed each, the latest first.
    """
    tokens: list[int] = []
    for place in range(len(voters[0])):
        nexts = [voter[place] for voter in voters if voter[place] != END]
        if not nexts:
            break
        tokens.append(max(nexts, key=nexts.count))  # the first of several
        voters = [voter for voter in voters if voter[place] == tokens[-1]]
    return tokens


def _scores(ids: Tensor, last: Tensor) -> Tensor:
    """[P] int64 length of the match that ends at each position, in tokens.

    Args:
        ids: [P] int32.
        last: the last tokens of the request, the last one first.
    """
    lengths = torch.zeros(len(ids), dtype=torch.int64, device=ids.device)
    goes_on = torch.ones(len(ids), dtype=torch.bool, device=ids.device)
    for back, token in enumerate(last.tolist()):
        shifted = torch.nn.functional.pad(ids, (back, 0), value=END)[: len(ids)]
        goes_on = goes_on & (shifted == token)
        lengths += goes_on
    return lengths
