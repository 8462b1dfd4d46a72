"""Changes that a request makes to the target's logits: token biases and repetition penalties.

The logits after draft token j are adjusted by everything before them, including draft tokens 1 ..
j: exactly what plain decoding would do had those been committed.

Shapes: R requests, A of them with biases or penalties, K draft tokens, V vocabulary, T packed
tokens.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class TokenLists:
    """Token ids of A requests, lists concatenated."""

    owner_T: Tensor
    """[T] int64 in 0..A-1, the request that each token belongs to."""
    ids_T: Tensor
    """[T] int64 in 0..V-1."""


@dataclass(frozen=True, slots=True)
class Adjustments:
    """Biases and penalties of the requests of a batch that have any, on one device."""

    rows_A: Tensor
    """[A] int64 in 0..R-1, the requests' indices in the batch."""
    presence_A: Tensor
    """[A] float; 0: none."""
    frequency_A: Tensor
    """[A] float; 0: none."""
    repetition_A: Tensor
    """[A] float > 0; 1: none."""
    prompt: TokenLists
    """Prompt tokens that count; only ``repetition`` uses them."""
    generated: TokenLists
    """Completion tokens that count; every penalty uses them."""
    biased: TokenLists
    bias_T: Tensor
    """[T] float, added to the logits of the tokens in ``biased``."""


def token_lists(lists: Sequence[Sequence[int]], device: torch.device | str = "cpu") -> TokenLists:
    """Pack one list per request. Two small uploads."""
    lengths = [len(ids) for ids in lists]
    owners = np.repeat(np.arange(len(lists)), lengths)
    ids = np.fromiter(itertools.chain.from_iterable(lists), np.int64, sum(lengths))
    return TokenLists(torch.from_numpy(owners).to(device), torch.from_numpy(ids).to(device))


def adjust_logits(logits_RQV: Tensor, draft_RK: Tensor, adjustments: Adjustments) -> Tensor:
    """Apply each request's biases and penalties, before temperature and truncation.

    The order is vLLM's and matters because repetition scales: first the bias is added; then the
    logit of every token in the prompt or the completion is divided by ``repetition`` if positive,
    else multiplied by it; finally ``frequency`` times the token's count in the completion is
    subtracted, and ``presence`` if it occurs there at all.

    Args:
        logits_RQV: [R, K + 1, V] float, after 0 .. K draft tokens; not changed.
        draft_RK: [R, K] int64.

    Returns:
        [R, K + 1, V] of the same dtype; rows of other requests are bitwise unchanged.

    Source:
        Keskar et al. 2019, arXiv:1909.05858, Section 4.1 (repetition); OpenAI's API reference
        (frequency, presence, logit_bias).
    """
    a = adjustments
    own, draft = logits_RQV[a.rows_A], draft_RK[a.rows_A]
    bias = torch.zeros_like(own[:, 0])
    bias.index_put_((a.biased.owner_T, a.biased.ids_T), a.bias_T.to(own.dtype))
    generated = _counts(a.generated, own)[:, None] + counts_before(draft, own.shape[-1])
    in_prompt = _counts(a.prompt, own) > 0
    penalties = torch.stack((a.presence_A, a.frequency_A, a.repetition_A), dim=1)
    return logits_RQV.index_copy(0, a.rows_A, penalized(own, bias, generated, in_prompt, penalties))


def penalized(
    logits_AQV: Tensor,
    bias_AV: Tensor,
    generated_AQV: Tensor,
    in_prompt_AV: Tensor,
    penalties_A3: Tensor,
) -> Tensor:
    """The operations of ``adjust_logits``, each rounded to the dtype of the logits.

    Args:
        bias_AV: in that dtype; 0: none.
        generated_AQV: int, count of each token in the completion before each position.
        in_prompt_AV: bool.
        penalties_A3: presence, frequency, repetition.
    """
    presence, frequency, repetition = penalties_A3.to(logits_AQV.dtype)[:, None, None].unbind(-1)
    is_seen = (generated_AQV > 0) | in_prompt_AV[:, None]
    own = logits_AQV + bias_AV[:, None]
    scaled = torch.where(own > 0, own / repetition, own * repetition)
    own = torch.where(is_seen, scaled, own)
    own = own - frequency * generated_AQV
    return own - presence * (generated_AQV > 0)


def counts_before(draft_AK: Tensor, vocab_size: int) -> Tensor:
    """[A, K + 1, V] int32: count of each token among the first 0 .. K draft tokens."""
    num_requests, num_draft = draft_AK.shape
    shape = (num_requests, num_draft + 1, vocab_size)
    counts = torch.zeros(shape, dtype=torch.int32, device=draft_AK.device)
    counts[:, 1:].scatter_(-1, draft_AK[..., None], 1)
    return counts.cumsum(dim=1, dtype=torch.int32)


def _counts(lists: TokenLists, own_AQV: Tensor) -> Tensor:
    """[A, V] int32: count of each token in each list."""
    counts = torch.zeros_like(own_AQV[:, 0], dtype=torch.int32)
    ones = torch.ones_like(lists.ids_T, dtype=torch.int32)
    return counts.index_put_((lists.owner_T, lists.ids_T), ones, accumulate=True)
