"""Expected acceptance of drafts, computed from probabilities alone.

Shapes: B requests, N chains, K draft positions, V vocabulary.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
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


def conditional_acceptance(
    alphas_NK: Tensor, weights_N: Tensor | None = None
) -> list[float | None]:
    """Acceptance at each position over all chains, given that all earlier positions were kept.

    Args:
        weights_N: [N] float64, of the chains; ``None``: all count alike.

    ``None`` at positions that no chain reaches. The running product is the survival of position k,
    from which a policy can price every K.
    """
    weights_N = alphas_NK.new_ones(len(alphas_NK)) if weights_N is None else weights_N
    kept_NK = weights_N.double()[:, None] * alphas_NK.double().cumprod(dim=1)
    kept = [float(weights_N.sum()), *kept_NK.sum(dim=0).tolist()]
    return [after / before if before > 0 else None for before, after in itertools.pairwise(kept)]


@dataclass(frozen=True, slots=True)
class Chains:
    """Acceptance of the chains that begin at each token of some texts, and how often rounds do.

    A round that keeps five tokens leaves out four places where another could have begun. So rounds
    begin more often where drafts are rejected, and the mean over all places is too high: by 12 %
    for EAGLE-3 on chat answers of SmolLM2-135M-Instruct. And an answer ends where the target ends
    it, whatever the last round drafted. So a text's tokens are divided by its rounds.
    """

    alphas_NK: Tensor
    """[N, K] float32 on the CPU, acceptance of each position given that all earlier ones were kept:
    either figure of ``drafters.trainable.ChainAcceptance``; 0 behind the end of a text."""
    starts_NK: Tensor
    """[N, K] float64, probability that a round of k + 1 draft tokens at most begins here, where
    all rounds of a text draft so many and one begins at its first chain."""
    is_full_N: Tensor
    """[N] bool, the text has all K tokens of the chain."""

    @classmethod
    def none(cls, num_draft: int) -> Chains:
        """No chain."""
        nothing = torch.zeros(0, num_draft)
        return cls(nothing, nothing.double(), torch.zeros(0, dtype=torch.bool))

    @classmethod
    def of_texts(cls, texts: Sequence[Tensor], is_full: Sequence[Tensor]) -> list[Chains]:
        """
        Args:
            texts: [N_i, K] of each text, its chains in order, one for each token.
            is_full: [N_i] bool, see ``is_full_N``.
        """
        starts = _round_starts([text.double().numpy() for text in texts])
        return [
            cls(text, torch.from_numpy(begins), full)
            for text, begins, full in zip(texts, starts, is_full, strict=True)
        ]

    @classmethod
    def join(cls, parts: Sequence[Chains], num_draft: int) -> Chains:
        """The chains of all parts."""
        every = [cls.none(num_draft), *parts]
        return cls(
            torch.cat([part.alphas_NK for part in every]),
            torch.cat([part.starts_NK for part in every]),
            torch.cat([part.is_full_N for part in every]),
        )

    def __len__(self) -> int:
        return len(self.alphas_NK)

    def tokens_by_k(self) -> list[float] | None:
        """tokens_per_step of rounds of 1, 2, ... K draft tokens; ``None`` without chains."""
        if not len(self):
            return None
        tokens: list[float] = (len(self) / self.starts_NK.sum(dim=0)).tolist()
        return tokens

    def tokens_per_step(self) -> float | None:
        """That of rounds of K draft tokens."""
        tokens = self.tokens_by_k()
        return tokens[-1] if tokens else None

    def acceptance(self) -> list[float]:
        """Acceptance at each position where rounds of K draft tokens begin, given that all earlier
        positions were kept, up to the last one that is reached. Texts' last rounds, which the end
        cuts, do not count."""
        full = self.is_full_N
        found = conditional_acceptance(self.alphas_NK[full], self.starts_NK[full, -1])
        return [one for one in found if one is not None]


def _round_starts(texts: Sequence[np.ndarray]) -> list[np.ndarray]:
    """For each text [N_i, K] of acceptances: [N_i, K] of ``Chains.starts_NK``."""
    if not texts:
        return []
    num_draft, longest = texts[0].shape[1], max(map(len, texts))
    alphas = np.zeros((len(texts), longest, num_draft))
    for place, text in enumerate(texts):
        alphas[place, : len(text)] = text
    kept = np.concatenate((np.ones((*alphas.shape[:2], 1)), alphas.cumprod(axis=2)), axis=2)
    # [texts, tokens, k, length]: probability that a round of k + 1 drafts brings length + 1 tokens
    lengths = np.zeros((*alphas.shape, num_draft + 1))
    for k in range(num_draft):
        lengths[:, :, k, : k + 1] = kept[:, :, : k + 1] - kept[:, :, 1 : k + 2]
        lengths[:, :, k, k + 1] = kept[:, :, k + 1]
    starts = np.zeros((len(texts), longest + num_draft + 1, num_draft))
    starts[:, 0] = 1.0
    for token in range(longest):
        ahead = starts[:, token, :, None] * lengths[:, token]
        starts[:, token + 1 : token + num_draft + 2] += ahead.transpose(0, 2, 1)
    return [starts[place, : len(text)] for place, text in enumerate(texts)]
