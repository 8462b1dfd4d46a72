"""Expected acceptance of drafts, computed from probabilities alone.

Shapes: B requests, N chains, K draft positions, V vocabulary.
"""

from __future__ import annotations

import itertools

import torch
from torch import Tensor


def expected_acceptance(target_probs_BKV: Tensor, draft_probs_BKV: Tensor) -> Tensor:
    """Probability that each proposed token survives verification.

    For one position it is ``sum_x min(target(x), draft(x))``: 1 when the two distributions
    agree, 0 when they share no token. Differentiable in both arguments.

    Args:
        target_probs_BKV: [B, K, V] float32, target probabilities; each row sums to 1.
        draft_probs_BKV: [B, K, V] float32, drafter probabilities; each row sums to 1.

    Returns:
        [B, K] float32 in [0, 1], no unit.

    Raises:
        ValueError: the shapes differ. Row sums are not checked: that would synchronise the GPU.

    Source:
        Leviathan et al. 2023, arXiv:2211.17192, Section 3.
    """
    if target_probs_BKV.shape != draft_probs_BKV.shape:
        raise ValueError(
            f"target and draft must have one shape [B, K, V], "
            f"got {tuple(target_probs_BKV.shape)} and {tuple(draft_probs_BKV.shape)}"
        )
    return torch.minimum(target_probs_BKV, draft_probs_BKV).sum(dim=-1)


def simulated_tokens_per_step(alphas_NK: Tensor, draft_k: int) -> float | None:
    """tokens_per_step of chains of ``draft_k`` tokens: ``1 + sum_k prod_{i<=k} a_i``.

    Averaged over the chains; ``None`` if there are none.

    Args:
        alphas_NK: [N, K] acceptance of each position given that all earlier ones were kept: 0 or 1
            for a greedy request, else ``sum_x min(p, q)`` at the request's temperature.
        draft_k: positions used, 0..K.

    Raises:
        ValueError: ``draft_k`` is beyond K.
    """
    if not 0 <= draft_k <= alphas_NK.shape[1]:
        raise ValueError(f"draft_k must be in 0..{alphas_NK.shape[1]}, got {draft_k}")
    if alphas_NK.shape[0] == 0:
        return None
    kept_NK = alphas_NK[:, :draft_k].double().cumprod(dim=1)
    return float(1 + kept_NK.sum(dim=1).mean())


def conditional_acceptance(alphas_NK: Tensor) -> list[float | None]:
    """Acceptance at each position over all chains, given that all earlier positions were kept.

    ``None`` at positions that no chain reaches. The running product is the survival of position k,
    from which a policy can price every K.
    """
    kept_NK = alphas_NK.double().cumprod(dim=1)
    kept = [float(alphas_NK.shape[0]), *kept_NK.sum(dim=0).tolist()]
    return [after / before if before > 0 else None for before, after in itertools.pairwise(kept)]
