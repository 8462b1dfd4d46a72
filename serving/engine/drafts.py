"""Drafting within a round's program: what one neural drafter proposes for all of its requests.

Shapes: R requests, K draft tokens.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from drafters.protocol import NeuralDrafter
from specops.attention import DecodePass
from specops.device import best_ids, confidence, sample_draft
from specops.draft_sampling import Drafted, DraftLaw, Instead, VocabMap, join_laws
from specops.lanes import ClosedRound, OpenedRound


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
    when_closed: Callable[[ClosedRound, Tensor], None] | None = None
    """Work of the round's program once it is known what was kept: takes also the outcome for the
    host, [R, C], see ``Column``."""


@dataclass(frozen=True, slots=True)
class AfterText:
    """Tokens that are drafted already, before and after those of a neural drafter."""

    tokens_RK: Tensor
    """[R, K] int64."""
    is_text_RK: Tensor
    """[R, K] bool: these are taken."""
    num_passes: int
    """In 1..K: the neural drafter drafts so many places. What it draws for those that are taken is
    lost, and it goes on after the token that is."""

    def taken(self, own_RP: Tensor) -> Tensor:
        """[R, P] the tokens at the first places, from the neural drafter's own."""
        places = slice(own_RP.shape[1])
        return torch.where(self.is_text_RK[:, places], self.tokens_RK[:, places], own_RP)

    def at(self, number: int) -> Instead:
        """What is taken in place of the neural drafter's own tokens at one place."""
        return Instead(self.tokens_RK[:, number], self.is_text_RK[:, number])

    def whole(self, tokens_RP: Tensor) -> Tensor:
        """[R, K] the drafts, from the tokens at the places that the neural drafter drafts."""
        return torch.cat((tokens_RP, self.tokens_RK[:, self.num_passes :]), dim=1)


@dataclass(frozen=True, slots=True)
class Best:
    """Chooses the most likely tokens. ``drafters.protocol.ChoosesTogether``."""

    d2t_D: Tensor | None
    """[D] int64, target id minus draft id, of a reduced vocabulary."""
    after: AfterText | None = None

    def __call__(self, logits: Tensor, number: int) -> Tensor:
        instead = None if self.after is None else self.after.at(number)
        return best_ids(logits, self.d2t_D, instead=instead)

    def together(self, logits_KRV: Tensor) -> Tensor:
        best_RK = best_ids(logits_KRV, self.d2t_D).t().contiguous()
        return best_RK if self.after is None else self.after.taken(best_RK)


class Draw:
    """Draws tokens from distributions. ``drafters.protocol.KeepsLogits``."""

    def __init__(
        self,
        opened: OpenedRound,
        vocab: VocabMap | None,
        num_draft: int,
        after: AfterText | None,
        figures: list[Tensor] | None,
    ) -> None:
        """
        Args:
            figures: gets the confidence in each position, if it is wanted.
        """
        self.sampling = opened.sampling()
        self.drawn: list[Drafted] = []
        self._opened, self._vocab, self._after, self._figures = opened, vocab, after, figures
        self._kept: list[Tensor] = []
        self._num_draft = num_draft
        self._rows_RKD: Tensor | None = None
        self._places: list[Tensor] = []

    def __call__(self, logits: Tensor, number: int) -> Tensor:
        opened, after = self._opened, self._after
        self._kept.append(logits)
        if self._figures is not None:
            self._figures.append(confidence(logits))
        self.drawn.append(
            sample_draft(
                logits, self.sampling, opened.numbering(number), opened.by_match_R, self._vocab,
                instead=None if after is None else after.at(number),
            )
        )  # fmt: skip
        return self.drawn[-1].tokens_R

    def place(self, number: int, like_RD: Tensor) -> Tensor:
        if self._rows_RKD is None:
            num_requests, num_tokens = like_RD.shape
            self._rows_RKD = like_RD.new_empty(num_requests, self._num_draft, num_tokens)
        self._places.append(self._rows_RKD[:, number])
        return self._places[-1]

    def logits(self) -> Tensor:
        """[R, K, D] those that tokens were drawn from; of further places, the last ones."""
        kept, places, rows = self._kept, self._places, self._rows_RKD
        num_further = self._num_draft - len(kept)
        is_whole = len(kept) == len(places) and all(map(operator.is_, kept, places))
        if rows is None or not is_whole:
            return torch.stack(kept + kept[-1:] * num_further, 1)
        if num_further:
            rows[:, len(kept) :] = kept[-1][:, None]
        return rows


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
    after: AfterText | None = None,
) -> Drafts:
    """What a neural drafter proposes.

    Args:
        outputs_RH: its outputs at the anchors.
        ahead: a pass over its rows, from the first draft token on.
        draws: draw tokens from distributions; otherwise each is the most likely one.
        tells: also compute ``Drafts.figures_RK3``.
        after: tokens that are drafted already, which are certain.
    """
    figures: list[Tensor] = []
    num_passes = num_draft if after is None else after.num_passes
    if not draws:
        d2t = None if drafter.vocab is None else drafter.vocab.d2t_D

        def told(logits: Tensor, _number: int) -> Tensor:
            figures.append(confidence(logits))
            return best_ids(logits, d2t)

        choose = told if tells else Best(d2t, after)
        tokens = drafter.propose(outputs_RH, ahead, num_passes, choose)
        tokens = tokens if after is None else after.whole(tokens)
        return Drafts(tokens, None, None, figures_RK3=torch.stack(figures, 1) if figures else None)

    draw = Draw(opened, drafter.vocab, num_draft, after, figures if tells else None)
    tokens = drafter.propose(outputs_RH, ahead, num_passes, draw)
    # Nothing is drawn at further places, and what the law says of them is not looked at.
    drawn = draw.drawn + draw.drawn[-1:] * (num_draft - num_passes)
    law = DraftLaw(draw.logits(), draw.sampling, opened.by_match_R, drafter.vocab, join_laws(drawn))
    logq_RK = torch.stack([d.logq_R for d in drawn], 1)
    if after is not None:
        tokens = after.whole(tokens)
        law, logq_RK = certain_at(law, logq_RK, after.is_text_RK)
    return Drafts(tokens, logq_RK, law, figures_RK3=torch.stack(figures, 1) if figures else None)


def certain_at(law: DraftLaw, logq_RK: Tensor, certain_RK: Tensor) -> tuple[DraftLaw, Tensor]:
    """The law and log q of drafts in which others' tokens, which are certain, have replaced some.

    Args:
        logq_RK: [R, K] float32, of the drafts before.
        certain_RK: [R, K] bool, contiguous: where the tokens were replaced.
    """
    return replace(law, certain_RK=certain_RK), logq_RK.masked_fill(certain_RK, 0.0)
