"""Changes that a request makes to the target's logits: token biases and repetition penalties.

The logits after draft token j are adjusted by everything before them, including draft tokens 1 ..
j: exactly what plain decoding would do if those had been committed.

Shapes: A requests with biases or penalties, Q positions, K draft tokens, V vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor


def penalized(
    logits_AQV: Tensor,
    bias_AV: Tensor,
    generated_AQV: Tensor,
    in_prompt_AV: Tensor,
    penalties_A3: Tensor,
) -> Tensor:
    """Apply biases and penalties, before temperature and truncation.

    The order is vLLM's and matters because repetition scales: first the bias is added; then the
    logit of every token in the prompt or the completion is divided by ``repetition`` if positive,
    else multiplied by it; finally ``frequency`` times the token's count in the completion is
    subtracted, and ``presence`` if it occurs there at all. Each operation is rounded to the dtype
    of the logits.

    Args:
        bias_AV: in that dtype; 0: none.
        generated_AQV: int, count of each token in the completion before each position.
        in_prompt_AV: bool.
        penalties_A3: presence, frequency, repetition.

    Source:
        Keskar et al. 2019, arXiv:1909.05858, Section 4.1 (repetition); OpenAI's API reference
        (frequency, presence, logit_bias).
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
