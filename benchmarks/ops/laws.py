"""Logits like those of a language model, a reduced draft vocabulary, and distributions in torch.

Shapes: R requests, D draft vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from specops.draft_sampling import VocabMap, vocab_map
from specops.rng import Numbering

TEMPERATURE = 0.8
LIKELY = 256


@dataclass(frozen=True, slots=True)
class Sizes:
    """Sizes to measure."""

    vocab: int = 151_936
    draft_vocab: int = 32_000
    requests: tuple[int, ...] = (1, 8, 64)


TINY = Sizes(vocab=4000, draft_vocab=1000, requests=(1, 3))
"""Sizes for trying a benchmark without a GPU."""


def likely_logits(*shape: int, device: str) -> Tensor:
    """[..., V] float32: 256 tokens with p ~ rank ** -2 above a normally distributed bulk."""
    logits = 2.5 * torch.randn(*shape, device=device)
    ids = torch.rand(*shape, device=device).topk(LIKELY).indices
    ranks = torch.arange(1, LIKELY + 1, device=device, dtype=torch.float32)
    return logits.scatter_(-1, ids, (22 - 2 * ranks.log()).expand_as(ids))


def make_vocab(sizes: Sizes, device: str) -> VocabMap:
    """A map for draft tokens drawn at random from the target's vocabulary, in order."""
    chosen = torch.randperm(sizes.vocab, device=device)[: sizes.draft_vocab].sort().values
    return vocab_map(chosen - torch.arange(sizes.draft_vocab, device=device), sizes.vocab)


def target_ids(vocab: VocabMap) -> Tensor:
    """[D]: the target id of each draft token."""
    return torch.arange(len(vocab.d2t_D), device=vocab.d2t_D.device) + vocab.d2t_D


def numbering_of(num_requests: int, device: str) -> Numbering:
    """Numbering of requests with distinct keys and positions."""
    request = torch.arange(num_requests, device=device)
    return Numbering(request * 7919, request * 0 + 1, request + 100)


def plain_law(
    logits: Tensor, temperature: float | Tensor, top_p: float, top_k: int | None = None
) -> Tensor:
    """Probabilities with the shape of ``logits``, float32; top-k is applied first."""
    probs = (logits.float() / temperature).softmax(-1)
    if top_k is None and top_p == 1:
        return probs
    if top_k is None:
        ordered, ids = probs.sort(dim=-1, descending=True)
        law = torch.empty_like(probs)  # every entry is written
    else:
        ordered, ids = probs.topk(top_k)
        ordered = ordered / ordered.sum(-1, keepdim=True)
        law = torch.zeros_like(probs)
    ordered = torch.where(ordered.cumsum(-1) - ordered < top_p, ordered, 0.0)
    return law.scatter_(-1, ids, ordered / ordered.sum(-1, keepdim=True))
