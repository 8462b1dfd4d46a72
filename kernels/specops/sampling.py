"""The distribution that a request's sampling parameters give, and sampling from it.

Shapes: R requests, K positions, V vocabulary; ``...`` stands for any leading dimensions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class SamplingRows:
    """Sampling parameters of R requests, as tensors on one device."""

    temperature_R: Tensor
    """[R] float; 0 is greedy."""
    top_k_R: Tensor
    """[R] int64; V: unlimited."""
    top_p_R: Tensor
    """[R] float in (0, 1]."""
    min_p_R: Tensor
    """[R] float in [0, 1)."""
    truncates: bool
    """Some request uses top-k, top-p or min-p, or the host does not know."""

    def of(self, requests_A: Tensor) -> SamplingRows:
        """The parameters of some requests, [A] int64."""
        return SamplingRows(
            self.temperature_R[requests_A], self.top_k_R[requests_A], self.top_p_R[requests_A],
            self.min_p_R[requests_A], self.truncates,
        )  # fmt: skip


def sampling_rows(
    temperatures: Sequence[float],
    top_ks: Sequence[int | None],
    top_ps: Sequence[float],
    min_ps: Sequence[float],
    vocab_size: int,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> SamplingRows:
    """Pack the parameters of R requests. Four small uploads."""
    top_k = [vocab_size if k is None else min(k, vocab_size) for k in top_ks]
    truncates = (
        any(k < vocab_size for k in top_k)
        or any(p < 1 for p in top_ps)
        or any(p > 0 for p in min_ps)
    )
    return SamplingRows(
        temperature_R=torch.tensor(temperatures, dtype=dtype, device=device),
        top_k_R=torch.tensor(top_k, dtype=torch.int64, device=device),
        top_p_R=torch.tensor(top_ps, dtype=dtype, device=device),
        min_p_R=torch.tensor(min_ps, dtype=dtype, device=device),
        truncates=truncates,
    )


def are_sound(logits: Tensor) -> Tensor:
    """[...] bool: the largest of a row's logits [..., V] is finite, so the row has a distribution.
    A single -inf only masks its token; a NaN counts as the largest."""
    return logits.amax(dim=-1).isfinite()


def distribution(logits_RKV: Tensor, rows: SamplingRows) -> Tensor:
    """Probabilities after temperature, then min-p, top-k and top-p, renormalised.

    Greedy rows become one-hot at the argmax (the lowest id wins ties, as in ``argmax``).
    Truncation breaks ties in id order, so exactly min(k, V) tokens survive top-k.

    Args:
        logits_RKV: [R, K, V] float.
        rows: parameters of the R requests.

    Returns:
        [R, K, V] of the same dtype; rows sum to 1.
    """
    greedy_R = rows.temperature_R == 0
    has_greedy = bool(greedy_R.any())
    heat_R = rows.temperature_R
    if has_greedy:
        heat_R = torch.where(greedy_R, torch.ones_like(heat_R), heat_R)
    probs = torch.softmax(logits_RKV / heat_R[:, None, None].to(logits_RKV.dtype), dim=-1)
    if rows.truncates:
        probs = _truncate_some(probs, rows)
    if not has_greedy:
        return probs
    one_hot = torch.zeros_like(probs).scatter_(-1, logits_RKV.argmax(-1, keepdim=True), 1.0)
    return torch.where(greedy_R[:, None, None], one_hot, probs)


def _truncate_some(probs_RKV: Tensor, rows: SamplingRows) -> Tensor:
    """``truncate`` of the requests that ask for it. Sorting 4,096 tokens takes longer than all else
    that is done with a row, so it is not done for requests that keep them all."""
    vocab_size = probs_RKV.shape[-1]
    cuts_R = (rows.top_k_R < vocab_size) | (rows.top_p_R < 1) | (rows.min_p_R > 0)
    cut = cuts_R.nonzero()[:, 0]
    if len(cut) in (0, len(cuts_R)):
        return truncate(probs_RKV, rows) if len(cut) else probs_RKV
    return probs_RKV.index_copy_(0, cut, truncate(probs_RKV[cut], rows.of(cut)))


def truncate(probs_RKV: Tensor, rows: SamplingRows) -> Tensor:
    """Apply min-p and top-k, renormalise, apply top-p to the rest, and renormalise.

    top-p keeps the smallest set whose mass reaches p, including the token that crosses it.
    """
    ordered, ids = probs_RKV.sort(dim=-1, descending=True, stable=True)
    rank = torch.arange(ordered.shape[-1], device=ordered.device)
    keep = ordered >= rows.min_p_R[:, None, None].to(ordered.dtype) * ordered[..., :1]
    keep &= rank < rows.top_k_R[:, None, None]
    ordered = torch.where(keep, ordered, torch.zeros_like(ordered))
    ordered = ordered / ordered.sum(dim=-1, keepdim=True)
    before = ordered.cumsum(dim=-1) - ordered
    # p = 1 keeps everything: rounding in the cumulative sum must not cut the tail.
    limit = rows.top_p_R[:, None, None].to(ordered.dtype)
    keep = (before < limit) | (limit >= 1)
    ordered = torch.where(keep, ordered, torch.zeros_like(ordered))
    ordered = ordered / ordered.sum(dim=-1, keepdim=True)
    return torch.empty_like(ordered).scatter_(-1, ids, ordered)


def draw(probs: Tensor, uniforms: Tensor) -> Tensor:
    """Sample one id from each distribution by inverting its cumulative sum.

    Never returns an id of probability 0, however the last sums are rounded.

    Args:
        probs: [..., V] float, need not be normalised; each row has positive mass.
        uniforms: [...] float64 in [0, 1).

    Returns:
        [...] int64.
    """
    sums = probs.double().cumsum(dim=-1)
    # The threshold is below the total, so the first sum above it belongs to a token with mass.
    threshold = torch.minimum(
        uniforms * sums[..., -1], torch.nextafter(sums[..., -1], uniforms * 0)
    )
    return torch.searchsorted(sums, threshold[..., None], right=True)[..., 0]


def race(probs: Tensor, exponentials: Tensor) -> Tensor:
    """Sample one id from each distribution: that of the largest probability / exponential number.

    The same law as ``draw``, but no sum over the vocabulary decides. Where ``draw`` compares a
    number with a cumulative sum, whose last bits depend on how a batch was computed, every token
    before the drawn one adds to the error; here only the two leaders of the race can change places.

    Args:
        probs: [..., V] float, need not be normalised; each row has positive mass.
        exponentials: [..., V] float64, from ``rng.device_exponentials``.

    Returns:
        [...] int64. The lowest id wins ties.

    Source:
        The Gumbel-max trick, in its exponential form: Maddison et al. 2014, "A* sampling",
        arXiv:1411.0030, Section 2.
    """
    return (probs / exponentials).argmax(dim=-1)
