"""The pass of an EAGLE-3 drafter in few launches, for serving.

``Eagle3`` runs about 45 small operations per pass. With few rows, these limit the speed of a pass,
not reading the weights. Here a pass takes seven launches and attention:

    norm of embedding and of hidden | q, k, v | RoPE, write to the pages | attention | o + residual
    norm + gate, up, silu | down + residual | norm + draft head

Above ``few_rows`` rows, the library computes the products and only the operations between them are
fused.

Norms round twice, as ``specops.linear.rms_norm`` does, where ``nn.RMSNorm`` and so training round
once: in bfloat16 some elements differ in their last bit. This occasionally changes a draft, but
never the output: verification uses the logits that the draft was drawn from.

Shapes as in ``drafters.eagle3.model``.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from drafters.eagle3.model import Eagle3
from drafters.fused_layers import bias_in, norm_of, why_not_fused
from specops.cpu_operations import can_pack, packed
from specops.decoder_operations import IN_FLOAT32, PACKED, few_rows_of, pick_operations
from specops.rope import Heads, rope_table

Attend = Callable[[Tensor], Tensor]
"""Attention: queries [T, Hq, D] -> [T, Hq, D]. The rows' keys and values are already in their
slots."""

_PRODUCTS = ("fc", "qkv_proj", "o_proj", "gate_up_proj", "down_proj", "lm_head")


def supports(module: nn.Module, embed: nn.Module) -> str | None:
    """``None`` if ``FusedEagle3`` computes what this drafter does, else why not.

    Args:
        embed: the target's token embedding; must be a plain ``nn.Embedding``.
    """
    if type(module) is not Eagle3:
        return f"the drafter is a {type(module).__name__}"
    return supports_first_layer(module, embed)


def supports_first_layer(module: Eagle3, embed: nn.Module) -> str | None:
    """``supports`` for modules that add further layers to an ``Eagle3``."""
    c = module.config
    for variant in ("norm_before_residual", "fc_norm", "norm_output"):
        if getattr(c, variant):
            return f"the drafter has {variant}"
    shape = c.hidden_size, c.target_vocab_size, c.head_dim
    return why_not_fused(module, embed, *shape) or bias_in(module)


class FusedEagle3:
    """An ``Eagle3`` run by our operations on the module's own weights.

    Weights are read in place: values copied into the module's parameters take effect in the next
    pass. Everything can be captured in a CUDA graph, which keeps the parameters' addresses. One
    drafter's launches must run on a single stream.
    """

    def __init__(
        self,
        module: Eagle3,
        embed: nn.Module,
        num_positions: int,
        *,
        few_rows: int | None = None,
        use_kernels: bool | None = None,
        overlap: bool | None = None,
        packs: bool = False,
    ) -> None:
        """
        Args:
            module, embed: see ``supports_first_layer``.
            num_positions: exclusive upper bound on the rows' positions.
            few_rows: up to this many rows, 1..64, products are fused with their neighbours;
                ``None``: depends on the dtype.
            use_kernels, overlap: see ``pick_operations``.
            packs: multiply with packed copies of the weights where that is faster, as
                ``targets.fused.FusedDecoder``. New weights are in force after ``follow``.

        Raises:
            ValueError: the drafter cannot be fused.
        """
        reason = supports_first_layer(module, embed)
        if reason is not None:
            raise ValueError(f"the drafter cannot be fused: {reason}")
        assert isinstance(embed, nn.Embedding)
        self.module, self.embed = module, embed
        c, weight = module.config, module.lm_head.weight
        self.heads = Heads(c.num_heads, c.num_kv_heads)
        self.table = rope_table(
            module.inverse_frequency(weight.device), 1.0, num_positions, weight.dtype
        )
        self.few_rows = few_rows_of(weight, use_kernels) if few_rows is None else few_rows
        linears = (module.fc, module.qkv_proj, module.o_proj, module.down_proj, module.lm_head)
        products = [(module.gate_up_proj.weight, True), *((m.weight, False) for m in linears)]
        self._operations = pick_operations(products, use_kernels, overlap)
        self._packed: dict[str, Tensor] | None = None
        can = self._operations is IN_FLOAT32 and can_pack([w for w, _ in products])
        if packs and can:
            self._operations, self._packed = PACKED, self._pack()

    def _pack(self) -> dict[str, Tensor]:
        return {name: packed(self._weight(name)) for name in _PRODUCTS}

    def follow(self) -> None:
        """The module's weights were overwritten: make the packed copies again."""
        if self._packed is not None:
            self._packed = self._pack()

    def _weight(self, name: str) -> Tensor:
        weight: Tensor = getattr(self.module, name).weight
        return weight.detach()

    def _many(self, name: str) -> Tensor:
        """The weight that many rows are multiplied with."""
        return self._weight(name) if self._packed is None else self._packed[name]

    def fuse(self, features: Tensor) -> Tensor:
        """Tapped rows [T, m * H] (layer_ids order) -> h [T, H]."""
        return self._product(features, "fc")

    def forward(
        self,
        ids_T: Tensor,
        hidden: Tensor,
        positions_T: Tensor,
        slots_T: Tensor,
        attend: Attend,
        keys: Tensor,
        values: Tensor,
    ) -> tuple[Tensor, Tensor | None]:
        """Run the layer like ``Eagle3.forward``, and write its keys and values to the rows' slots.

        Args:
            ids_T, positions_T, slots_T: [T] int64 of the rows.
            hidden: [T, H], fused features, or the output of the preceding row.
            keys, values: [num_slots, Hkv, D] contiguous, written in place.

        Returns:
            Outputs [T, H], before the final norm, and their squares for ``logits``.
        """
        qkv = self.heads_of(ids_T, hidden)
        return self.behind_heads(qkv, hidden, positions_T, slots_T, attend, keys, values)

    def heads_of(self, ids_T: Tensor, hidden: Tensor) -> Tensor:
        """[T, C] queries, keys and values of rows, before RoPE."""
        do, m = self._operations, self.module
        norms = norm_of(m.input_layernorm), norm_of(m.hidden_norm)
        pair = do.norm_pair(ids_T.contiguous(), self.embed.weight.detach(), hidden, *norms)
        return self._product(pair, "qkv_proj")

    def behind_heads(
        self,
        qkv: Tensor,
        hidden: Tensor,
        positions_T: Tensor,
        slots_T: Tensor,
        attend: Attend,
        keys: Tensor,
        values: Tensor,
    ) -> tuple[Tensor, Tensor | None]:
        """``forward`` from the result of ``heads_of`` on; rows of ``qkv`` and ``hidden`` need not
        be adjacent."""
        do = self._operations
        positions_T, slots_T = positions_T.contiguous(), slots_T.contiguous()
        table = do.rope_rows(self.table, positions_T)
        q = do.rope_and_write(qkv, self.heads, table, positions_T, slots_T, keys, values)
        run = self._few_rows if self._are_few(qkv) else self._many_rows
        return run(attend(q).flatten(1), hidden)

    def _few_rows(self, mixed: Tensor, hidden: Tensor) -> tuple[Tensor, Tensor | None]:
        do, m = self._operations, self.module
        norm = norm_of(m.post_attention_layernorm)
        stream, squares = do.few_row_residual(mixed, m.o_proj.weight.detach(), hidden)
        gate_up = m.gate_up_proj.weight.detach()
        gated = do.few_row_linear(stream, gate_up, norm, squares, gated=True)
        return do.few_row_residual(gated, m.down_proj.weight.detach(), stream)

    def _many_rows(self, mixed: Tensor, hidden: Tensor) -> tuple[Tensor, Tensor | None]:
        do, m = self._operations, self.module
        stream = torch.empty(hidden.shape, dtype=hidden.dtype, device=hidden.device)
        norm = norm_of(m.post_attention_layernorm)
        normed = do.linear_add_norm(mixed, self._many("o_proj"), hidden, norm, stream)
        gated = do.silu_gate(do.linear(normed, self._many("gate_up_proj")))
        return stream.add_(do.linear(gated, self._many("down_proj"))), None

    def logits(
        self, outputs: Tensor, squares: Tensor | None = None, out: Tensor | None = None
    ) -> Tensor:
        """[T, H] -> [T, Vd] over the draft vocabulary, in the weights' dtype.

        Args:
            squares: squares of these outputs, from ``forward``.
            out: [T, Vd], written and returned; rows need not be adjacent.
        """
        do, norm = self._operations, norm_of(self.module.norm)
        if squares is None:
            return self._product(do.add_norm(outputs, None, norm, None), "lm_head", out)
        return do.few_row_linear(outputs, self._weight("lm_head"), norm, squares, out=out)

    def _are_few(self, rows: Tensor) -> bool:
        return 0 < len(rows) <= self.few_rows

    def _product(self, rows: Tensor, name: str, out: Tensor | None = None) -> Tensor:
        if self._are_few(rows):
            return self._operations.few_row_linear(rows, self._weight(name), out=out)
        if out is not None and self._packed is None:
            return torch.mm(rows, self._weight(name).t(), out=out)
        product: Tensor = self._operations.linear(rows, self._many(name))
        return product if out is None else out.copy_(product)
