"""How many tokens of a draft are taken from text before a neural drafter goes on, counted by what
each of both has kept. The torch definition; ``text_first_triton`` computes the same.

A request's draft may begin with what followed an earlier occurrence of its last tokens
(``specops.matches``) and go on with a neural drafter's tokens, drafted after those. How often a
token of either is kept depends on the match: on the text that it lies in, and on its length. So
each kind of match has counts, for each place in the draft, of the tokens that were tried and of
those that were kept, of text and of the neural drafter, apart for greedy and for sampled requests.
With rates a_i of text and b_i of the neural drafter at place i, n tokens of text followed by the
neural drafter up to place P are expected to keep

    E(n) = sum_{j <= n} a_1 .. a_j  +  a_1 .. a_n  sum_{n < j <= P} b_{n+1} .. b_j

draft tokens, and n is chosen where that is largest.

Tokens of text are judged in every round, by the tokens that the round committed, whoever drafted.
Those of the neural drafter are judged where they were verified, so one in ``EXPLORE`` rounds of a
request takes none from text. What was counted is halved once ``MOST_TRIES`` were tried, so that new
weights and new traffic show.

Shapes: R requests, K draft tokens, M the longest draft, G = ``NUM_KINDS``.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

NUM_KINDS = 15
"""Kinds of matches: none, and seven lengths in finished text and in the request's own."""
LONGER_THAN = (2, 3, 4, 6, 9, 15)
"""Matches of more tokens than each of these are of the next kind."""
TEXT, NEURAL = range(2)
"""Who drafted."""
TRIED, KEPT = range(2)
MOST_TRIES = 512
EXPLORE = 32
TEXT_PRIOR, NEURAL_PRIOR = 4.0, 16.0
"""Tries that the rates below are worth."""
FIRST_RATE, RATE_STEP, NO_MATCH_RATE = 0.5, 0.06, 0.05
"""Rate of text before anything was counted: of the shortest matches, more for each longer kind, and
without a match."""
NEURAL_RATE = 0.5
"""The same of the neural drafter; before a kind has counts, what it keeps after all kinds."""


@dataclass(frozen=True, slots=True)
class Begun:
    """Drafts that begin with text."""

    text_R: Tensor
    """[R] int64 in 0..K: how many tokens are taken from text."""
    lens_R: Tensor
    """[R] int64 in 0..K: length of the draft."""
    who_R: Tensor
    """[R] int64, see ``NEURAL_ALONE``."""
    is_text_RK: Tensor
    """[R, K] bool: these places are text's."""


NEURAL_ALONE, TEXT_ALONE, TEXT_FIRST = range(3)
"""Who drafts for a request."""


def new_counts(most_draft: int, device: torch.device) -> Tensor:
    """[2 (``TEXT``, ``NEURAL``), 2 (greedy, sampled), G, M, 2 (``TRIED``, ``KEPT``)] float32."""
    return torch.zeros((2, 2, NUM_KINDS, most_draft, 2), device=device)


def kinds_of(matched_R: Tensor) -> Tensor:
    """[R] int64 in 0..G - 1: 0 without a match.

    Args:
        matched_R: [R] int64, see ``TextDrafts``.
    """
    length_R = matched_R.abs()
    longer_R = sum(((length_R > bound).long() for bound in LONGER_THAN), torch.zeros_like(length_R))
    return torch.where(length_R == 0, 0, 1 + longer_R + (NUM_KINDS // 2) * (matched_R > 0))


def rates(counts: Tensor) -> Tensor:
    """[2, 2, G, M] float32 in 0..1: share of tokens that are kept, of those tried."""
    tried, kept = counts[..., TRIED], counts[..., KEPT]
    step = torch.arange(NUM_KINDS, device=counts.device)
    prior = FIRST_RATE + RATE_STEP * ((step - 1) % (NUM_KINDS // 2))
    prior = torch.where(step == 0, NO_MATCH_RATE, prior)[:, None]
    text = (kept[TEXT] + TEXT_PRIOR * prior) / (tried[TEXT] + TEXT_PRIOR)
    all_tried, all_kept = tried[NEURAL].sum(1, True), kept[NEURAL].sum(1, True)
    overall = (all_kept + TEXT_PRIOR * NEURAL_RATE) / (all_tried + TEXT_PRIOR)
    neural = (kept[NEURAL] + NEURAL_PRIOR * overall) / (tried[NEURAL] + NEURAL_PRIOR)
    return torch.stack((text, neural))


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
    """How many tokens of each request's draft are taken from text.

    It depends on committed tokens and on earlier rounds alone, so outputs keep the target's law.

    Args:
        counts: see ``new_counts``.
        matched_R: [R] int64, see ``TextDrafts``.
        available_R: [R] int64 in 1..K tokens that text has.
        temperature_R: [R] float32.
        lanes_R, lengths_R: [R] int32 and int64, number of committed tokens; of them it depends
            which rounds take none.
        lens_R: [R] int64 in 0..K, the longest draft of each request.
        num_draft: K.
        num_passes: P in 1..K, the last place that the neural drafter drafts.
    """
    text, neural = rates(counts[..., :num_draft, :]).double()
    ahead = text.cumprod(-1)
    worth = [_after(neural[..., :num_passes])]
    for n in range(1, num_draft + 1):
        goes_on = _after(neural[..., n:num_passes])
        worth.append(ahead[..., :n].sum(-1) + ahead[..., n - 1] * goes_on)
    worth_R = torch.stack(worth, -1)[(temperature_R > 0).long(), kinds_of(matched_R)]
    number = torch.arange(num_draft + 1, device=counts.device)
    worth_R = worth_R.masked_fill(number > available_R[:, None], -1.0)
    is_free_R = (lengths_R + 7 * lanes_R) % EXPLORE == 0
    text_R = torch.where(is_free_R, 0, worth_R.argmax(-1))
    lens_R = torch.minimum(lens_R, text_R.clamp(min=num_passes))
    who_R = torch.where(text_R < lens_R, TEXT_FIRST, TEXT_ALONE)
    who_R = torch.where(text_R == 0, NEURAL_ALONE, who_R)
    return Begun(text_R, lens_R, who_R, number[:num_draft] < text_R[:, None])


def _after(rate: Tensor) -> Tensor:
    """[...] tokens that are kept of as many as there are rates, [..., n]."""
    return rate.cumprod(-1).sum(-1)


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
    """Count what a round has kept, in place, and tell what text alone would have kept.

    Args:
        counts: see ``new_counts``.
        begun_R: [R] int64, see ``Begun.text_R``.
        lens_R: [R] int64 draft tokens that were verified; requests without any do not count.
        text_RK: [R, K] int64 what followed the match.
        emitted_RQ: [R, K + 1] int64, see ``ClosedRound``.
        count_R: [R] int64 number of emitted tokens.

    Returns:
        [R, 2] int64 places of text alone that the round's tokens decide, one at which text has no
        more to say included, and those at which it would have been kept.
    """
    judged_R2 = torch.zeros((len(count_R), 2), dtype=torch.int64, device=counts.device)
    kinds_R, is_warm_R = kinds_of(matched_R), (temperature_R > 0).long()
    follows_R = is_there_R = lens_R > 0
    for place in range(text_RK.shape[1]):
        is_decided_R = count_R > place
        is_neural_R = is_there_R & is_decided_R & (begun_R <= place) & (place < lens_R)
        judged_R2[:, TRIED] += follows_R & is_decided_R
        is_text_R = follows_R & is_decided_R & (place < available_R)
        follows_R = is_text_R & (text_RK[:, place] == emitted_RQ[:, place])
        judged_R2[:, KEPT] += follows_R
        for who, tried_R, kept_R in (
            (TEXT, is_text_R, follows_R),
            (NEURAL, is_neural_R, is_neural_R & (count_R > place + 1)),
        ):
            new_R2 = torch.stack((tried_R, kept_R), -1).to(counts.dtype)
            counts[who, :, :, place].index_put_((is_warm_R, kinds_R), new_R2, accumulate=True)
    counts.mul_(torch.where(counts[..., TRIED] >= MOST_TRIES, 0.5, 1.0)[..., None])
    return judged_R2
