"""What a request adds to the target's logits: a bias of single tokens, and penalties on repetition.

The logits after draft token j are adjusted by what stands before them, draft tokens 1 .. j
included: exactly what plain decoding would have done, had those been committed.

Shapes: R requests, A of them that adjust, K draft tokens, V vocabulary, T packed tokens.
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
    """Token ids of A requests, one list after the other."""

    owner_T: Tensor
    """[T] int64 in 0..A-1, whose token it is."""
    ids_T: Tensor
    """[T] int64 in 0..V-1."""


@dataclass(frozen=True, slots=True)
class Adjustments:
    """Biases and penalties of those requests of a batch that have any, on one device."""

    rows_A: Tensor
    """[A] int64 in 0..R-1: their places in the batch."""
    presence_A: Tensor
    """[A] float; 0 is none."""
    frequency_A: Tensor
    """[A] float; 0 is none."""
    repetition_A: Tensor
    """[A] float > 0; 1 is none."""
    prompt: TokenLists
    """What only ``repetition`` looks at."""
    generated: TokenLists
    """What every penalty looks at."""
    biased: TokenLists
    bias_T: Tensor
    """[T] float, added to the logits of ``biased``."""


def token_lists(lists: Sequence[Sequence[int]], device: torch.device | str = "cpu") -> TokenLists:
    """Pack one list for each of A requests. Two small uploads."""
    lengths = [len(ids) for ids in lists]
    owners = np.repeat(np.arange(len(lists)), lengths)
    ids = np.fromiter(itertools.chain.from_iterable(lists), np.int64, sum(lengths))
    return TokenLists(torch.from_numpy(owners).to(device), torch.from_numpy(ids).to(device))


def adjust_logits(logits_RQV: Tensor, draft_RK: Tensor, adjustments: Adjustments) -> Tensor:
    """Logits as each request wants them, before temperature and truncation.

    In this order, which is vLLM's and matters because repetition scales: the bias is added; a
    token of the prompt or of the completion has its logit divided by ``repetition`` where it is
    above 0 and multiplied elsewhere; ``frequency`` times its count in the completion, and
    ``presence`` if it occurs there at all, are subtracted.

    Args:
        logits_RQV: [R, K + 1, V] float, after 0 .. K draft tokens; not changed.
        draft_RK: [R, K] int64.

    Returns:
        [R, K + 1, V] of the same dtype; rows that do not adjust are the same bits.

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
    """The order of operations of ``adjust_logits``, each rounded to the dtype of the logits.

    Args:
        bias_AV: of that dtype; 0 is none.
        generated_AQV: int, how often each token stands in the completion before each position.
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
    """[A, K + 1, V] int32: how often each token occurs among the first 0 .. K draft tokens."""
    num_requests, num_draft = draft_AK.shape
    shape = (num_requests, num_draft + 1, vocab_size)
    counts = torch.zeros(shape, dtype=torch.int32, device=draft_AK.device)
    counts[:, 1:].scatter_(-1, draft_AK[..., None], 1)
    return counts.cumsum(dim=1, dtype=torch.int32)


def _counts(lists: TokenLists, own_AQV: Tensor) -> Tensor:
    """[A, V] int32: how often each token occurs in each list."""
    counts = torch.zeros_like(own_AQV[:, 0], dtype=torch.int32)
    ones = torch.ones_like(lists.ids_T, dtype=torch.int32)
    return counts.index_put_((lists.owner_T, lists.ids_T), ones, accumulate=True)
