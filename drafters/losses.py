"""What a drafter is trained on: divergences from the target, and the weight of each draft position.

Shapes: R rows, H hidden, V vocabulary of the drafter, K draft positions; leading dimensions of the
plain functions are free. ``target_probs`` are the target's probabilities of the drafter's tokens;
with a reduced vocabulary a row sums to the mass the drafter can reach, which may be below 1.

``head_losses`` computes the same values and gradients as the plain functions, in blocks that stay
in cache and without keeping logits; the plain functions are its definition.
"""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

LossKind = Literal["lk", "forward_kl"]

ETA = 3.0
"""Speed at which LK moves from KL to TV as acceptance grows."""
FLOOR = 0.5
"""Least survival that D-PACE grants a position."""


def forward_kl(target_probs: Tensor, draft_logits: Tensor) -> Tensor:
    """KL(target || drafter) in nats: ``sum_x p'(x) (log p'(x) - log q(x))``.

    p' is p renormalised over the drafter's vocabulary. Gradient in the logits: ``q - p'``.

    Args:
        target_probs: [..., V], no gradient.
        draft_logits: [..., V].

    Returns:
        [...], >= 0.
    """
    renormalised = target_probs / target_probs.sum(dim=-1, keepdim=True)
    log_ratio = renormalised.clamp_min(1e-38).log() - draft_logits.log_softmax(dim=-1)
    return (renormalised * log_ratio).sum(dim=-1)


def overlap(target_probs: Tensor, draft_logits: Tensor) -> Tensor:
    """Probability that a token sampled from the drafter survives: ``alpha = sum_x min(p, q)``.

    Not renormalised: with a reduced vocabulary, p's mass outside counts as lost.
    """
    return torch.minimum(target_probs, draft_logits.softmax(dim=-1)).sum(dim=-1)


def total_variation(target_probs: Tensor, draft_logits: Tensor) -> Tensor:
    """TV distance ``1 - alpha``, in [0, 1].

    Gradient in the logits: ``q (E_q[m] - m)`` with m = 1 where q < p: weak where q is near 0 on
    p's mass, which is why it is not used alone.
    """
    return 1 - overlap(target_probs, draft_logits)


def lk_hybrid(target_probs: Tensor, draft_logits: Tensor, eta: float = ETA) -> Tensor:
    """``lambda KL + (1 - lambda) TV`` with ``lambda = exp(-eta * stop_gradient(alpha))``, per row.

    A row the drafter misses is pulled by KL, a row it nearly has by the acceptance itself.

    Source:
        LK losses, arXiv:2602.23881 (eta = 3).
    """
    alpha = overlap(target_probs, draft_logits)
    share = torch.exp(-eta * alpha.detach())
    return share * forward_kl(target_probs, draft_logits) + (1 - share) * (1 - alpha)


def dpace_weights(label_probs_KN: Tensor, valid_KN: Tensor, floor: float = FLOOR) -> Tensor:
    """Weight of each position of a chain: how much tokens_per_step would gain from it.

    ``s_k = (1 - a) exp(-CE_k) + a``, ``w_k = sum_{j >= k} prod_{i <= j} s_i``. A chain ends at its
    first invalid position, whose weight and all later ones are 0.

    Args:
        label_probs_KN: [K, N] ``exp(-CE_k)``, drafter's probability of the committed token.
        valid_KN: [K, N] bool, positions that have a loss.
        floor: a.

    Returns:
        [K, N] without gradient.

    Source:
        D-PACE, as in speculators and SpecForge (a = 0.5).
    """
    survival_KN = ((1 - floor) * label_probs_KN.detach() + floor) * valid_KN
    reached_KN = survival_KN.cumprod(dim=0)
    return reached_KN.flip(0).cumsum(dim=0).flip(0)


class TargetRows(NamedTuple):
    """The target's distribution at R rows, over the drafter's vocabulary. Shared by all steps."""

    probs_RV: Tensor
    """float32, not renormalised."""
    mass_R: Tensor
    """Sum of each row of ``probs_RV``, > 0."""
    negative_entropy_R: Tensor
    """``sum p' log p'`` of the renormalised rows, nats."""
    label_ids_R: Tensor
    """Draft id of the committed token, int64; any id where ``label_known_R`` is False."""
    label_known_R: Tensor
    """bool: the committed token is in the drafter's vocabulary."""


class RowLosses(NamedTuple):
    """What ``head_losses`` says of each row. Only ``loss_R`` has a gradient."""

    loss_R: Tensor
    alpha_R: Tensor
    label_prob_R: Tensor
    """Drafter's probability of the committed token; 0 outside its vocabulary."""
    agrees_R: Tensor
    """bool: no token of the drafter's is likelier than the committed one."""


def head_losses(
    hidden_NH: Tensor,
    weight_VH: Tensor,
    target: TargetRows,
    rows_N: Tensor,
    kind: LossKind,
    chunk_rows: int,
) -> RowLosses:
    """Loss of every row straight from the lm_head's input, ``chunk_rows`` rows at a time.

    Equals ``lk_hybrid`` or ``forward_kl`` of ``hidden_NH @ weight_VH.T``. The gradient in the
    logits is formed in the forward pass, so one [N, V] tensor of the weight's dtype is kept and
    nothing is computed twice: 0.33 s instead of 0.64 s for 2,048 rows of 256 by 4,096 tokens, both
    directions, on one core, of which the matrix products take 0.17 s.

    Args:
        hidden_NH: after the drafter's final norm; its dtype is that of the matrix products.
        weight_VH: same dtype.
        rows_N: [N] int64, which row of ``target`` each one predicts.
    """
    columns: tuple[Tensor, ...] = _HeadLosses.apply(  # type: ignore[no-untyped-call]
        hidden_NH, weight_VH, target, rows_N, kind, chunk_rows
    )
    return RowLosses(*columns)


class _HeadLosses(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        target: TargetRows,
        rows: Tensor,
        kind: LossKind,
        chunk: int,
    ) -> tuple[Tensor, ...]:
        slopes = hidden.new_empty((hidden.shape[0], weight.shape[0]))
        blocks = []
        for start in range(0, max(hidden.shape[0], 1), chunk):
            part = slice(start, start + chunk)
            wanted = TargetRows(*(column[rows[part]] for column in target))
            blocks.append(_block(hidden[part] @ weight.T, wanted, kind, slopes[part]))
        out = tuple(torch.cat(columns) for columns in zip(*blocks, strict=True))
        ctx.mark_non_differentiable(*out[1:])
        ctx.save_for_backward(hidden, weight, slopes)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, slopes = ctx.saved_tensors
        scale = grads[0][:, None].to(slopes.dtype)
        return (slopes @ weight) * scale, slopes.T @ (hidden * scale), None, None, None, None


def _block(logits: Tensor, target: TargetRows, kind: LossKind, slope: Tensor) -> RowLosses:
    """Row losses of one block; ``slope`` takes the gradient of each in its logits.

    Written in few passes over [R, V]: on a CPU they take as long as the matrix products.
    """
    scores = logits if logits.dtype == torch.float64 else logits.float()
    probs = scores.softmax(dim=-1)
    top = scores.amax(dim=-1)
    log_norm = top - probs.amax(dim=-1).log()
    label = target.label_ids_R[:, None]
    label_prob = probs.gather(1, label)[:, 0] * target.label_known_R
    agrees = (scores.gather(1, label)[:, 0] >= top) & target.label_known_R
    alpha = torch.minimum(target.probs_RV, probs).sum(dim=-1)
    cross = log_norm - (target.probs_RV * scores).sum(dim=-1) / target.mass_R
    kl = target.negative_entropy_R + cross
    if kind == "forward_kl":
        slope.copy_(probs.addcmul_(target.probs_RV, target.mass_R.reciprocal()[:, None], value=-1))
        return RowLosses(kl, alpha, label_prob, agrees)
    share = torch.exp(-ETA * alpha)
    below = torch.where(probs < target.probs_RV, probs, 0)
    pull = share + (1 - share) * below.sum(dim=-1)
    probs.mul_(pull[:, None]).addcmul_(below, (share - 1)[:, None])
    slope.copy_(probs.addcmul_(target.probs_RV, (share / target.mass_R)[:, None], value=-1))
    return RowLosses(share * kl + (1 - share) * (1 - alpha), alpha, label_prob, agrees)
