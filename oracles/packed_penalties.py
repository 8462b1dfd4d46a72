"""Biases and penalties from packed token lists: the reference for the tables of lanes.

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

from specops.penalties import counts_before, penalized


@dataclass(frozen=True, slots=True)
class TokenLists:
    """Concatenated lists of token ids, one list per request."""

    owner_T: Tensor
    """[T] int64 in 0..A-1, the request that each token belongs to."""
    ids_T: Tensor
    """[T] int64 in 0..V-1."""


@dataclass(frozen=True, slots=True)
class Adjustments:
    """Biases and penalties of those requests in a batch that have any, on one device."""

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
    """Pack one list per request, with two small uploads."""
    lengths = [len(ids) for ids in lists]
    owners = np.repeat(np.arange(len(lists)), lengths)
    ids = np.fromiter(itertools.chain.from_iterable(lists), np.int64, sum(lengths))
    return TokenLists(torch.from_numpy(owners).to(device), torch.from_numpy(ids).to(device))


def adjust_logits(logits_RQV: Tensor, draft_RK: Tensor, adjustments: Adjustments) -> Tensor:
    """Apply each request's biases and penalties, before temperature and truncation.

    Args:
        logits_RQV: [R, K + 1, V] float, after 0 .. K draft tokens; not changed.
        draft_RK: [R, K] int64.

    Returns:
        [R, K + 1, V] of the same dtype; rows of other requests are bitwise unchanged.
    """
    a = adjustments
    own, draft = logits_RQV[a.rows_A], draft_RK[a.rows_A]
    bias = torch.zeros_like(own[:, 0])
    bias.index_put_((a.biased.owner_T, a.biased.ids_T), a.bias_T.to(own.dtype))
    generated = _counts(a.generated, own)[:, None] + counts_before(draft, own.shape[-1])
    in_prompt = _counts(a.prompt, own) > 0
    penalties = torch.stack((a.presence_A, a.frequency_A, a.repetition_A), dim=1)
    return logits_RQV.index_copy(0, a.rows_A, penalized(own, bias, generated, in_prompt, penalties))


def _counts(lists: TokenLists, own_AQV: Tensor) -> Tensor:
    """[A, V] int32: count of each token in each request's list."""
    counts = torch.zeros_like(own_AQV[:, 0], dtype=torch.int32)
    ones = torch.ones_like(lists.ids_T, dtype=torch.int32)
    return counts.index_put_((lists.owner_T, lists.ids_T), ones, accumulate=True)
