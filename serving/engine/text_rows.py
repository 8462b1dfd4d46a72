"""A drafter that proposes on the device, from the text of lanes.

It has no rows of its own, so it never has to catch up, and any round may be launched before the
last one is read.

Shapes: R requests, K draft tokens.
"""

from __future__ import annotations

import torch
from torch import Tensor

from drafters.protocol import TextDrafter
from serving.engine.drafter_rows import DrafterRows
from serving.engine.drafts import Drafts
from serving.engine.lanes import LaneRows, Lanes
from serving.engine.sequence import Sequence
from specops.lanes import ClosedRound, OpenedRound
from specops.matches import TextDrafts


class TextRows:
    """One text drafter within rounds; among the drafters on the device, the one without rows."""

    members: tuple[DrafterRows, ...] = ()
    """It needs the rows of no neural drafter."""
    draws = False

    def __init__(self, drafter: TextDrafter, lanes: Lanes) -> None:
        """
        Args:
            lanes: keep the text of their requests.
        """
        self.drafter = drafter
        self.kinds = (drafter.kind,)
        self._lanes = lanes

    @property
    def kind(self) -> str:
        """The drafter's kind."""
        return self.drafter.kind

    # ---- the life of a request -----------------------------------------------------------------

    def begin(self, sequence: Sequence) -> None:
        """A request was admitted, and its lane is known."""
        sequence.space = max(sequence.space, self.drafter.begin(sequence.request.namespace))

    def finish(self, sequence: Sequence, keep: bool) -> None:
        """A request ended; its lane is still its own.

        Args:
            keep: drafts for later requests may be taken from its text.
        """
        text = self._lanes.text_of(sequence) if keep else None
        self.drafter.finish(text, sequence.request.namespace)

    # ---- within programs -----------------------------------------------------------------------

    def catch_up(self, batch: list[Sequence]) -> int:
        """See ``DrafterRows.catch_up``: it never lacks anything."""
        return 0

    def has_rows_to(self, sequence: Sequence, length: int) -> None:
        """See ``DrafterRows.has_rows_to``."""

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
        """What it proposes for the requests of a round."""
        assert not tells, "its drafts are not cut"
        found = self.propose(opened, num_draft)
        return Drafts(found.tokens_RK, None, None, torch.minimum(opened.lens_R, found.counts_R))

    def propose(self, opened: OpenedRound, num_draft: int) -> TextDrafts:
        """Its drafts, before the requests' own bounds."""
        texts = self._lanes.state.texts_LN
        assert texts is not None
        return self.drafter.propose(texts, opened, num_draft)

    def observe_round(
        self, opened: OpenedRound, closed: ClosedRound, lanes_R: Tensor, features_TmH: Tensor
    ) -> None:
        """Rounds themselves keep the text of lanes."""
