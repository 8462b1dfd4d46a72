"""What a drafter's logits stand for, and one draft token drawn from them.

The law q of a row is that of ``sampling.distribution``, in float64, over the drafter's vocabulary,
or all on its argmax for rows that draft greedily. Verification builds q again from the very same
logits and parameters (``verify_logits``), so nothing of the size of a vocabulary is kept.

Shapes: R requests, K draft tokens, D draft vocabulary, V target vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from specops.rng import Numbering, Stream, device_uniforms
from specops.sampling import SamplingRows, distribution, draw


@dataclass(frozen=True, slots=True)
class VocabMap:
    """Between a reduced draft vocabulary and the target's."""

    d2t_D: Tensor
    """[D] int64: target id minus draft id, as drafters store it."""
    t2d_V: Tensor
    """[V] int32: draft id of a target id, or -1 where the drafter has no such token."""

    def to_target(self, draft_ids: Tensor) -> Tensor:
        """Draft ids (any shape, int64) -> target ids."""
        return draft_ids + self.d2t_D[draft_ids]


def vocab_map(d2t_D: Tensor, vocab_size: int) -> VocabMap:
    """The map and its inverse. Target ids must be distinct and below ``vocab_size``."""
    ids = torch.arange(len(d2t_D), device=d2t_D.device)
    t2d = torch.full((vocab_size,), -1, dtype=torch.int32, device=d2t_D.device)
    t2d[ids + d2t_D] = ids.int()
    return VocabMap(d2t_D, t2d)


@dataclass(frozen=True, slots=True)
class RowLaws:
    """What turns logits l into a distribution: weight exp((l - top) / temperature) for the logits
    above ``cut``, and for those at ``cut`` with an id up to ``last``; divided by ``mass``."""

    tops_cuts_masses: Tensor
    """[..., 3] float32."""
    lasts: Tensor
    """[...] int32."""


@dataclass(frozen=True, slots=True)
class Drafted:
    """One draft token of each request."""

    tokens_R: Tensor
    """[R] int64 target ids."""
    logq_R: Tensor
    """[R] float32, log q of the token; 0 where it is the argmax of a greedy row."""
    laws: RowLaws | None = None
    """Of the R rows, where a kernel made them: verification then need not look for them again."""


@dataclass(frozen=True, slots=True)
class DraftLaw:
    """What draft tokens were drawn from."""

    logits_RKD: Tensor
    """[R, K, D] the very tensor that was drawn from."""
    sampling: SamplingRows
    """The parameters it was drawn under."""
    greedy_R: Tensor | None = None
    """[R] bool, rows that drafted their argmax whatever their temperature."""
    vocab: VocabMap | None = None
    """``None``: the draft vocabulary is the target's."""
    laws: RowLaws | None = None
    """[R, K] those of ``sample_draft``, if kept; the definition does without."""


def draft_distribution(
    logits_RKD: Tensor, sampling: SamplingRows, greedy_R: Tensor | None
) -> Tensor:
    """q over the draft vocabulary, [R, K, D] float64; one-hot at the argmax in greedy rows."""
    if greedy_R is not None:
        cold = sampling.temperature_R.masked_fill(greedy_R, 0.0)
        sampling = replace(sampling, temperature_R=cold)
    return distribution(logits_RKD.double(), sampling)


def target_distribution(q_RKD: Tensor, vocab: VocabMap | None, vocab_size: int) -> Tensor:
    """q over the target vocabulary: 0 where the drafter has no token. [R, K, V]."""
    if vocab is None:
        return q_RKD
    ids = torch.arange(q_RKD.shape[-1], device=q_RKD.device)
    q_RKV = q_RKD.new_zeros((*q_RKD.shape[:-1], vocab_size))
    return q_RKV.index_copy_(-1, vocab.to_target(ids), q_RKD)


def sample_draft(
    logits_RD: Tensor,
    sampling: SamplingRows,
    numbering: Numbering,
    greedy_R: Tensor | None = None,
    vocab: VocabMap | None = None,
) -> Drafted:
    """Draw a draft token for each request, or take the argmax (the lowest id wins ties).

    Args:
        logits_RD: [R, D] float, of the drafter.
        sampling: parameters of the requests; temperature 0 is greedy.
        numbering: ``positions_R`` is where the drafted token is to stand; stream DRAFT.
        greedy_R: [R] bool, rows that draft their argmax whatever their temperature.
        vocab: of a reduced draft vocabulary.
    """
    q_RD = draft_distribution(logits_RD[:, None], sampling, greedy_R)[:, 0]
    numbers = device_uniforms(
        numbering.keys_R, numbering.positions_R[:, None], numbering.nonces_R, Stream.DRAFT
    )
    ids_R = draw(q_RD, numbers[:, 0])
    logq_R = q_RD.gather(-1, ids_R[:, None])[:, 0].log().float()
    return Drafted(ids_R if vocab is None else vocab.to_target(ids_R), logq_R)
