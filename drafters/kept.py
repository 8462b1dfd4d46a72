"""What verification keeps of drafts for a text, given that this text came out.

A trace holds what the target wrote, so its rounds can be played again with another drafter. A draft
token can only be kept where the draft equals the text. With x the token of the text, p and q the
target's and the drafter's distribution before it, and s = q(x) / p(x), the first k tokens of a
draft that begins there are kept with the probability

- ``match`` (greedy requests, and those with a seed): 1 where each x is the drafter's likeliest;
- ``standard``: ``prod_{i<=k} min(1, s_i)``. A draft is x with q(x) and then kept with
  min(1, p(x) / q(x)), and the text is x with p(x) in all;
- ``block``: ``min_{j<=k} prod_{i<=j} s_i``, with 1 for j = 0. Drafts of these tokens have the
  probability ``prod q``, of which a share of ``min(pi_{k-1} p_k / q_k, 1)`` is kept
  (``specops.verify.block_acceptance``), and the text has the probability ``prod p``.

What follows in the text is independent of what was kept, since the output is the target's in any
case. So the rounds of a text are a Markov chain with these probabilities, and what it says of their
number is exact for the text. The mean over all tokens, the overlap ``sum_x min(p, q)``, is that of
requests without a seed, and right for one position alone: what is drafted next depends on x, and
rounds begin behind tokens that the drafter did not expect. But it scatters less from text to text:
by a quarter less than ``s`` does, and by two thirds less than matches. So two drafters are compared
by overlaps, and what one of them brings is said by what its texts would have kept.

Shapes: R rows with a loss, K draft positions, V vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor

from drafters.batch import TrainingBatch
from drafters.trainable import ChainAcceptance
from specops.device import label_figures
from specops.distill import FrozenHead, RowFigures, Rows

_LEAST_PROB = 1e-20
"""Lower bound of the target's probability of a token that it wrote: rounding may make it 0."""
_ROWS_AT_ONCE = 512


def heat_of(batch: TrainingBatch) -> Tensor:
    """[R] float32 divisor of the logits: the temperature, or 1 where the request is greedy."""
    return torch.where(batch.temperature_R == 0, 1.0, batch.temperature_R)


def acceptance_of_text(
    batch: TrainingBatch,
    head: FrozenHead,
    drafted: RowFigures,
    alive_KR: Tensor,
    *,
    block: bool = False,
) -> ChainAcceptance:
    """Acceptance of each position of the chains that begin at the rows of a batch.

    Args:
        head: the target's lm_head.
        drafted: [K, R] the drafter's figures at each position of each chain, at the temperature of
            the row; the loss is not read.
        alive_KR: bool, the chain has the position.
        block: sampled requests without a seed are verified by the block rule, not the standard one.
    """
    own_R = torch.arange(alive_KR.shape[1], device=alive_KR.device)
    target_R = target_label_probs(batch, head).clamp_min(_LEAST_PROB)
    steps = range(len(alive_KR))
    target_KR = torch.stack([target_R[(own_R + k).clamp_max(len(own_R) - 1)] for k in steps])
    ratio_KR = drafted.label_prob_N.double() / target_KR.double()
    drawn_KR = _by_block(ratio_KR) if block else ratio_KR.clamp_max(1.0)
    kept_KR = torch.where(batch.by_match_R, drafted.agrees_N.double(), drawn_KR)
    is_greedy_R = batch.temperature_R == 0
    overlap_KR = torch.where(is_greedy_R, drafted.agrees_N.double(), drafted.alpha_N.double())
    overlap_KR, kept_KR = (torch.where(alive_KR, x, 0.0).float() for x in (overlap_KR, kept_KR))
    return ChainAcceptance(overlap_KR.T, kept_KR.T, alive_KR.all(dim=0))


def _by_block(ratio_KR: Tensor) -> Tensor:
    """Acceptance of each position given that the ones before it were kept, by the block rule."""
    kept_KR = ratio_KR.cumprod(dim=0).clamp_max(1.0).cummin(dim=0).values
    before_KR = torch.cat((torch.ones_like(kept_KR[:1]), kept_KR[:-1]))
    return torch.where(before_KR > 0, kept_KR / before_KR.clamp_min(1e-300), 0.0)


@torch.no_grad()
def target_label_probs(batch: TrainingBatch, head: FrozenHead) -> Tensor:
    """[R] float32, the target's probability of the token that follows each row, at the row's
    temperature; any finite value in rows of padding."""
    last = batch.token_ids_T.numel() - 1  # where only padding is
    label_R = batch.token_ids_T[(batch.row_R + 1).clamp_max(last)]
    heat_R, hidden_RH = heat_of(batch), batch.last_hidden_RH
    if head.softcap is None:
        cooled = (hidden_RH / heat_R[:, None]).to(hidden_RH.dtype)
        rows = Rows(label_R, torch.ones_like(batch.is_row_R))
        return label_figures(cooled, head.weight_VH, rows).label_prob_N.float()
    found = []
    for start in range(0, len(label_R), _ROWS_AT_ONCE):
        part = slice(start, start + _ROWS_AT_ONCE)
        logits = head.logits(hidden_RH[part]).float() / heat_R[part, None]
        at_label = logits.gather(1, label_R[part, None])[:, 0]
        found.append(torch.exp(at_label - logits.logsumexp(dim=-1)))
    return torch.cat(found) if found else heat_R
