"""Applies to each request of a batch the exact rule it is entitled to.

Shapes: R requests, K draft tokens, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from drafters.protocol import Draft
from serving.engine.packing import adjustments_of, sampling_of, uniforms_of
from serving.engine.sequence import Sequence
from serving.requests import TokenLogprob
from specops.penalties import adjust_logits
from specops.rng import Stream
from specops.sampling import distribution, draw
from specops.verify import verify_block, verify_match, verify_standard
from specops.verify_logits import Rule as Judge


@dataclass(frozen=True, slots=True)
class Verified:
    """Host-side outcome of one verification."""

    num_accepted: list[int]
    next_ids: list[int]
    p_logp: list[list[float]]
    """[R][K] log probability of each draft token under the target's shaped distribution."""


@dataclass(frozen=True, slots=True)
class Proposed:
    """Host-side record of a draft."""

    kind: str
    tokens: list[list[int]]
    """[R][its own number of tokens]"""
    q_logp: list[list[float]] | None
    """Log q of each of them; ``None`` for a delta draft."""


def emitted_by(draft: Proposed | None, verified: Verified, r: int) -> list[int]:
    """Tokens that a round decided for request r: the kept draft tokens and the target's own."""
    drafted = draft.tokens[r] if draft else []
    return [*drafted[: verified.num_accepted[r]], verified.next_ids[r]]


Rule = Literal["block", "standard"]


def judge_of(rule: Rule) -> Judge:
    """What programs know the rule by."""
    return Judge.BLOCK if rule == "block" else Judge.STANDARD


def verify(
    batch: list[Sequence], draft: Draft | None, logits: Tensor, rule: Rule = "block"
) -> Verified:
    """Keep what the target agrees with, and let it choose the next token.

    Greedy and seeded requests are verified by ``match``, the others by ``rule``.

    Args:
        draft: its ``q_RKV`` is the very tensor the tokens were drawn from.
        logits: [R, K + 1, V] of the anchor and the draft tokens, the target's own: biases and
            penalties are applied here.
    """
    device = logits.device
    num_draft = logits.shape[1] - 1
    tokens, lens = _tokens_and_lens(batch, draft, device)
    adjustments = adjustments_of(batch, device)
    if adjustments is not None:
        logits = adjust_logits(logits, tokens, adjustments)
    if all(s.is_greedy for s in batch):
        accepted, following = verify_match(logits.argmax(-1), tokens, lens)
        return _greedy(accepted.tolist(), following.tolist(), num_draft)
    p = distribution(logits, sampling_of(batch, logits.shape[-1], device))
    own = draw(p, uniforms_of(batch, num_draft + 1, Stream.TARGET, device))
    accepted, following = verify_match(own, tokens, lens)
    draft_p = p[:, :num_draft].gather(-1, tokens[..., None])[..., 0]
    if not all(s.matches_target for s in batch):
        verdict = (verify_block if rule == "block" else verify_standard)(
            p,
            draft.q_RKV if draft else None,
            tokens,
            lens,
            uniforms_of(batch, num_draft, Stream.ACCEPT, device),
            uniforms_of(batch, 1, Stream.RESIDUAL, device)[:, 0],
        )
        by_match = torch.tensor([s.matches_target for s in batch], device=device)
        accepted = torch.where(by_match, accepted, verdict.num_accepted_R)
        following = torch.where(by_match, following, verdict.next_R)
    return Verified(accepted.tolist(), following.tolist(), draft_p.double().log().tolist())


def _tokens_and_lens(
    batch: list[Sequence], draft: Draft | None, device: torch.device
) -> tuple[Tensor, Tensor]:
    if draft is not None:
        return draft.tokens_RK, torch.tensor(draft.lens_R, device=device)
    tokens = torch.zeros((len(batch), 0), dtype=torch.int64, device=device)
    return tokens, torch.zeros(len(batch), dtype=torch.int64, device=device)


def _greedy(accepted: list[int], following: list[int], num_draft: int) -> Verified:
    """Under greedy decoding a kept token has probability 1 and the first rejected one 0."""
    p_logp = [[0.0] * a + [float("-inf")] * (num_draft - a) for a in accepted]
    return Verified(accepted, following, p_logp)


def proposed(draft: Draft | None) -> Proposed | None:
    """What was drafted, read from the device."""
    if draft is None:
        return None
    tokens = [row[:n] for row, n in zip(draft.tokens_RK.tolist(), draft.lens_R, strict=True)]
    if draft.q_RKV is None:
        return Proposed(draft.kind, tokens, None)
    q = draft.q_RKV.gather(-1, draft.tokens_RK[..., None])[..., 0]
    logs = zip(q.double().log().tolist(), draft.lens_R, strict=True)
    return Proposed(draft.kind, tokens, [row[:n] for row, n in logs])


def token_logprobs(logits: Tensor, tokens: list[int], num_top: int) -> list[TokenLogprob]:
    """The target's own log probabilities of emitted tokens. logits [n, V]."""
    scores = logits.log_softmax(dim=-1)
    best, ids = scores.topk(num_top, dim=-1)
    return [
        TokenLogprob(
            token,
            float(scores[i, token]),
            tuple(zip(ids[i].tolist(), best[i].tolist(), strict=True)),
        )
        for i, token in enumerate(tokens)
    ]
