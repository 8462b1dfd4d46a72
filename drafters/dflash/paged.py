"""DFlash in a running engine: drafts a whole block of tokens in one pass, over rows in the pages.

The tapped layers of the target at each position become the context: ``fc`` joins them, and every
layer of the drafter projects the result to keys and values. A draft is one pass over the anchor's
token and masks behind it; these rows see the context before the anchor and each other. The row at
offset k predicts the token k places after the anchor, through the target's own embedding and
lm_head.

Context position j is kept in slot j + 1: there it is the row of token j + 1, which is computed from
the target's hidden states at j, as ``drafters.protocol`` has it. The rows of a draft follow the
anchor's in the same way, and are overwritten.

Shapes: T rows, R requests, K draft tokens, B = K + 1 rows of a block, H hidden, m tapped layers,
Hq/Hkv query/key heads, D head dimension.

Source: DFlash, arXiv:2602.06036, Section 4.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from drafters.dflash.fused import FusedDFlash, supports
from drafters.dflash.model import DFlash, DFlashConfig
from drafters.fused_layers import Fusable
from drafters.protocol import DrafterContext, DrafterKind, Traits, Weights, choose_block
from drafters.stored_module import check_shape, first_weights, for_serving
from specops.attention import DecodePass, PagedPass, Places
from specops.device import decode_attention, places_of, prepare_pass
from targets.target import KvPool

TRAITS = Traits(
    on_device=True, learns=True, needs_match=False, draws=True, prior_draft_cost=0.05
)  # fmt: skip
Passes = list[DecodePass | PagedPass]
"""What each layer's attention sees."""


class PagedDFlash(Fusable[FusedDFlash]):
    """One drafter module, its KV pool and its version. A ``NeuralDrafter``."""

    kind = "dflash"
    traits = TRAITS
    first_row = 1
    vocab = None

    def __init__(
        self,
        module: DFlash,
        embed: nn.Module,
        lm_head: Callable[[Tensor], Tensor],
        num_slots: int,
    ) -> None:
        """
        Args:
            module: weights in serving dtype and device; edited in place by swaps.
            embed, lm_head: the target's.
            num_slots: slots of the target's KV pool; the drafter's pool uses the same numbers.
        """
        c, weight = module.config, module.fc.weight
        self.module, self.embed, self.lm_head = module, embed, lm_head
        self.version = 0
        self.layer_ids = c.layer_ids
        self.output_size = c.hidden_size
        self.scale = c.head_dim**-0.5
        self.pool = KvPool(
            len(c.windows), num_slots, c.num_kv_heads, c.head_dim, weight.dtype, weight.device
        )
        self._heads_per_key = c.num_heads // c.num_kv_heads
        self._mask = torch.tensor([c.mask_token_id], device=weight.device)

    def _why_not_fused(self) -> str | None:
        return supports(self.module, self.embed)

    def _make_fused(self, num_positions: int, **options: Any) -> FusedDFlash:
        return FusedDFlash(self.module, self.embed, num_positions, **options)

    def observe(self, ids_T: Tensor, features_TmH: Tensor, at: DecodePass) -> Tensor:
        """See ``NeuralDrafter.observe``: keeps the context, and returns the tokens' embeddings."""
        rows = places_of(at, at.num_query(len(ids_T)))
        if self._fused is not None:
            self._fused.write_context(features_TmH.flatten(1), rows, self.pool)
            return self._fused.embeds(ids_T)
        slots_T = rows.slots.flatten()
        rope = self.module.rope(_positions(rows.positions.flatten()))
        context = self.module.context(features_TmH.flatten(1), *rope)
        for index, (k, v) in enumerate(context):
            self.pool.keys[index].index_copy_(0, slots_T, k)
            self.pool.values[index].index_copy_(0, slots_T, v)
        embeds: Tensor = self.embed(ids_T)
        return embeds.to(features_TmH.dtype)

    def propose(
        self,
        outputs_RH: Tensor,
        at: DecodePass,
        num_draft: int,
        choose: Callable[[Tensor, int], Tensor],
    ) -> Tensor:
        """See ``NeuralDrafter.propose``: one pass, over as many rows as are drafted and the
        anchor's."""
        num_requests, block = len(outputs_RH), num_draft + 1
        rows, passes = places_of(at, block), self._passes(at, block)
        by_own = self._by_module if self._fused is None else self._by_fused
        hidden = by_own(outputs_RH, rows, passes).view(num_requests, block, -1)
        # By position, so that each position's logits are adjacent.
        logits = self.lm_head(hidden.transpose(0, 1)[1:].contiguous())
        return choose_block(choose, logits)

    def _by_fused(self, outputs_RH: Tensor, rows: Places, passes: Passes) -> Tensor:
        """The lm_head's input [R * B, H] at the rows of blocks."""
        assert self._fused is not None

        def attend(index: int, q: Tensor) -> Tensor:
            kept = self.pool.keys[index], self.pool.values[index]
            window = self.module.config.windows[index]
            return decode_attention(q, None, None, *kept, passes[index], self.scale, window)

        return self._fused.hidden(outputs_RH, rows, attend, self.pool)

    def _by_module(self, outputs_RH: Tensor, rows: Places, passes: Passes) -> Tensor:
        """``_by_fused`` with the module's own code."""
        num_requests, num_masks = len(outputs_RH), rows.positions.shape[1] - 1
        mask = self.embed(self._mask).to(outputs_RH.dtype).expand(num_requests, num_masks, -1)
        embeds = torch.cat((outputs_RH[:, None], mask), dim=1).flatten(0, 1)

        def attend(index: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            kept = self.pool.keys[index], self.pool.values[index]
            window = self.module.config.windows[index]
            return decode_attention(q, k, v, *kept, passes[index], self.scale, window)

        rope = self.module.rope(_positions(rows.positions.flatten()))
        hidden: Tensor = self.module(embeds, *rope, attend)
        return hidden

    def _passes(self, at: DecodePass, block: int) -> Passes:
        """The pass of each layer."""
        causal, share = self.module.config.causal, self._heads_per_key
        made = {
            kind: prepare_pass(replace(at, is_block=not kind), block, share) for kind in set(causal)
        }
        return [made[kind] for kind in causal]


def _positions(rows: Tensor) -> Tensor:
    """Position that a slot's row is about: the row of token j + 1 holds the context of j."""
    return (rows - 1).clamp(min=0)


def layer_ids(weights: Weights | None) -> tuple[int, ...]:
    """Layers of the target that a drafter with these weights reads."""
    return () if weights is None else DFlashConfig.from_json(weights.config).layer_ids


def build(context: DrafterContext) -> PagedDFlash:
    """The drafter that the engine begins with.

    Raises:
        ValueError: its weights are shaped for another target, or ``drafter.max_draft`` is beyond
            its blocks.
    """
    weights = first_weights(context)
    config = DFlashConfig.from_json(weights.config)
    check_shape(context, config.hidden_size, config.target_vocab_size)
    most, wanted = config.block_size - 1, context.settings.max_draft
    if wanted > most:
        # It would compute a longer block, but never learnt one.
        raise ValueError(
            f"drafter.max_draft is {wanted}, but blocks of {config.block_size} hold an anchor and "
            f"{most} draft tokens; set drafter.max_draft to {most}"
        )
    module = for_serving(lambda: DFlash(config), context)
    drafter = PagedDFlash(module, context.embed, context.logits, context.num_slots)
    drafter.version = weights.version
    return drafter


KIND = DrafterKind(TRAITS, build, layer_ids)
