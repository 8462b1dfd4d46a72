"""EAGLE-3's drafts in one launch for each pass, or for all of them (``specops.drafter_chain``).

Numerics are those of ``FusedEagle3`` with few rows; sums are added in another order.

Shapes: R requests, H hidden, K draft tokens, Vd draft vocabulary.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from drafters.eagle3.fused import FusedEagle3
from drafters.protocol import ChoosesMostLikely
from specops.attention import DecodePass
from specops.drafter_chain import ChainText, DrafterLayer

log = logging.getLogger(__name__)

if TYPE_CHECKING:
    from specops.drafter_chain_triton import Meeting


class Chain:
    """Drafts of one drafter. Its launches must run on a single stream."""

    def __init__(self, fused: FusedEagle3, keys: Tensor, values: Tensor) -> None:
        """
        Args:
            fused: whose weights and operations are used.
            keys, values: [num_slots, Hkv, D] the drafter's pool, written in place.
        """
        self._fused, self._keys, self._values = fused, keys, values
        self.meeting: Meeting | None = None
        """Where the programs of its launches meet; ``None``: there are no kernels."""
        if fused.has_kernels:
            from specops import drafter_chain_triton

            self.meeting = drafter_chain_triton.make_meeting(keys.device)
        else:
            log.warning("drafter.eagle3.one_launch has no effect: it needs a GPU")

    def layer(self) -> DrafterLayer:
        """The weights as they lie now."""
        return self._fused.layer()

    def takes(self, outputs_RH: Tensor, at: DecodePass) -> bool:
        """Whether these rows can be drafted for here."""
        if self.meeting is None:
            return False
        from specops import drafter_chain_triton

        return drafter_chain_triton.takes(self._fused.layer(), outputs_RH, at)

    def propose(
        self,
        outputs_RH: Tensor,
        at: DecodePass,
        num_draft: int,
        choose: Callable[[Tensor, int], Tensor],
    ) -> Tensor:
        """See ``NeuralDrafter.propose``. All passes are one launch if ``choose`` takes the most
        likely tokens; else each is one, and its logits one or two."""
        from specops import drafter_chain_triton as kernels

        assert self.meeting is not None
        fused, pool = self._fused, (self._keys, self._values)
        layer = fused.layer()
        if isinstance(choose, ChoosesMostLikely):
            known = choose.known()
            text = None if known is None else ChainText(*known)
            found = kernels.draft(layer, outputs_RH, at, num_draft, *pool, self.meeting, text)
            return found.tokens_RK
        tokens = [choose(fused.logits(outputs_RH), 0)]
        for number in range(1, num_draft):
            found = kernels.run_pass(
                layer, tokens[-1], outputs_RH, at, *pool, self.meeting, number=number
            )
            outputs_RH = found.outputs
            squares = found.squares_RP if len(outputs_RH) <= fused.few_rows else None
            tokens.append(choose(fused.logits(outputs_RH, squares), number))
        return torch.stack(tokens, dim=1)
