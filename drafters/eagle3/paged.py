"""EAGLE-3 in a running engine: drafter KV in pages that share the target's slot numbers.

Shapes as in ``drafters.protocol``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor

from drafters.eagle3.fused import Attend, FusedEagle3, supports
from drafters.eagle3.model import Eagle3, Eagle3Config
from drafters.fused_layers import Fusable
from drafters.protocol import DrafterContext, DrafterKind, KeepsLogits, Traits, Weights
from drafters.stored_module import check_shape, first_weights, for_serving
from specops.attention import DecodePass, PagedPass
from specops.device import decode_attention, places_of, prepare_pass, prepare_steps
from specops.draft_sampling import vocab_map

TRAITS = Traits(on_device=True, learns=True, needs_match=False, draws=True)


class FusedPass(Protocol):
    """Passes of fused operations; ``FusedEagle3`` describes every method."""

    def follow(self) -> None: ...

    def fuse(self, features: Tensor) -> Tensor: ...

    def forward(
        self,
        ids_T: Tensor,
        hidden: Tensor,
        positions_T: Tensor,
        slots_T: Tensor,
        attend: Attend,
        keys: Tensor,
        values: Tensor,
    ) -> tuple[Tensor, Tensor | None]: ...

    def logits(
        self, outputs: Tensor, squares: Tensor | None = None, out: Tensor | None = None
    ) -> Tensor: ...


class PagedEagle3(Fusable[FusedPass]):
    """One drafter module, its KV pool and its version. A ``NeuralDrafter``."""

    kind = "eagle3"
    traits = TRAITS
    first_row = 1

    def __init__(self, module: Any, embed: torch.nn.Module, num_slots: int) -> None:
        """
        Args:
            module: an ``Eagle3``, or another module of its shape; weights in serving dtype and
                device; edited in place by swaps.
            embed: the target's token embedding module (with its own scaling, if it has one).
            num_slots: slots of the target's KV pool; the drafter's pool uses the same numbers.
        """
        c = module.config
        weight = module.norm.weight
        self.module = module
        self.embed = embed
        self.version = 0
        self.layer_ids = c.layer_ids
        self.output_size = c.hidden_size
        shape = (num_slots, c.num_kv_heads, c.head_dim)
        self.keys = torch.zeros(shape, dtype=weight.dtype, device=weight.device)
        self.values = torch.zeros_like(self.keys)
        self.scale = c.head_dim**-0.5
        self._heads_per_key = c.num_heads // c.num_kv_heads
        d2t = module.d2t
        self.vocab = None if d2t is None else vocab_map(d2t, c.target_vocab_size)

    def _why_not_fused(self) -> str | None:
        return supports(self.module, self.embed)

    def _make_fused(self, num_positions: int, **options: Any) -> FusedPass:
        return FusedEagle3(self.module, self.embed, num_positions, **options)

    def propose(
        self,
        outputs_RH: Tensor,
        at: DecodePass,
        num_draft: int,
        choose: Callable[[Tensor, int], Tensor],
    ) -> Tensor:
        """See ``NeuralDrafter.propose``."""
        tokens = [self._chosen(choose, 0, outputs_RH, None)]
        if num_draft == 1:
            return tokens[0][:, None]
        steps = places_of(at, num_draft - 1, by_step=True)
        passes = prepare_steps(at, steps.first, num_draft - 1, self._heads_per_key)
        each = zip(steps.positions, steps.slots, passes, strict=True)
        for ahead, (positions_R, slots_R, here) in enumerate(each, start=1):
            outputs_RH, squares = self._pass(tokens[-1], outputs_RH, positions_R, slots_R, here)
            tokens.append(self._chosen(choose, ahead, outputs_RH, squares))
        return torch.stack(tokens, dim=1)

    def observe(self, ids_T: Tensor, features_TmH: Tensor, at: DecodePass) -> Tensor:
        """See ``NeuralDrafter.observe``."""
        fuse = self.module.fuse if self._fused is None else self._fused.fuse
        hidden = fuse(features_TmH.flatten(1))
        num_query = at.num_query(len(ids_T))
        rows, paged = places_of(at, num_query), prepare_pass(at, num_query, self._heads_per_key)
        return self._pass(ids_T, hidden, rows.positions.flatten(), rows.slots.flatten(), paged)[0]

    def _pass(
        self,
        ids_T: Tensor,
        hidden: Tensor,
        positions_T: Tensor,
        slots_T: Tensor,
        paged: DecodePass | PagedPass,
    ) -> tuple[Tensor, Tensor | None]:
        """One pass over T rows, whose keys and values are written to their slots.

        Returns:
            Outputs g [T, H], and their squares if ``_logits`` uses them.
        """
        if self._fused is None:
            embeds = self.embed(ids_T).to(hidden.dtype)

            def write_and_attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
                return decode_attention(q, k, v, self.keys, self.values, paged, self.scale)

            out: Tensor = self.module(
                embeds, hidden, *self.module.rope(positions_T), write_and_attend
            )
            return out, None

        def attend(q: Tensor) -> Tensor:
            return decode_attention(q, None, None, self.keys, self.values, paged, self.scale)

        return self._fused.forward(
            ids_T, hidden, positions_T, slots_T, attend, self.keys, self.values
        )

    def _chosen(
        self,
        choose: Callable[[Tensor, int], Tensor],
        number: int,
        outputs_RH: Tensor,
        squares: Tensor | None,
    ) -> Tensor:
        """Target ids [R] of one draft token."""
        place: Tensor | None = None
        if self._fused is not None and isinstance(choose, KeepsLogits):
            width = self.module.config.draft_vocab_size
            place = choose.place(number, outputs_RH[:, :1].expand(-1, width))
        return choose(self._logits(outputs_RH, squares, place), number)

    def _logits(self, outputs: Tensor, squares: Tensor | None, out: Tensor | None = None) -> Tensor:
        if self._fused is None:
            scores: Tensor = self.module.logits(outputs)
            return scores
        return self._fused.logits(outputs, squares, out)


def layer_ids(weights: Weights | None) -> tuple[int, ...]:
    """Layers of the target that a drafter with these weights reads."""
    return () if weights is None else Eagle3Config.from_json(weights.config).layer_ids


def build(context: DrafterContext) -> PagedEagle3:
    """The drafter that the engine begins with.

    Raises:
        ValueError: its weights are shaped for another target.
    """
    weights = first_weights(context)
    config = Eagle3Config.from_json(weights.config)
    check_shape(context, config.hidden_size, config.target_vocab_size)
    module = for_serving(lambda: Eagle3(config), context)
    drafter = PagedEagle3(module, context.embed, context.num_slots)
    drafter.version = weights.version
    return drafter


KIND = DrafterKind(TRAITS, build, layer_ids)
