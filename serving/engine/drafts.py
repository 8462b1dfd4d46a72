"""Drafting within a round's program: what one neural drafter proposes for all of its requests.

Shapes: R requests, K draft tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from drafters.protocol import NeuralDrafter
from specops.attention import DecodePass
from specops.device import best_ids, confidence, sample_draft
from specops.draft_sampling import Drafted, DraftLaw, join_laws
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
    picked_R: Tensor | None = None
    """[R] int64 number of the drafter whose draft is taken, where the device has picked."""
    figures_RK3: Tensor | None = None
    """Confidence in each position before its token was drawn, in rounds that are cut."""


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
) -> Drafts:
    """What a neural drafter proposes.

    Args:
        outputs_RH: its outputs at the anchors.
        ahead: a pass over its rows, from the first draft token on.
        draws: draw tokens from distributions; otherwise each is the most likely one.
        tells: also compute ``Drafts.figures_RK3``.
    """
    figures: list[Tensor] = []
    if not draws:
        d2t = None if drafter.vocab is None else drafter.vocab.d2t_D

        def told(logits: Tensor, _number: int) -> Tensor:
            figures.append(confidence(logits))
            return best_ids(logits, d2t)

        tokens = drafter.propose(outputs_RH, ahead, num_draft, told if tells else Best(d2t))
        return Drafts(tokens, None, None, figures_RK3=torch.stack(figures, 1) if figures else None)

    sampling, by_match = opened.sampling(), opened.by_match_R
    drawn: list[Drafted] = []
    kept: list[Tensor] = []

    def draw(logits: Tensor, number: int) -> Tensor:
        here = opened.numbering(number)
        kept.append(logits)
        if tells:
            figures.append(confidence(logits))
        drawn.append(sample_draft(logits, sampling, here, by_match, drafter.vocab))
        return drawn[-1].tokens_R

    tokens = drafter.propose(outputs_RH, ahead, num_draft, draw)
    law = DraftLaw(torch.stack(kept, 1), sampling, by_match, drafter.vocab, join_laws(drawn))
    logq_RK = torch.stack([d.logq_R for d in drawn], 1)
    return Drafts(tokens, logq_RK, law, figures_RK3=torch.stack(figures, 1) if figures else None)
