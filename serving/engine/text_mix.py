"""A mix of a text drafter and a neural one: text begins each request's draft, and the neural one
goes on after it.

How much is taken from text follows from what both have kept after such a match
(``specops.text_first``), which rounds count on the device. So a copied passage is drafted as long
as text goes on, a request without a match is drafted by the neural drafter alone, and in between
the neural drafter drafts after tokens that text was surer of.

The neural drafter's passes cost the same whoever drafts, so they end at ``MOST_PASSES`` places;
further ones are text's.

Verification uses the distribution that each token came from; text is certain. How much is taken
from text depends on committed tokens and on earlier rounds alone, so outputs follow the target.

Shapes: R requests, K draft tokens.
"""

from __future__ import annotations

from collections.abc import Container
from collections.abc import Sequence as Several
from dataclasses import replace

from torch import Tensor

from policies.interface import Pick
from serving.engine.drafter_rows import DrafterRows
from serving.engine.drafts import AfterText, Drafts
from serving.engine.lanes import LaneRows
from serving.engine.sequence import Sequence
from serving.engine.text_rows import TextRows
from specops.device import begin_drafts, note_kept
from specops.lanes import ClosedRound, Column, OpenedRound
from specops.text_first import NEURAL_ALONE, TEXT_FIRST, new_counts

MOST_PASSES = 4
"""Places that the neural drafter drafts at most. A pass takes as long as verifying many tokens of
text, and few drafts are kept so far."""
GOES_ON = "goes on"
"""Reason of a pick: the drafter begins, and the neural one goes on."""


class TextMix:
    """One text drafter and one neural drafter in the same rounds."""

    def __init__(self, kind: str, neural: DrafterRows, text: TextRows, most_draft: int) -> None:
        """
        Args:
            kind: name of the mix.
            most_draft: the longest draft.
        """
        self.kind, self.neural, self.text = kind, neural, text
        self.members = (neural,)
        self.draws = neural.draws
        self._counts = new_counts(most_draft, neural.device)

    @property
    def kinds(self) -> tuple[str, ...]:
        """Kinds of both drafters, the neural one first."""
        return (self.neural.kind, self.text.kind)

    def picks(self, numbers: Several[int]) -> list[Pick]:
        """Who drafted for each request, by the numbers that a round tells. Where both did, it is
        the text drafter, which began."""
        neural, text = self.kinds
        return [
            Pick(neural, 1.0, "match")
            if number == NEURAL_ALONE
            else Pick(text, 1.0, GOES_ON if number == TEXT_FIRST else "match")
            for number in numbers
        ]

    def catch_up(self, batch: list[Sequence]) -> int:
        """See ``DrafterRows.catch_up``."""
        return self.neural.catch_up(batch)

    def has_rows_to(self, sequence: Sequence, length: int) -> None:
        """See ``DrafterRows.has_rows_to``."""
        self.neural.has_rows_to(sequence, length)

    # ---- within programs -----------------------------------------------------------------------

    def draft(
        self,
        opened: OpenedRound,
        rows: LaneRows,
        inputs_RI: Tensor,
        num_draft: int,
        *,
        draws: bool,
        tells: bool = False,
    ) -> Drafts:
        """What both propose for the requests of a round."""
        assert not tells, "drafts of a mix are not cut"
        num_passes = min(num_draft, MOST_PASSES)
        found = self.text.propose(opened, num_draft)
        begun = begin_drafts(self._counts, found, opened, num_draft, num_passes)
        after = AfterText(found.tokens_RK, begun.is_text_RK, num_passes)
        drafts = self.neural.draft(opened, rows, inputs_RI, num_draft, draws=draws, after=after)

        def close(closed: ClosedRound, outputs_RC: Tensor) -> None:
            judged_R2 = note_kept(self._counts, found, opened, begun, closed)
            outputs_RC[:, Column.PICKED] = begun.who_R
            outputs_RC[:, Column.JUDGED : Column.TOKENS] = judged_R2

        return replace(drafts, lens_R=begun.lens_R, when_closed=close)

    def observe_round(
        self, opened: OpenedRound, closed: ClosedRound, lanes_R: Tensor, features_TmH: Tensor
    ) -> None:
        """See ``DrafterRows.observe_round``."""
        self.neural.observe_round(opened, closed, lanes_R, features_TmH)


def drawn_of(picks: Several[Pick], lens: Several[int], neural: Container[str]) -> list[int]:
    """How many tokens of each draft have a probability: all of one that a neural drafter has drawn
    some of, none of one that was certain.

    Args:
        picks: who drafted for each request.
        neural: the drafters that draw.
    """
    return [
        num if pick.drafter in neural or pick.reason == GOES_ON else 0
        for pick, num in zip(picks, lens, strict=True)
    ]
