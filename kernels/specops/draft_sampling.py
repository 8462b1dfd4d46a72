"""The distribution of a drafter's logits, and sampling a draft token from it.

The distribution q of a row is that of ``sampling.distribution``, in float64, over the drafter's
vocabulary; for rows that draft greedily it is one-hot at the argmax. Verification rebuilds q from
the same logits and parameters (``verify_logits``), so no vocabulary-sized tensor is kept.

Shapes: R requests, K draft tokens, D draft vocabulary, V target vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from specops.rng import Numbering, Stream, device_uniforms
from specops.sampling import SamplingRows, distribution, draw


@dataclass(frozen=True, slots=True)
class VocabMap:
    """Mapping between a reduced draft vocabulary and the target's."""

    d2t_D: Tensor
    """[D] int64: target id minus draft id, as drafters store it."""
    t2d_V: Tensor
    """[V] int32: draft id of each target id; -1 if the drafter does not have the token."""

    def to_target(self, draft_ids: Tensor) -> Tensor:
        """Draft ids (any shape, int64) -> target ids."""
        return draft_ids + self.d2t_D[draft_ids]


def vocab_map(d2t_D: Tensor, vocab_size: int) -> VocabMap:
    """A map and its inverse. Target ids must be distinct and below ``vocab_size``."""
    ids = torch.arange(len(d2t_D), device=d2t_D.device)
    t2d = torch.full((vocab_size,), -1, dtype=torch.int32, device=d2t_D.device)
    t2d[ids + d2t_D] = ids.int()
    return VocabMap(d2t_D, t2d)


@dataclass(frozen=True, slots=True)
class Instead:
    """Tokens that are taken in place of those that a drafter chooses, for M of its rows."""

    tokens_M: Tensor
    """[M] int64 target ids; need not be adjacent."""
    is_taken_M: Tensor
    """[M] bool: this one is; need not be adjacent."""


@dataclass(frozen=True, slots=True)
class RowLaws:
    """Parameters that turn logits l into a distribution: weight exp((l - top) / temperature) for
    logits above ``cut``, and for logits equal to ``cut`` with an id up to ``last``; all divided by
    ``mass``."""

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
    """[R] float32, log q of the token; 0 for rows that draft greedily."""
    laws: RowLaws | None = None
    """Laws of the R rows, if a kernel computed them; verification then need not recompute them."""


def join_laws(drawn: Sequence[Drafted]) -> RowLaws | None:
    """Laws [R * K] of R requests' K draft tokens, request-major; ``None`` if not kept."""
    laws = [d.laws for d in drawn if d.laws is not None]
    if not laws:
        return None
    tops = torch.stack([law.tops_cuts_masses for law in laws], 1).flatten(0, 1)
    return RowLaws(tops, torch.stack([law.lasts for law in laws], 1).flatten())


@dataclass(frozen=True, slots=True)
class DraftLaw:
    """The distribution that draft tokens were drawn from."""

    logits_RKD: Tensor
    """[R, K, D] the logits that tokens were drawn from, unchanged."""
    sampling: SamplingRows
    """The parameters that were used."""
    greedy_R: Tensor | None = None
    """[R] bool, rows that drafted their argmax regardless of temperature."""
    vocab: VocabMap | None = None
    """``None``: the draft vocabulary is the target's."""
    laws: RowLaws | None = None
    """[R, K] laws left by ``sample_draft``, if kept; the definition does not use them."""
    certain_RK: Tensor | None = None
    """[R, K] bool, contiguous: positions whose draft token is certain, such as tokens copied from a
    text. There q is one-hot at the draft token, which need not be in the draft vocabulary, and
    nothing else in this record counts: the logits may hold anything. ``None``: no position."""


def drafts_argmax(sampling: SamplingRows, greedy_R: Tensor | None) -> Tensor:
    """[R] bool: the request drafts its argmax, so its q is one-hot."""
    is_cold_R = sampling.temperature_R == 0
    return is_cold_R if greedy_R is None else is_cold_R | greedy_R


def draft_distribution(
    logits_RKD: Tensor, sampling: SamplingRows, greedy_R: Tensor | None
) -> Tensor:
    """q over the draft vocabulary, [R, K, D] float64; one-hot at the argmax in greedy rows."""
    if greedy_R is not None:
        cold = sampling.temperature_R.masked_fill(greedy_R, 0.0)
        sampling = replace(sampling, temperature_R=cold)
    return distribution(logits_RKD.double(), sampling)


def target_distribution(q_RKD: Tensor, vocab: VocabMap | None, vocab_size: int) -> Tensor:
    """q over the target vocabulary, [R, K, V]; 0 for tokens the drafter does not have."""
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
    *,
    instead: Instead | None = None,
) -> Drafted:
    """Sample a draft token for each request, or take the argmax (the lowest id wins ties). A row
    whose largest logit is NaN or infinite drafts its first token, and verification ends the draft
    before it.

    Args:
        logits_RD: [R, D] float, the drafter's.
        sampling: parameters of the R requests; temperature 0 is greedy.
        numbering: ``positions_R`` is the draft token's position; stream DRAFT.
        greedy_R: [R] bool, rows that draft their argmax regardless of temperature.
        vocab: map of a reduced draft vocabulary; ``None``: the target's vocabulary.
        instead: tokens that are returned in place of those drawn, whose log q and laws remain.
    """
    top_R, ids_R = logits_RD.max(dim=-1)  # the lowest id of ties, as ``argmax``
    is_sound_R = top_R.isfinite()
    logq_R = logits_RD.new_zeros(len(logits_RD), dtype=torch.float32)
    drawn = (~drafts_argmax(sampling, greedy_R) & is_sound_R).nonzero()[:, 0]
    if len(drawn):  # q of the others is one-hot: no distribution is computed for them
        q_AD = distribution(logits_RD[drawn, None].double(), sampling.of(drawn))[:, 0]
        numbers_A1 = device_uniforms(
            numbering.keys_R[drawn], numbering.positions_R[drawn, None], numbering.nonces_R[drawn],
            Stream.DRAFT,
        )  # fmt: skip
        ids_A = draw(q_AD, numbers_A1[:, 0])
        ids_R.index_copy_(0, drawn, ids_A)
        logq_R.index_copy_(0, drawn, q_AD.gather(-1, ids_A[:, None])[:, 0].log().float())
    ids_R = torch.where(is_sound_R, ids_R, 0)
    tokens_R = ids_R if vocab is None else vocab.to_target(ids_R)
    if instead is not None:
        tokens_R = torch.where(instead.is_taken_M, instead.tokens_M, tokens_R)
    return Drafted(tokens_R, logq_R)
