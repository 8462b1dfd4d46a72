"""Drafting within a round's program: what one neural drafter proposes for all of its requests.

Shapes: R requests, K draft tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from drafters.protocol import NeuralDrafter
from policies.ending import Ending
from serving.engine.allocating import Considered
from serving.engine.ending import EndingDraft
from specops.allocation import confidence
from specops.attention import DecodePass
from specops.device import best_ids, sample_draft
from specops.draft_sampling import Drafted, DraftLaw, VocabMap, join_laws
from specops.lanes import OpenedRound


@dataclass(frozen=True, slots=True)
class Drafts:
    """The drafts of a round, on the device."""

    tokens_RK: Tensor
    logq_RK: Tensor | None
    """``None`` where nothing was drawn."""
    law: DraftLaw | None
    """The distributions that tokens were drawn from; ``None`` where nothing was drawn."""
    lens_R: Tensor | None = None
    """[R] int64, number of draft tokens of each request, where a host drafter has provided some;
    ``None``: as many as the round allows."""
    figures_RK3: Tensor | None = None
    """Confidence in each position before its token was drawn, in rounds that are cut."""
    considered: Considered | None = None
    """The drafts as they would have been, in rounds that may end them early."""


@dataclass(frozen=True, slots=True)
class Best:
    """Chooses the most likely tokens. ``drafters.protocol.ChoosesTogether``."""

    d2t_D: Tensor | None
    """[D] int64, target id minus draft id, of a reduced vocabulary."""

    def __call__(self, logits: Tensor, _number: int) -> Tensor:
        return best_ids(logits, self.d2t_D)

    def together(self, logits_KRV: Tensor) -> Tensor:
        return best_ids(logits_KRV, self.d2t_D).t().contiguous()


def given(opened: OpenedRound) -> Drafts:
    """The uploaded draft tokens; none if K is 0."""
    assert opened.given_RK is not None
    return Drafts(opened.given_RK, None, None)


def drafted(
    drafter: NeuralDrafter,
    outputs_RH: Tensor,
    ahead: DecodePass,
    opened: OpenedRound,
    num_draft: int,
    *,
    draws: bool,
    tells: bool = False,
    ending: Ending | None = None,
) -> Drafts:
    """What a neural drafter proposes.

    Args:
        outputs_RH: its outputs at the anchors.
        ahead: a pass over its rows, from the first draft token on.
        draws: draw tokens from distributions; otherwise each is the most likely one.
        tells: also compute ``Drafts.figures_RK3``.
        ending: ends the drafts while they are made, so that they may have fewer tokens, or none;
            where programs are ordinary calls.
    """
    if ending is not None:
        return _ended(drafter, outputs_RH, ahead, opened, num_draft, ending, draws=draws)
    figures: list[Tensor] = []
    if not draws:
        d2t = None if drafter.vocab is None else drafter.vocab.d2t_D

        def told(logits: Tensor, _number: int) -> Tensor:
            figures.append(confidence(logits))
            return best_ids(logits, d2t)

        tokens = drafter.propose(outputs_RH, ahead, num_draft, told if tells else Best(d2t))
        return Drafts(tokens, None, None, figures_RK3=torch.stack(figures, 1) if figures else None)

    draw = _Draw(opened, drafter.vocab)

    def told_draw(logits: Tensor, number: int) -> Tensor:
        figures.append(confidence(logits))
        return draw(logits, number)

    tokens = drafter.propose(outputs_RH, ahead, num_draft, told_draw if tells else draw)
    told_RK3 = torch.stack(figures, 1) if figures else None
    return Drafts(tokens, draw.logq_RK(), draw.law(), figures_RK3=told_RK3)


class _Draw:
    """Draws the tokens of a draft, and keeps the laws that they are drawn from."""

    def __init__(self, opened: OpenedRound, vocab: VocabMap | None) -> None:
        self._opened, self._vocab = opened, vocab
        self._sampling, self._by_match = opened.sampling(), opened.by_match_R
        self._drawn: list[Drafted] = []
        self._kept: list[Tensor] = []

    def __call__(self, logits: Tensor, number: int) -> Tensor:
        here = self._opened.numbering(number)
        self._kept.append(logits)
        one = sample_draft(logits, self._sampling, here, self._by_match, self._vocab)
        self._drawn.append(one)
        return one.tokens_R

    def law(self) -> DraftLaw:
        logits_RKD = torch.stack(self._kept, 1)
        laws = join_laws(self._drawn)
        return DraftLaw(logits_RKD, self._sampling, self._by_match, self._vocab, laws)

    def logq_RK(self) -> Tensor:
        return torch.stack([one.logq_R for one in self._drawn], 1)


def _ended(
    drafter: NeuralDrafter,
    outputs_RH: Tensor,
    ahead: DecodePass,
    opened: OpenedRound,
    num_draft: int,
    ending: Ending,
    *,
    draws: bool,
) -> Drafts:
    draw = _Draw(opened, drafter.vocab)
    best = Best(None if drafter.vocab is None else drafter.vocab.d2t_D)
    choose = EndingDraft(draw if draws else best, ending, opened.lens_R.tolist())
    tokens = drafter.propose(outputs_RH, ahead, num_draft, choose)[:, : choose.length]
    considered = choose.considered()
    if not draws or not choose.length:
        return Drafts(tokens, None, None, considered=considered)
    return Drafts(tokens, draw.logq_RK(), draw.law(), considered=considered)
