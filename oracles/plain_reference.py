"""Reference answers: one full forward pass of the target per token, without KV cache, batching or
drafts; biases and penalties are applied token by token in plain Python."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from serving.requests import Request
from specops.rng import Stream, device_exponentials
from specops.sampling import distribution, race, sampling_rows


def adjusted(
    logits: Sequence[float],
    prompt: Sequence[int],
    completion: Sequence[int],
    presence: float,
    frequency: float,
    repetition: float,
    bias: dict[int, float],
) -> list[float]:
    """Logits of one position after bias and repetition, frequency and presence penalties."""
    out = []
    for token, logit in enumerate(logits):
        value = logit + bias.get(token, 0.0)
        if token in prompt or token in completion:
            value = value / repetition if value > 0 else value * repetition
        value -= frequency * completion.count(token)
        value -= presence * (token in completion)
        out.append(value)
    return out


@torch.no_grad()
def decode(model: Any, request: Request) -> list[int]:
    """Decode ``max_tokens`` tokens of a greedy or seeded request; nothing stops it early."""
    shape, tokens = request.sampling, list(request.prompt_ids)
    for _ in range(shape.max_tokens):
        logits = model(torch.tensor([tokens])).logits[0, -1].double()
        wanted = adjusted(
            logits.tolist(),
            request.prompt_ids,
            tokens[len(request.prompt_ids) :],
            shape.presence_penalty,
            shape.frequency_penalty,
            shape.repetition_penalty,
            dict(shape.logit_bias),
        )
        tokens.append(chosen(torch.tensor(wanted, dtype=torch.float64), request, len(tokens)))
    return tokens[len(request.prompt_ids) :]


def chosen(logits_V: torch.Tensor, request: Request, position: int) -> int:
    """The token that a greedy or seeded request takes at a position."""
    shape = request.sampling
    if shape.temperature == 0:
        return int(logits_V.argmax())
    rows = sampling_rows(
        [shape.temperature], [shape.top_k], [shape.top_p], [shape.min_p], len(logits_V)
    )
    assert shape.seed is not None, "a reference answer needs a seed"
    key, place, nonce = torch.tensor([shape.seed]), torch.tensor([[position]]), torch.tensor([0])
    numbers = device_exponentials(key, place, nonce, Stream.TARGET, len(logits_V))
    return int(race(distribution(logits_V[None, None], rows)[0, 0], numbers[0, 0]))
