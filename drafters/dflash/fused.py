"""The passes of a DFlash drafter in few launches, for serving.

Committed rows take three launches and one for each layer, because no row of the context sees
another, so that the keys and values of all layers come from one product:

    fc | norm + k, v of all layers | key norm, RoPE, write to the pages: one for each layer

A block takes those of ``drafters.fused_layers`` and a final norm. The context of position j lies in
the slot of position j + 1, so the table of rotary embeddings is shifted instead of the positions.

Shapes as in ``drafters.dflash.paged``.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from drafters.dflash.model import DFlash, DFlashConfig
from drafters.fused_layers import (
    Attend,
    FusedLayers,
    Parts,
    RowsOf,
    bias_in,
    norm_of,
    why_not_fused,
)
from specops.attention import Places
from specops.rope import Heads, RopeTable, rope_table
from targets.layers import Layer
from targets.target import KvPool


def supports(module: nn.Module, embed: nn.Module) -> str | None:
    """``None`` if ``FusedDFlash`` computes what this drafter does, else why not.

    Args:
        embed: the target's token embedding; must be a plain ``nn.Embedding``.
    """
    if type(module) is not DFlash:
        return f"the drafter is a {type(module).__name__}"
    c = module.config
    shape = c.hidden_size, c.target_vocab_size, c.head_dim
    return why_not_fused(module, embed, *shape) or bias_in(module)


class FusedDFlash:
    """A ``DFlash`` run by our operations on the module's own weights.

    Joined weights are views of the module's, except those of the context, which are a copy, and all
    of them on a CPU. New weights are in force after ``follow``. Everything can be captured in a
    CUDA graph. One drafter's launches must run on a single stream.
    """

    def __init__(
        self,
        module: DFlash,
        embed: nn.Module,
        num_positions: int,
        *,
        use_kernels: bool | None = None,
        **options: Any,
    ) -> None:
        """
        Args:
            module, embed: see ``supports``.
            num_positions: exclusive upper bound on the rows' positions.
            use_kernels, options: keywords of ``FusedLayers``.

        Raises:
            ValueError: the drafter cannot be fused.
        """
        reason = supports(module, embed)
        if reason is not None:
            raise ValueError(f"the drafter cannot be fused: {reason}")
        assert isinstance(embed, nn.Embedding)
        self._table_VH = embed.weight.detach()
        self._mask_H = self._table_VH[module.config.mask_token_id]
        self._hidden_norm, self._final_norm = norm_of(module.hidden_norm), norm_of(module.norm)
        c, weight = module.config, module.fc.weight.detach()
        table = rope_table(
            module.inverse_frequency(weight.device), 1.0, num_positions, weight.dtype
        )
        self._table = RopeTable(*(_shifted(x) for x in (table.cos, table.sin)))
        layers: Any = module.layers
        attentions = [layer.self_attn for layer in layers]
        both = [p.weight for one in attentions for p in (one.k_proj, one.v_proj)]
        self._by_columns = weight.device.type == "cpu" and not use_kernels
        self._joined = [RowsOf(both, self._by_columns)]
        parts = Parts(
            tuple(self._layer(layer, c) for layer in layers),
            {"fc": weight, "context": self._joined[0].weight},
        )
        self._keys = [_key_heads(one, c.num_kv_heads) for one in attentions]
        self.layers = FusedLayers(parts, use_kernels=use_kernels, **options)

    def _layer(self, layer: Any, c: DFlashConfig) -> Layer:
        attention, mlp = layer.self_attn, layer.mlp
        products = (attention.q_proj, attention.k_proj, attention.v_proj)
        qkv = RowsOf([product.weight for product in products], self._by_columns)
        gate_up = RowsOf([mlp.gate_proj.weight, mlp.up_proj.weight], self._by_columns)
        self._joined += [qkv, gate_up]
        norms = norm_of(attention.q_norm), norm_of(attention.k_norm)
        return Layer(
            norm_of(layer.input_layernorm),
            qkv.weight,
            Heads(c.num_heads, c.num_kv_heads, *norms),
            attention.o_proj.weight.detach(),
            norm_of(layer.post_attention_layernorm),
            gate_up.weight,
            mlp.down_proj.weight.detach(),
        )

    def follow(self) -> None:
        """The module's weights were overwritten where they lie."""
        for one in self._joined:
            one.follow()
        self.layers.follow()

    def embeds(self, ids_T: Tensor) -> Tensor:
        """The target's embeddings of tokens, [T, H]."""
        out = self._table_VH.new_empty(len(ids_T), self._table_VH.shape[1])
        self.layers.do.embed(ids_T.contiguous(), self._table_VH, out)
        return out

    def write_context(self, features: Tensor, places: Places, pool: KvPool) -> None:
        """Write the keys and values of committed rows to their slots, for every layer.

        Args:
            features: [T, m * H] tapped rows in ``layer_ids`` order.
            places: [R, Q] positions and slots of the rows.
        """
        hidden = self.layers.product(features, "fc")
        both = self.layers.product(hidden, "context", self._hidden_norm)
        positions_T, slots_T = places.positions.flatten(), places.slots.flatten()
        do = self.layers.do
        table = do.rope_rows(self._table, positions_T)
        each = zip(both.chunk(len(self._keys), dim=1), self._keys, pool.keys, pool.values,
                   strict=True)  # fmt: skip
        for own, heads, keys, values in each:
            do.rope_and_write(own, heads, table, positions_T, slots_T, keys, values)

    def hidden(self, anchors_RH: Tensor, places: Places, attend: Attend, pool: KvPool) -> Tensor:
        """The lm_head's input [R * B, H] at the rows of blocks.

        Args:
            anchors_RH: embeddings of the anchors' tokens.
            places: [R, B] positions and slots of the rows.
        """
        num_requests, width = anchors_RH.shape
        num_masks = places.positions.shape[1] - 1
        masks = self._mask_H.expand(num_requests, num_masks, width)
        stream = torch.cat((anchors_RH[:, None], masks), dim=1).flatten(0, 1)
        positions_T, slots_T = places.positions.flatten(), places.slots.flatten()
        do, all_heads = self.layers.do, self.layers.heads
        table = do.rope_rows(self._table, positions_T)

        def heads_of(index: int, qkv: Tensor) -> Tensor:
            kept = pool.keys[index], pool.values[index]
            q = do.rope_and_write(qkv, all_heads[index], table, positions_T, slots_T, *kept)
            return attend(index, q).flatten(1)

        return self.layers.forward(stream, None, heads_of, self._final_norm)[0]


def _key_heads(attention: Any, num_kv: int) -> Heads:
    """Heads of a row that holds keys and values alone."""
    norm = norm_of(attention.k_norm)
    return Heads(0, num_kv, norm, norm)


def _shifted(x_PD: Tensor) -> Tensor:
    """Row p holds what row p - 1 did; the first two are the same."""
    return torch.cat((x_PD[:1], x_PD[:-1]))
