"""Lossless verification of draft chains. There is no lossy rule in this house.

Two rules, both exact:

* ``standard`` (Leviathan et al. 2023, arXiv:2211.17192; Chen et al. 2023, arXiv:2302.01318): keep
  x with probability min(1, p(x) / q(x)), else draw from norm(max(p - q, 0)). A delta draft has
  q = 1 at its token: keep with p(x), else draw from p without x.
* ``match``: draw the target's own token y at every position from p with a number keyed by
  (seed, position) and keep drafts while they equal y. The output is y whatever was drafted; greedy
  decoding is its special case. Used for greedy and for seeded requests, whose answers must not
  depend on the drafter at all.

Shapes: R requests, K draft tokens, V vocabulary. ``lens_R`` lets rows draft fewer than K.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from specops.sampling import draw


@dataclass(frozen=True, slots=True)
class Verdict:
    """What the target made of a draft."""

    num_accepted_R: Tensor
    """[R] int64 in 0..lens."""
    next_R: Tensor
    """[R] int64, the target's own token after the kept ones."""
    overlap_RK: Tensor | None
    """[R, K] sum over v of min(p, q): chance that the position survives; ``None`` where no
    distribution was built (greedy)."""
    draft_p_RK: Tensor
    """[R, K] the target's probability of each draft token."""


def acceptance(p_RKV: Tensor, q_RKV: Tensor | None, draft_RK: Tensor) -> tuple[Tensor, Tensor]:
    """Probability of keeping each draft token, given all before it were kept.

    Args:
        p_RKV: [R, K, V] target probabilities.
        q_RKV: [R, K, V] the very tensor the drafts were drawn from, or ``None`` for delta drafts.
        draft_RK: [R, K] int64.

    Returns:
        keep_RK in [0, 1], and p of each draft token, [R, K].
    """
    draft_p = p_RKV.gather(-1, draft_RK[..., None])[..., 0]
    if q_RKV is None:
        return draft_p.clamp(max=1.0), draft_p
    draft_q = q_RKV.gather(-1, draft_RK[..., None])[..., 0]
    return (draft_p / draft_q).clamp(max=1.0), draft_p


def residual(p: Tensor, q: Tensor) -> Tensor:
    """norm(max(p - q, 0)) over the last dimension; p itself where nothing is left.

    Nothing is left only when p <= q everywhere, that is p = q up to rounding, and then a draft is
    never rejected; p keeps the row finite.
    """
    rest = (p - q).clamp(min=0)
    mass = rest.sum(dim=-1, keepdim=True)
    return torch.where(mass > 0, rest / mass.clamp(min=torch.finfo(p.dtype).tiny), p)


def count_leading(kept_RK: Tensor, lens_R: Tensor) -> Tensor:
    """[R] int64: kept tokens before the first one that is not, among the first ``lens``."""
    index = torch.arange(kept_RK.shape[1], device=kept_RK.device)
    kept = kept_RK & (index < lens_R[:, None])
    return kept.long().cumprod(dim=1).sum(dim=1)


def verify_match(target_ids: Tensor, draft_RK: Tensor, lens_R: Tensor) -> tuple[Tensor, Tensor]:
    """Keep drafts while they equal the target's own tokens.

    Args:
        target_ids: [R, K + 1] int64, argmax or keyed draw after each prefix of the draft.
        draft_RK: [R, K] int64.
        lens_R: [R] int64 in 0..K.

    Returns:
        num_accepted_R and next_R, both [R] int64.
    """
    num_accepted = count_leading(target_ids[:, :-1] == draft_RK, lens_R)
    return num_accepted, target_ids.gather(1, num_accepted[:, None])[:, 0]


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
        q_RKV: [R, K, V] what the drafts were drawn from, or ``None`` for delta drafts.
        draft_RK: [R, K] int64.
        lens_R: [R] int64 in 0..K: positions beyond were not drafted.
        accept_u_RK: [R, K] float64 uniforms, stream ACCEPT.
        next_u_R: [R] float64 uniforms, stream RESIDUAL.
    """
    num_rows, num_draft = draft_RK.shape
    p_RKV = p_RK1V[:, :num_draft]
    keep_RK, draft_p = acceptance(p_RKV, q_RKV, draft_RK)
    num_accepted = count_leading(accept_u_RK < keep_RK.double(), lens_R)
    overlap = draft_p if q_RKV is None else torch.minimum(p_RKV, q_RKV).sum(-1)

    at = torch.arange(num_rows, device=draft_RK.device)
    p_next = p_RK1V[at, num_accepted]
    if num_draft:
        inside = num_accepted.clamp(max=num_draft - 1)
        if q_RKV is None:
            rejected = draft_RK[at, inside]
            q_next = torch.zeros_like(p_next).scatter_(-1, rejected[:, None], 1.0)
        else:
            q_next = q_RKV[at, inside]
        was_rejected = num_accepted < lens_R
        p_next = torch.where(was_rejected[:, None], residual(p_next, q_next), p_next)
    return Verdict(num_accepted, draw(p_next, next_u_R), overlap, draft_p)
