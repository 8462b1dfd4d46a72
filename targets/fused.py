"""The forward pass of a Llama-like target in few launches.

Hugging Face's code runs about forty operations per layer. With few rows, they limit the speed of a
step more than reading the weights does. Here a layer takes six launches and attention:

    norm + q, k, v | head norms, RoPE, write to the pages | attention | o + residual
    norm + gate, up, silu | down + residual

Layers with a norm behind attention and MLP (Gemma 3) take eleven, because these norms stand between
a product and its residual.

Above ``few_rows`` rows, the library computes the products and only the operations between them are
fused. With pinned numerics, our kernels compute the products for any number of rows, and the order
of operations depends on the weights' shapes alone; in the library it depends on the number of rows.
Both round where Hugging Face does.

Shapes: T packed rows of one pass, H hidden, V vocabulary, m tapped layers, Hq query heads,
D head dimension.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from specops.cpu_operations import can_pack, joint_norms, packed
from specops.decoder_operations import (
    IN_FLOAT32,
    PACKED,
    few_rows_of,
    has_kernels,
    pick_operations,
)
from specops.linear import Norm
from specops.rope import rope_table
from targets.families import FAMILIES, family_of
from targets.layers import Family, Layer

Attend = Callable[[int, Tensor], Tensor]
"""Attention of one layer: (layer number, queries [T, Hq, D]) -> [T, Hq, D]. The rows' keys and
values are already in the layer's pages."""

_ROPES = ("default", "linear", "llama3", "yarn")
"""RoPE types whose frequencies do not depend on the sequence length."""
_WIDEST = 16_384


class Pool(Protocol):
    """Pages of every layer: [num_slots, Hkv, D] each. ``targets.target.KvPool`` is one."""

    keys: list[Tensor]
    values: list[Tensor]


def supports(model: Any) -> str | None:
    """``None`` if ``FusedDecoder`` computes the same as the model's own forward, else why not."""
    family = family_of(model)
    if family is None:
        return f"{type(model).__name__} is not among {', '.join(FAMILIES)}"
    return family.why_not(model) or _numbers(model, family)


def _numbers(model: Any, family: Family) -> str | None:
    """Why the shape, dtype or device prevents fusing; ``None`` if nothing does."""
    config, decoder = model.config, model.model
    attention = decoder.layers[0].self_attn
    name = "hidden_act" if hasattr(config, "hidden_act") else "hidden_activation"
    if (activation := getattr(config, name)) != family.activation:
        return f"the activation is {activation}, not {family.activation}"
    for rope in family.ropes(decoder.rotary_emb).values():
        if rope.kind not in _ROPES:
            return f"RoPE of type {rope.kind} depends on the sequence length"
        if 2 * rope.inv_freq.numel() != attention.head_dim:
            return "RoPE rotates only part of each head"
    if attention.head_dim < 4 or attention.head_dim & (attention.head_dim - 1):
        return f"the head dimension {attention.head_dim} is below 4 or not a power of two"
    if config.hidden_size > _WIDEST:
        return f"the hidden size {config.hidden_size} is above {_WIDEST}"
    kinds = {(p.dtype, p.device) for p in model.parameters()}
    if len(kinds) > 1:
        return f"the weights have {len(kinds)} dtypes or devices"
    if (dtype := next(iter(kinds))[0]) == torch.float64:
        return f"the weights are {dtype}"
    return None


def _check_in_place(before: list[tuple[nn.Parameter, Tensor]], layers: list[Any]) -> None:
    """Refuse layers whose weights are not the parameters themselves, which are put back.

    Args:
        before: every parameter and where its values were.
    """
    moved = [p for p, data in before if p.data_ptr() != data.data_ptr()]
    held = {data.untyped_storage().data_ptr() for _, data in before}
    copies = [t for layer in layers for t in _tensors_of(layer)
              if t.untyped_storage().data_ptr() not in held]  # fmt: skip
    if moved or copies:
        for parameter, data in before:
            parameter.data = data
        raise ValueError(
            f"{max(len(moved), len(copies))} weights would be copied, which swaps do not reach"
        )


def _copies_of(
    family: Family, decoder: Any, layers: list[Layer], final_norm: Norm
) -> list[tuple[Tensor, Callable[[], Tensor]]]:
    """Weights that are copies of a parameter, each with a function that makes it again."""
    pairs = [
        pair
        for module, layer in zip(decoder.layers, layers, strict=True)
        for pair in family.copies(module, layer)
    ]
    if final_norm.weight_K.data_ptr() != decoder.norm.weight.data_ptr():
        pairs.append((final_norm, decoder.norm))

    def made_again(module: Any) -> Callable[[], Tensor]:
        return lambda: family.norm(module).weight_K

    return [(norm.weight_K, made_again(module)) for norm, module in pairs]


def _tensors_of(value: Any) -> Iterator[Tensor]:
    """Tensors in a layer's fields, those of its norms and heads included."""
    if isinstance(value, Tensor):
        yield value
    elif is_dataclass(value):
        for field in fields(value):
            yield from _tensors_of(getattr(value, field.name))


@dataclass(frozen=True, slots=True)
class _Many:
    """Weights that many rows are multiplied with."""

    layers: list[Layer]
    head: Tensor


def _products_of(layer: Layer) -> dict[str, Tensor]:
    return {"qkv": layer.qkv, "o": layer.o, "gate_up": layer.gate_up, "down": layer.down}


def _weights_of(many: _Many) -> list[Tensor]:
    return [many.head, *(w for layer in many.layers for w in _products_of(layer).values())]


def _pack(many: _Many) -> _Many:
    layers = []
    for layer in many.layers:
        weights: dict[str, Any] = {n: packed(w) for n, w in _products_of(layer).items()}
        layers.append(replace(layer, heads=joint_norms(layer.heads), **weights))
    return _Many(layers, packed(many.head))


class FusedDecoder:
    """A Hugging Face model of a known family, run by our operations on the model's own weights.

    Weights are read in place: values copied into the model's parameters take effect in the next
    pass. Everything can be captured in a CUDA graph. One decoder's launches must run on a single
    stream.
    """

    def __init__(
        self,
        model: Any,
        num_positions: int | None = None,
        *,
        few_rows: int | None = None,
        use_kernels: bool | None = None,
        overlap: bool | None = None,
        ahead_bytes: int = 0,
        pinned: bool = False,
        in_place: bool = False,
        packs: bool = False,
    ) -> None:
        """Fuse the weights of ``model`` in place; its own forward still works.

        Args:
            model: see ``supports``.
            num_positions: exclusive upper bound on positions; ``None``: the model's maximum.
            few_rows: up to this many rows, 1..64, products are fused with their neighbours;
                ``None``: depends on the dtype.
            use_kernels: Triton kernels, or torch definitions; ``None``: kernels on a GPU.
            overlap: a kernel starts while the previous one still runs; ``None``: if the GPU can.
            ahead_bytes: bytes of each layer's o weight to fetch into the L2 cache during attention.
            pinned: a row's result is bitwise independent of the other rows, provided that
                attention's is.
            in_place: no weight moves and none is copied, so that what overwrites a parameter where
                it lies changes the next pass.
            packs: multiply with packed copies of the weights where that is faster: in float32 on a
                CPU, if they take at most 1 GiB. ``follow`` makes them again.

        Raises:
            ValueError: the model cannot be fused, ``pinned`` without kernels, or a weight would
                move or be copied.
        """
        reason, family = supports(model), family_of(model)
        if reason is not None or family is None:
            raise ValueError(f"{type(model).__name__} cannot be fused: {reason}")
        decoder, config = model.model, model.config
        self.embedding: Tensor = decoder.embed_tokens.weight.detach()
        self.head: Tensor = model.lm_head.weight.detach()
        by_columns = self.head.device.type == "cpu" and not use_kernels and not in_place
        before = [(p, p.data) for p in model.parameters()] if in_place else []
        self.layers = [family.layer(layer, by_columns) for layer in decoder.layers]
        if in_place:
            _check_in_place(before, self.layers)
        self.final_norm = family.norm(decoder.norm)
        self._copies = _copies_of(family, decoder, self.layers, self.final_norm)
        self._embed_scale = family.embed_scale(decoder.embed_tokens)
        self.scale: float = decoder.layers[0].self_attn.scaling
        """Factor of the attention scores."""
        length = config.max_position_embeddings if num_positions is None else num_positions
        self._tables = {
            name: rope_table(
                rope.inv_freq.to(self.head.device), rope.scaling, length, self.head.dtype
            )
            for name, rope in family.ropes(decoder.rotary_emb).items()
        }
        self.few_rows = few_rows_of(self.head, use_kernels) if few_rows is None else few_rows
        self.is_pinned = pinned
        layer = self.layers[0]
        bare = (layer.qkv, layer.o, layer.down, self.head)
        gates_alone = family.activation == "silu" and layer.after_mlp is None
        products = [(layer.gate_up, gates_alone), *((weight, False) for weight in bare)]
        self._operations = pick_operations(products, use_kernels, overlap, pinned)
        do = self._operations
        self._gate = do.silu_gate if family.activation == "silu" else do.gelu_gate
        self._ahead_bytes = ahead_bytes if has_kernels(self._operations) else 0
        self._many = _Many(self.layers, self.head)
        self._only: frozenset[int] | None = None
        """Layers that passes compute; ``None``: all."""
        is_plain = self._operations is IN_FLOAT32 and not in_place
        if packs and is_plain and can_pack(_weights_of(self._many)):
            self._operations, self._many = PACKED, _pack(self._many)

    @property
    def heads_per_key(self) -> int:
        """Query heads of a key head."""
        heads = self.layers[0].heads
        return heads.num_query // heads.num_kv

    def num_unreached(self, model: Any) -> int:
        """Weights of the layers that ``follow`` would leave as they are, because they are copies
        that the family does not list."""
        reached = {p.untyped_storage().data_ptr() for p in model.parameters()}
        reached |= {copy.untyped_storage().data_ptr() for copy, _ in self._copies}
        tensors = (t for layer in self.layers for t in _tensors_of(layer))
        return sum(t.untyped_storage().data_ptr() not in reached for t in tensors)

    def follow(self) -> None:
        """The model's parameters were overwritten where they lie: make again, in place, what was
        copied from them."""
        for copy, again in self._copies:
            copy.copy_(again())
        if self._operations is PACKED:
            self._many = _pack(_Many(self.layers, self.head))

    def forward(
        self,
        ids_T: Tensor,
        positions_T: Tensor,
        slots_T: Tensor,
        attend: Attend,
        pool: Pool,
        taps: tuple[int, ...] = (),
    ) -> tuple[Tensor, Tensor]:
        """One pass over T packed rows of any requests.

        Args:
            ids_T, positions_T, slots_T: [T] int64; slots are where the rows' keys and values go.
            attend: attention over the pages.
            taps: distinct layer ids whose output to keep; 0 is the embeddings.

        Returns:
            Features [T, m, H], the residual stream after the tapped layers, in their order
            ([T, 0, 0] without taps); hidden [T, H], the lm_head's input.

        Raises:
            ValueError: a layer is tapped twice.
        """
        if len(set(taps)) < len(taps):
            raise ValueError(f"a layer can be tapped only once, got {taps}")
        ids_T, positions_T, slots_T = (t.contiguous() for t in (ids_T, positions_T, slots_T))
        num_rows, width = len(ids_T), self.embedding.shape[1]
        if taps:
            features = self.embedding.new_empty(num_rows, len(taps), width)
        else:
            features = self.embedding.new_empty(num_rows, 0, 0)
        stream = self.embedding.new_empty(num_rows, width)
        # Where each layer writes the residual stream; tapped layers write to the features.
        outs = [stream] * (len(self.layers) + 1)
        for place, layer in enumerate(taps):
            outs[layer] = features[:, place]

        do = self._operations
        tables = {name: do.rope_rows(table, positions_T) for name, table in self._tables.items()}

        def heads_of(index: int, qkv: Tensor) -> Tensor:
            layer = self.layers[index]
            more: dict[str, Any] = {}
            if self._ahead_bytes:
                more = {"ahead": layer.o, "ahead_bytes": self._ahead_bytes}
            q = do.rope_and_write(
                qkv, self._many.layers[index].heads, tables[layer.rope], positions_T, slots_T,
                pool.keys[index], pool.values[index], **more,
            )  # fmt: skip
            return attend(index, q).flatten(1)

        squares = do.embed(ids_T, self.embedding, outs[0])
        if self._embed_scale is not None:
            # The factor is rounded first, as Hugging Face does.
            outs[0].mul_(outs[0].new_full((), self._embed_scale))
        if self.layers[0].after_mlp is not None:
            return features, self._between_norms(outs, stream, heads_of)
        assert self._embed_scale is None, "the squares are of unscaled rows"
        run = self._few_rows if self._are_few(num_rows) else self._many_rows
        return features, run(outs, stream, squares, heads_of)

    @contextmanager
    def abridged(self, taps: tuple[int, ...]) -> Iterator[None]:
        """Passes compute only the first and the last layer, those beside a tapped one, and one of
        each other kind, until the block ends: every kernel is launched that a whole pass launches.
        """
        first_of_kind: dict[Any, int] = {}
        for index, layer in enumerate(self.layers):
            first_of_kind.setdefault(_kind_of(layer), index)
        beside = {index for tap in taps for index in (tap - 1, tap)}
        last = len(self.layers) - 1
        self._only = frozenset({0, last, *beside, *first_of_kind.values()})
        try:
            yield
        finally:
            self._only = None

    def _shown(self, layers: Sequence[Layer]) -> Iterator[tuple[int, Layer]]:
        """The layers of a pass with their numbers."""
        only = self._only
        if only is None:
            return enumerate(layers)
        return ((n, layer) for n, layer in enumerate(layers) if n in only)

    def _are_few(self, num_rows: int) -> bool:
        return self.is_pinned or num_rows <= self.few_rows

    def _few_rows(
        self,
        outs: list[Tensor],
        stream: Tensor,
        squares: Tensor,
        heads_of: Callable[[int, Tensor], Tensor],
    ) -> Tensor:
        do = self._operations
        for index, layer in self._shown(self.layers):
            qkv = do.few_row_linear(outs[index], layer.qkv, layer.attention_norm, squares)
            mixed = heads_of(index, qkv)
            middle, squares = do.few_row_residual(mixed, layer.o, outs[index], stream)
            gated = do.few_row_linear(middle, layer.gate_up, layer.mlp_norm, squares, gated=True)
            _, squares = do.few_row_residual(gated, layer.down, middle, outs[index + 1])
        return do.add_norm(outs[-1], None, self.final_norm, None)

    def _many_rows(
        self,
        outs: list[Tensor],
        stream: Tensor,
        _squares: Tensor,
        heads_of: Callable[[int, Tensor], Tensor],
    ) -> Tensor:
        do, product = self._operations, self._operations.linear
        norms = [layer.attention_norm for layer in self.layers] + [self.final_norm]
        normed = do.add_norm(outs[0], None, norms[0], None)
        for index, layer in self._shown(self._many.layers):
            mixed = heads_of(index, product(normed, layer.qkv))
            normed = do.linear_add_norm(mixed, layer.o, outs[index], layer.mlp_norm, stream)
            gated = self._gate(product(normed, layer.gate_up))
            normed = do.linear_add_norm(
                gated, layer.down, stream, norms[index + 1], outs[index + 1]
            )
        return normed

    def _between_norms(
        self,
        outs: list[Tensor],
        stream: Tensor,
        heads_of: Callable[[int, Tensor], Tensor],
    ) -> Tensor:
        """Layers whose halves have a norm before and behind them."""
        do = self._operations
        product, layers = do.linear, self._many.layers
        if self._are_few(len(stream)):
            product, layers = do.few_row_linear, self.layers
        norms = [layer.attention_norm for layer in self.layers] + [self.final_norm]
        normed = do.add_norm(outs[0], None, norms[0], None)
        for index, layer in self._shown(layers):
            behind_attention, behind_mlp = _outer_norms(layer)
            update = product(heads_of(index, product(normed, layer.qkv)), layer.o)
            update = do.add_norm(update, None, behind_attention, None)
            normed = do.add_norm(outs[index], update, layer.mlp_norm, stream)
            update = product(self._gate(product(normed, layer.gate_up)), layer.down)
            update = do.add_norm(update, None, behind_mlp, None)
            normed = do.add_norm(stream, update, norms[index + 1], outs[index + 1])
        return normed

    def logits(self, hidden: Tensor, *, widen: bool = True) -> Tensor:
        """[..., H] -> [..., V] float32 (float64 for a float64 model).

        Args:
            widen: if False, in the cheapest dtype that holds the same values.
        """
        wide = torch.float64 if hidden.dtype == torch.float64 else torch.float32
        flat = hidden.reshape(-1, hidden.shape[-1])
        if not len(flat) or not self._are_few(len(flat)):
            scores = self._operations.linear(flat, self._many.head)
            scores = scores.to(wide) if widen else scores
        else:
            out = torch.empty(len(flat), len(self.head), dtype=wide, device=hidden.device)
            scores = self._operations.few_row_linear(flat, self.head, out=out)
        return scores.view(*hidden.shape[:-1], len(self.head))


def _kind_of(layer: Layer) -> Any:
    """What a layer has in common with others that launch the same kernels."""
    tensors = tuple((t.dtype, tuple(t.shape), t.data_ptr() % 16) for t in _tensors_of(layer))
    return tensors, layer.window, layer.rope, layer.heads.num_query, layer.heads.num_kv


def _outer_norms(layer: Layer) -> tuple[Norm, Norm]:
    assert layer.after_attention is not None and layer.after_mlp is not None
    return layer.after_attention, layer.after_mlp
