"""Draft lengths that each request is cut to on the device, from what its drafter's distributions
say, and the packed rows of a verification that is cut so. The torch definition;
``allocation_triton`` computes each of these in one launch.

Fixed shapes, no synchronisation: lengths are values, and every launch depends on R, K and the
budget's capacity alone.

**Why the output keeps the target's law.** Let ``x_1, x_2, ...`` be a request's draft, ``q_i`` the
law that ``x_i`` is drawn from, a function of ``x_1 .. x_{i-1}``, and ``n`` its length after the
cut. The cut never looks at ``x_i`` to decide whether ``x_i`` is verified: the event ``n >= i`` is
decided by ``x_1 .. x_{i-1}`` (which give ``q_1 .. q_i``), and by other requests. So ``n`` is a
stopping time of the draft.

Fix any test function ``f`` of a request's future text. ``F(x_1 .. x_i)`` is its mean if the target
alone goes on after these tokens. Let ``V_i(x_1 .. x_i)`` be its mean over the numbers that
verification draws if the draft ends after ``i`` tokens and the target goes on.

1. *Given the kept prefix, the token at the cut is a plain draw from p.* A draft that was cut ends
   with its last token kept, and nothing was rejected there. The residual ``max(p - q, 0)`` is what
   is left of p after a draft token has had its chance; at the cut no token had one, so nothing is
   to be taken off. (``verify_standard`` and ``verify_block`` draw from the residual where
   ``num_accepted < lens`` and from p where ``num_accepted == lens``: lengths have to be those after
   the cut, and the q of an omitted position must not be used.)
2. *V is a martingale.* Standard rule: with ``a_i = prod min(1, p / q)``, all i tokens are kept with
   probability ``a_i``, so ``V_i = a_i F(x_1 .. x_i) + C_i``, where ``C_i`` is what rejections at
   positions up to i contribute. One more token x, drawn from q, turns ``a_i F`` into ``a_i`` times
   ``sum_x min(q, p)(x) F(.. x)`` if it is kept and ``sum_x max(p - q, 0)(x) F(.. x)`` if not;
   together ``a_i sum_x p(x) F(.. x) = a_i F``. So the mean of ``V_{i+1}`` over x is ``V_i``.
   Block rule: with ``pi_i`` and ``h_i`` as in ``verify.block_acceptance``, going back from the end,
   the first i tokens are kept with probability ``pi_i`` wherever the draft ends later, so
   ``V_i = pi_i F(x_1 .. x_i) + (1 - pi_i) C_i``, and ``C_i = h_{i-1} E_residual[F] + (1 - h_{i-1})
   C_{i-1}`` looks at tokens before ``x_i`` alone. The mean over x of ``pi_{i+1} F`` is ``sum
   min(pi_i p, q) F``; that of ``1 - pi_{i+1}`` is ``1 - pi_i + S_i``, which times ``h_i = S_i /
   (1 - pi_i + S_i)`` is ``S_i``, so residual draws add ``sum max(pi_i p - q, 0) F``; both make
   ``pi_i F``, and ``(1 - pi_i + S_i)(1 - h_i) C_i = (1 - pi_i) C_i``. Again ``V_i``.
3. *Stopping.* ``n <= K``, so by optional stopping the mean of ``V_n`` is ``V_0 = F()``: the
   target's law, for every f.
4. *Many requests under one budget.* The positions with the B highest survivals are verified.
   Survival never grows along a draft, and of equal ones the earlier position comes first, so the
   choice equals B turns of: take the highest open position, then its request's next one is open. A
   request's open position is known by its q before its token is drawn. Each turn reveals one token
   of one request, drawn independently of all else, so the product of the requests' ``V`` is a
   martingale too, and its mean is the product of the means: requests are also independent of each
   other, although what one drafted may have displaced the tokens of another. B itself is fixed
   beforehand.
5. Greedy and seeded requests (``match``) emit the target's own tokens, whatever is drafted or cut.

A cut by the drawn token's own probability breaks the first sentence, and 1 with it: the tokens that
are cut are not those of q. ``tests/specops/test_allocation.py`` plants one, and it is seen.

Shapes: R requests, K draft tokens, Q = K + 1, D draft vocabulary, T packed rows, F figures.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from specops.verify import count_leading

NUM_FIGURES = 3
"""Of a position: probability of its likeliest token, entropy in nats, and lead of the likeliest
over the second, of the drafter's distribution at temperature 1, before a token is drawn."""
TOP, ENTROPY, MARGIN = range(NUM_FIGURES)
NUM_HEAD_INPUTS = 5
"""Of ``head_scores``."""
LEAST_TOP = 1e-6
"""Lower probabilities of a position's likeliest token count as this in a head's inputs."""
Score = Literal["top", "entropy", "margin", "head"]
"""What a position's confidence is; see ``policies.allocation.Score``."""


def confidence(logits_RD: Tensor) -> Tensor:
    """[R, 3] float32 figures of the law that a draft token is about to be drawn from.

    Temperature and truncation are left out, so that figures mean the same for every request. A row
    that is not finite has no confidence at all: probability 0, entropy log D, lead 0.

    Args:
        logits_RD: [R, D] float, the drafter's.
    """
    logp_RD = logits_RD.float().log_softmax(dim=-1)
    best_R2 = logp_RD.topk(2, dim=-1).values.exp()
    entropy_R = torch.special.entr(logp_RD.exp()).sum(dim=-1)
    found = torch.stack((best_R2[:, 0], entropy_R, best_R2[:, 0] - best_R2[:, 1]), dim=1)
    found = found.clamp(min=0)  # a NaN stays one
    most = torch.log(torch.full_like(entropy_R, logits_RD.shape[-1]))
    none = torch.stack((torch.zeros_like(most), most, torch.zeros_like(most)), dim=1)
    return torch.where(found.isfinite().all(dim=1, keepdim=True), found, none)


def entropy_scores(figures_RKF: Tensor, gamma: Tensor) -> Tensor:
    """[R, K] AdaEDL's bound on acceptance, ``1 - sqrt(gamma H)``, at least 0.

    Source:
        Agrawal et al. 2024, arXiv:2410.18351, Section 3.
    """
    return (1 - (gamma * figures_RKF[..., ENTROPY]).sqrt()).clamp(min=0)


@dataclass(frozen=True, slots=True)
class HeadWeights:
    """A network of one hidden layer of H units; float32."""

    mean_N: Tensor
    """[5] subtracted from the inputs."""
    scale_N: Tensor
    """[5] they are multiplied with this after it."""
    w1_HN: Tensor
    b1_H: Tensor
    w2_H: Tensor
    b2: Tensor
    """[] of the output."""


def head_inputs(figures_RKF: Tensor, temperature_R: Tensor) -> Tensor:
    """[R, K, 5] float32: log of the top probability, entropy, lead, position from 0, and the
    request's temperature."""
    place = torch.arange(figures_RKF.shape[1], device=figures_RKF.device).float()
    top, entropy, margin = figures_RKF.unbind(dim=-1)
    place_RK = place.expand_as(top)
    warmth_RK = temperature_R.float()[:, None].expand_as(top)
    return torch.stack(
        (top.clamp(min=LEAST_TOP).log(), entropy, margin, place_RK, warmth_RK), dim=-1
    )


def head_scores(figures_RKF: Tensor, temperature_R: Tensor, head: HeadWeights) -> Tensor:
    """[R, K] predicted probability that a position is kept if all before it are."""
    x = (head_inputs(figures_RKF, temperature_R) - head.mean_N) * head.scale_N
    hidden = torch.tanh(x @ head.w1_HN.T + head.b1_H)
    return torch.sigmoid(hidden @ head.w2_H + head.b2)


def allocate(
    scores_RK: Tensor,
    offered_R: Tensor,
    threshold: Tensor,
    budget: Tensor,
    *,
    cumulative: bool,
) -> Tensor:
    """The length that each draft is cut to.

    A draft ends before the first position whose score, or with ``cumulative`` the product of all
    scores up to it, is below the threshold. Of what is left, the positions with the ``budget``
    highest products over the batch stay; equal ones from the front.

    Args:
        scores_RK: [R, K] float, confidence that a position is kept if those before it are, in
            [0, 1]; that of position k must depend on the draft before it alone.
        offered_R: [R] int64 in 0..K, lengths before the cut.
        threshold: [] float; 0 keeps every position.
        budget: [] float, most positions over the batch.

    Returns:
        [R] int64 in 0..offered.
    """
    num_requests, num_draft = scores_RK.shape
    sound_RK = scores_RK.nan_to_num(0.0).clamp(0, 1)
    # In float64, so that products of any order round to the same number; all the same, a parallel
    # one may round upwards from one position to the next.
    survival_RK = sound_RK.double().cumprod(dim=1).to(sound_RK.dtype).cummin(dim=1).values
    judged_RK = survival_RK if cumulative else sound_RK
    wanted_R = count_leading(judged_RK >= threshold, offered_R)
    place_K = torch.arange(num_draft, device=scores_RK.device)
    is_open_RK = place_K < wanted_R[:, None]
    # By position first, so that of equal survivals the earlier positions come first.
    ranked = survival_RK.masked_fill(~is_open_RK, -1.0).T.reshape(-1)
    order = ranked.argsort(descending=True, stable=True)
    rank = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=order.device))
    rank_RK = rank.view(num_draft, num_requests).T
    return count_leading(is_open_RK & (rank_RK < budget), wanted_R)


@dataclass(frozen=True, slots=True)
class CutValues:
    """Values of one step's cut; each [] float32."""

    threshold: Tensor
    budget: Tensor
    gamma: Tensor
    """Of the score ``entropy``."""


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
    """The length that each draft is cut to by a score of its figures; see ``allocate``.

    Args:
        figures_RKF: [R, K, 3] float32, of ``confidence``.
        offered_R: [R] int64 in 0..K, lengths before the cut.
        temperature_R: [R] float32, of the requests; read for the score ``head``.
        head: read for the score ``head``.
        noted_RC: [R, C] float32, of which the first 1 + 3 K columns receive what the cut was
            decided by: ``offered_R``, and the figures by position. ``None``: nothing is noted.

    Returns:
        [R] int64 in 0..offered.
    """
    if noted_RC is not None:
        noted_RC[:, 0] = offered_R
        noted_RC[:, 1 : 1 + NUM_FIGURES * figures_RKF.shape[1]] = figures_RKF.flatten(1)
    match score:
        case "top":
            scores_RK = figures_RKF[..., TOP]
        case "entropy":
            scores_RK = entropy_scores(figures_RKF, values.gamma)
        case "margin":
            scores_RK = figures_RKF[..., MARGIN]
        case "head":
            scores_RK = head_scores(figures_RKF, temperature_R, head)
    return allocate(scores_RK, offered_R, values.threshold, values.budget, cumulative=cumulative)


@dataclass(frozen=True, slots=True)
class PackedRows:
    """Rows of anchors and of draft tokens that are verified, one request after another, without
    those that were cut."""

    at_T: Tensor
    """[T] int64 index of each row among the R * Q rows of a whole round; 0 for padding."""
    request_T: Tensor
    """[T] int64 request of each row."""
    is_real_T: Tensor
    """[T] bool; the last rows may be padding."""
    of_RQ: Tensor
    """[R, Q] int64 packed row of each row of a whole round; for those that were cut, the last row
    of their request."""

    def spread(self, rows: Tensor) -> Tensor:
        """[R * Q, ...] rows of a whole round from packed ones [T, ...]. What was cut gets its
        request's last row: finite, and never looked at."""
        return rows.index_select(0, self.of_RQ.flatten())


def pack_rows(lens_R: Tensor, num_draft: int, capacity: int) -> PackedRows:
    """Pack the rows of drafts of these lengths.

    Args:
        lens_R: [R] int64 in 0..K, together at most ``capacity``.
        num_draft: K.
        capacity: draft tokens that there is room for; T is R + capacity.
    """
    device, num_requests = lens_R.device, len(lens_R)
    ends_R = (lens_R + 1).cumsum(dim=0)
    starts_R = ends_R - lens_R - 1
    row_T = torch.arange(num_requests + capacity, device=device)
    request_T = torch.searchsorted(ends_R, row_T, right=True).clamp(max=num_requests - 1)
    is_real_T = row_T < ends_R[-1]
    at_T = request_T * (num_draft + 1) + row_T - starts_R[request_T]
    place_Q = torch.arange(num_draft + 1, device=device)
    of_RQ = starts_R[:, None] + torch.minimum(place_Q, lens_R[:, None])
    return PackedRows(torch.where(is_real_T, at_T, 0), request_T, is_real_T, of_RQ)
