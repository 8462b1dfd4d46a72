"""Lossless verification of draft chains; there is no lossy rule.

Three rules, all exact:

* ``block`` (Sun et al. 2024, arXiv:2403.10444): judge the chain as a whole, so that likely tokens
  can carry an unlikely one before them. On average keeps at least as many tokens as ``standard``
  (for delta drafts, equally many), at the same cost.
* ``standard`` (Leviathan et al. 2023, arXiv:2211.17192; Chen et al. 2023, arXiv:2302.01318): keep
  x with probability min(1, p(x) / q(x)), else draw from norm(max(p - q, 0)). A delta draft has
  q = 1 at its token: keep with p(x), else draw from p without x.
* ``match``: draw the target's own token y from p at every position, with numbers keyed by
  (seed, position, token), and keep drafts while they equal y. The output is y whatever was drafted;
  greedy decoding is a special case. Used for greedy and seeded requests, whose answers must not
  depend on the drafter.

Shapes: R requests, K draft tokens, V vocabulary. ``lens_R`` lets rows draft fewer than K.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from specops.sampling import draw


@dataclass(frozen=True, slots=True)
class Verdict:
    """Outcome of verifying a draft."""

    num_accepted_R: Tensor
    """[R] int64 in 0..lens."""
    next_R: Tensor
    """[R] int64, the target's own token after the kept draft tokens."""
    overlap_RK: Tensor | None
    """[R, K] sum over v of min(p, q): probability that the position is accepted; ``None`` if no
    distribution was computed (greedy)."""
    draft_p_RK: Tensor
    """[R, K] the target's probability of each draft token."""


def acceptance(p_RKV: Tensor, q_RKV: Tensor | None, draft_RK: Tensor) -> tuple[Tensor, Tensor]:
    """Probability of keeping each draft token, given that all before it were kept.

    Args:
        p_RKV: [R, K, V] target probabilities.
        q_RKV: [R, K, V] the tensor the drafts were drawn from, or ``None`` for delta drafts.
        draft_RK: [R, K] int64.

    Returns:
        keep_RK in [0, 1], and p of each draft token, [R, K].
    """
    draft_p = _of_drafts(p_RKV, draft_RK)
    if q_RKV is None:
        return draft_p.clamp(max=1.0), draft_p
    return (draft_p / _of_drafts(q_RKV, draft_RK)).clamp(max=1.0), draft_p


def _of_drafts(law_RKV: Tensor, draft_RK: Tensor) -> Tensor:
    """[R, K] probability of each draft token."""
    return law_RKV.gather(-1, draft_RK[..., None])[..., 0]


def residual(p: Tensor, q: Tensor, pi: Tensor | float = 1.0) -> Tensor:
    """norm(max(pi p - q, 0)) over the last dimension; p itself if that is empty.

    It is empty only if pi p <= q everywhere. With pi = 1, p then equals q up to rounding, and a
    draft is never rejected; with a smaller pi, block verification does not stop there. Returning p
    keeps the row finite.
    """
    rest = (pi * p - q).clamp(min=0)
    mass = rest.sum(dim=-1, keepdim=True)
    return torch.where(mass > 0, rest / mass.clamp(min=torch.finfo(p.dtype).tiny), p)


def count_leading(kept_RK: Tensor, lens_R: Tensor) -> Tensor:
    """[R] int64: number of leading kept tokens among the first ``lens``."""
    index = torch.arange(kept_RK.shape[1], device=kept_RK.device)
    kept = kept_RK & (index < lens_R[:, None])
    return kept.long().cumprod(dim=1).sum(dim=1)


def verify_match(target_ids: Tensor, draft_RK: Tensor, lens_R: Tensor) -> tuple[Tensor, Tensor]:
    """Keep draft tokens while they equal the target's own tokens.

    Args:
        target_ids: [R, K + 1] int64, argmax or keyed draw after each prefix of the draft.
        draft_RK: [R, K] int64.
        lens_R: [R] int64 in 0..K.

    Returns:
        num_accepted_R and next_R, both [R] int64.
    """
    num_accepted = count_leading(target_ids[:, :-1] == draft_RK, lens_R)
    return num_accepted, target_ids.gather(1, num_accepted[:, None])[:, 0]


def block_acceptance(
    p_RKV: Tensor, q_RKV: Tensor | None, draft_RK: Tensor, lens_R: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The probabilities with which block verification stops a chain at each position.

    With ``pi_0 = 1`` and ``pi_i = min(pi_{i-1} p(x_i) / q(x_i), 1)``, at least the first i tokens
    are kept with probability pi_i. Going back from the end of the chain, verification stops at i
    with ``h_i = S_i / (S_i + 1 - pi_i)``, ``S_i = sum_x max(pi_i p(x) - q(x), 0)``, and at the last
    drafted token with probability ``pi``.

    Args:
        p_RKV: [R, K, V] target probabilities after 0 .. K - 1 draft tokens.
        q_RKV: [R, K, V] the tensor the drafts were drawn from, or ``None`` for delta drafts.
        draft_RK: [R, K] int64.
        lens_R: [R] int64 in 0..K.

    Returns:
        h_RK, float64: probability of stopping after 1 .. K tokens, given that it did not stop
        later; 0 beyond ``lens``. pi_RK1, float64: pi after 0 .. K tokens. p of each draft token,
        [R, K].

    Source:
        arXiv:2403.10444, Algorithm 2. A chain's length may depend on the tokens drafted before the
        one that it omits.
    """
    num_draft = draft_RK.shape[1]
    draft_p = _of_drafts(p_RKV, draft_RK)
    ratio = draft_p.double()
    if q_RKV is not None:
        ratio = ratio / _of_drafts(q_RKV, draft_RK).double()
    place = torch.arange(1, num_draft + 1, device=draft_RK.device)
    is_drafted = place <= lens_R[:, None]
    ratio = torch.where(is_drafted, ratio, 0.0)
    # pi_i = product of the ratios since it was last capped at 1.
    steps = torch.nn.functional.pad(ratio.log(), (1, 0)).cumsum(dim=1)
    pi_RK1 = (steps - steps.cummax(dim=1).values).exp()
    pi_next = pi_RK1[:, 1:]
    # S after 1 .. K - 1 draft tokens; after the last one, another rule holds.
    if q_RKV is None:
        rest = pi_RK1[:, 1:-1] * (1 - draft_p[:, 1:].double())
    else:
        scaled = pi_RK1[:, 1:-1, None] * p_RKV[:, 1:].double()
        rest = (scaled - q_RKV[:, 1:].double()).clamp(min=0).sum(dim=-1)
    slack = rest + 1 - pi_next[:, :-1]
    inner = torch.where(slack > 0, rest / slack.clamp(min=1e-300), 1.0)
    h_RK = torch.nn.functional.pad(inner, (0, 1)) if num_draft else pi_next
    h_RK = torch.where(place == lens_R[:, None], pi_next, h_RK)
    return torch.where(is_drafted, h_RK, 0.0), pi_RK1, draft_p


def verify_block(
    p_RK1V: Tensor,
    q_RKV: Tensor | None,
    draft_RK: Tensor,
    lens_R: Tensor,
    accept_u_RK: Tensor,
    next_u_R: Tensor,
) -> Verdict:
    """Block verification of a chain: the emitted tokens follow p exactly.

    For the arguments see ``verify_standard``, for the rule ``block_acceptance``.
    """
    num_draft = draft_RK.shape[1]
    h_RK, pi_RK1, draft_p = block_acceptance(p_RK1V[:, :num_draft], q_RKV, draft_RK, lens_R)
    place = torch.arange(1, num_draft + 1, device=draft_RK.device)
    taken = torch.where(accept_u_RK < h_RK, place, 0)
    num_accepted = torch.nn.functional.pad(taken, (1, 0)).amax(dim=1)
    pi_R1 = pi_RK1.gather(1, num_accepted[:, None]).to(p_RK1V.dtype)
    return _verdict(p_RK1V, q_RKV, draft_RK, lens_R, num_accepted, pi_R1, draft_p, next_u_R)


def verify_standard(
    p_RK1V: Tensor,
    q_RKV: Tensor | None,
    draft_RK: Tensor,
    lens_R: Tensor,
    accept_u_RK: Tensor,
    next_u_R: Tensor,
) -> Verdict:
    """Rejection sampling of a chain: the emitted tokens follow p exactly.

    Args:
        p_RK1V: [R, K + 1, V] target probabilities after each prefix of the draft.
        q_RKV: [R, K, V] the tensor the drafts were drawn from, or ``None`` for delta drafts.
        draft_RK: [R, K] int64.
        lens_R: [R] int64 in 0..K, the drafts' lengths.
        accept_u_RK: [R, K] float64 uniforms, stream ACCEPT.
        next_u_R: [R] float64 uniforms, stream RESIDUAL.
    """
    keep_RK, draft_p = acceptance(p_RK1V[:, : draft_RK.shape[1]], q_RKV, draft_RK)
    num_accepted = count_leading(accept_u_RK < keep_RK.double(), lens_R)
    return _verdict(p_RK1V, q_RKV, draft_RK, lens_R, num_accepted, 1.0, draft_p, next_u_R)


def _verdict(
    p_RK1V: Tensor,
    q_RKV: Tensor | None,
    draft_RK: Tensor,
    lens_R: Tensor,
    num_accepted_R: Tensor,
    pi_R1: Tensor | float,
    draft_p_RK: Tensor,
    next_u_R: Tensor,
) -> Verdict:
    """Draw the token after the kept ones: from ``residual``, or from p if all were kept."""
    num_draft = draft_RK.shape[1]
    overlap = draft_p_RK
    if q_RKV is not None:
        overlap = torch.minimum(p_RK1V[:, :num_draft], q_RKV).sum(-1)
    at = torch.arange(len(draft_RK), device=draft_RK.device)
    p_next = p_RK1V[at, num_accepted_R]
    if num_draft:
        inside = num_accepted_R.clamp(max=num_draft - 1)
        if q_RKV is None:
            rejected = draft_RK[at, inside]
            q_next = torch.zeros_like(p_next).scatter_(-1, rejected[:, None], 1.0)
        else:
            q_next = q_RKV[at, inside]
        was_rejected = num_accepted_R < lens_R
        p_next = torch.where(was_rejected[:, None], residual(p_next, q_next, pi_R1), p_next)
    return Verdict(num_accepted_R, draw(p_next, next_u_R), overlap, draft_p_RK)
