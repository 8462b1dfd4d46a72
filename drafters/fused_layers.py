"""Llama's layers of a drafter in few launches, for serving.

A drafter's own module runs about thirty small operations per layer. With few rows, launching these
limits the speed of a draft, not reading the weights. Here a layer takes five launches and
attention:

    norm + q, k, v | RoPE, write to the pages | attention | o + residual
    norm + gate, up, silu | down + residual

Above ``few_rows`` rows, the library computes the products and only the operations between them are
fused. Norms round twice, see ``drafters.eagle3.fused``.

Shapes: T rows, H hidden, Hq/Hkv query/key heads, D head dimension, C = (Hq + 2 Hkv) * D.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Generic, Protocol, TypeVar

import torch
from torch import Tensor, nn

from specops.cpu_operations import can_pack, joint_norms, packed
from specops.decoder_operations import IN_FLOAT32, PACKED, few_rows_of, pick_operations
from specops.linear import Norm
from specops.rope import Heads
from targets.layers import Layer, are_adjacent, columns_of

HeadsOf = Callable[[int, Tensor], Tensor]
"""(layer, its product of queries, keys and values [T, C]) -> output of attention [T, Hq * D]."""
Attend = Callable[[int, Tensor], Tensor]
"""(layer, queries [T, Hq, D]) -> [T, Hq, D]. The rows' keys and values are already in their
slots."""


class Follows(Protocol):
    """Fused passes of a drafter."""

    def follow(self) -> None:
        """The module's weights were overwritten: make copies of them again."""


FusedT = TypeVar("FusedT", bound=Follows)

_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
_WIDEST = 16_384


class Fusable(Generic[FusedT]):
    """A neural drafter whose passes can run our operations instead of its module's own code."""

    _fused: FusedT | None = None

    def fuse(self, num_positions: int, **options: Any) -> str | None:
        """See ``NeuralDrafter.fuse``.

        Args:
            options: passed to what computes the passes, e.g. ``FusedEagle3``.
        """
        reason = self._why_not_fused()
        if reason is None:
            self._fused = self._make_fused(num_positions, **{"packs": True, **options})
        return reason

    def _why_not_fused(self) -> str | None:
        """``None`` if our operations compute what the module does."""
        raise NotImplementedError

    def _make_fused(self, num_positions: int, **options: Any) -> FusedT:
        raise NotImplementedError

    def follow_weights(self) -> None:
        """See ``drafters.protocol.FollowsWeights``."""
        if self._fused is not None:
            self._fused.follow()

    @property
    def is_fused(self) -> bool:
        """Whether passes run our operations instead of the module's own code."""
        return self._fused is not None


def why_not_fused(
    module: nn.Module, embed: nn.Module, hidden_size: int, vocab_size: int, head_dim: int
) -> str | None:
    """Why our operations would not compute what a drafter's module does; ``None`` if they would.

    Args:
        embed: the target's token embedding; must be a plain ``nn.Embedding``.
        vocab_size: of the target.
    """
    if type(embed) is not nn.Embedding:
        return f"the target's embedding is a {type(embed).__name__}, not a plain Embedding"
    if embed.max_norm is not None:
        return "the target's embedding has a max_norm"
    if embed.embedding_dim != hidden_size or embed.num_embeddings < vocab_size:
        return (
            f"the target's embedding is {embed.num_embeddings} by {embed.embedding_dim}, "
            f"not {vocab_size} by {hidden_size}"
        )
    kinds = {(p.dtype, p.device) for p in (*module.parameters(), embed.weight)}
    if len(kinds) > 1:
        return f"the weights have {len(kinds)} dtypes or devices"
    if (dtype := next(iter(kinds))[0]) not in _DTYPES:
        return f"the weights are {dtype}"
    if head_dim < 4 or head_dim & (head_dim - 1):
        return f"the head dimension {head_dim} is not a power of two or is below 4"
    if hidden_size > _WIDEST:
        return f"the hidden size {hidden_size} is above {_WIDEST}"
    return None


def bias_in(module: nn.Module, allowed: Sequence[str] = ()) -> str | None:
    """The first linear layer with a bias, if it is not one of these; ``None`` if there is none."""
    for path, linear in module.named_modules():
        if isinstance(linear, nn.Linear) and linear.bias is not None and path not in allowed:
            return f"{path} has a bias"
    return None


def norm_of(module: nn.RMSNorm) -> Norm:
    """Its weight, read in place, and its epsilon."""
    assert module.eps is not None
    return Norm(module.weight.detach(), module.eps)


class RowsOf:
    """One weight with the rows of several parameters.

    Where these lie behind each other in memory, as those that swaps overwrite do on a GPU, it is
    the parameters themselves; otherwise a copy, which ``follow`` makes again at the same address.
    """

    def __init__(self, parameters: Sequence[Tensor], by_columns: bool) -> None:
        """
        Args:
            by_columns: lay a copy out as ``targets.layers.columns_of`` does, for a CPU.
        """
        self._parameters = [parameter.detach() for parameter in parameters]
        first = self._parameters[0]
        self._is_copy = not are_adjacent(self._parameters)
        if self._is_copy:
            whole = torch.cat(self._parameters)
            self.weight = columns_of(whole) if by_columns else whole
        else:
            shape = (sum(map(len, self._parameters)), first.shape[1])
            self.weight = first.as_strided(shape, first.stride())

    def follow(self) -> None:
        """The parameters were overwritten where they lie."""
        if self._is_copy:
            self.weight.copy_(torch.cat(self._parameters))


@dataclass(frozen=True, slots=True)
class Parts:
    """The weights that a drafter multiplies rows with."""

    layers: tuple[Layer, ...]
    others: Mapping[str, Tensor]

    @property
    def weights(self) -> list[Tensor]:
        """All of them."""
        own = (w for one in self.layers for w in _products_of(one).values())
        return [*self.others.values(), *own]


def _products_of(layer: Layer) -> dict[str, Tensor]:
    return {"qkv": layer.qkv, "o": layer.o, "gate_up": layer.gate_up, "down": layer.down}


def _packed(parts: Parts) -> Parts:
    layers = []
    for layer in parts.layers:
        weights: dict[str, Any] = {name: packed(w) for name, w in _products_of(layer).items()}
        layers.append(replace(layer, heads=joint_norms(layer.heads), **weights))
    return Parts(tuple(layers), {name: packed(w) for name, w in parts.others.items()})


class FusedLayers:
    """The layers of one drafter, its other products, and the operations that compute them.

    Weights are read in place: values copied into the parameters take effect in the next pass, if
    they are not packed. Everything can be captured in a CUDA graph. One drafter's launches must run
    on a single stream.
    """

    def __init__(
        self,
        parts: Parts,
        *,
        alone: Sequence[Tensor] = (),
        few_rows: int | None = None,
        use_kernels: bool | None = None,
        overlap: bool | None = None,
        packs: bool = False,
    ) -> None:
        """
        Args:
            parts: of one dtype, on one device; all layers have the same shape.
            alone: further weights for ``few_row_linear``, which are not packed.
            few_rows, packs: see ``drafters.eagle3.fused.FusedEagle3``.
            use_kernels, overlap: see ``pick_operations``.
        """
        like = parts.weights[0]
        self.few_rows = few_rows_of(like, use_kernels) if few_rows is None else few_rows
        products = [(weight, False) for weight in (*parts.others.values(), *alone)]
        for layer in parts.layers[:1]:
            bare = (layer.qkv, layer.o, layer.down)
            products += [(layer.gate_up, True), *((weight, False) for weight in bare)]
        self.do = pick_operations(products, use_kernels, overlap)
        self._parts = self._many = parts
        self._packs = packs and self.do is IN_FLOAT32 and can_pack(parts.weights)
        if self._packs:
            self.do = PACKED
            self.follow()

    def follow(self) -> None:
        """The parameters were overwritten: make the packed copies again."""
        if self._packs:
            self._many = _packed(self._parts)

    @property
    def heads(self) -> list[Heads]:
        """Of each layer, for ``rope_and_write``."""
        return [layer.heads for layer in self._many.layers]

    def are_few(self, rows: Tensor) -> bool:
        """Whether products of so many rows are fused with their neighbours."""
        return 0 < len(rows) <= self.few_rows

    def product(self, rows: Tensor, name: str, norm: Norm | None = None) -> Tensor:
        """``norm(rows) @ weight.T`` for one of ``Parts.others``."""
        if self.are_few(rows):
            return self.do.few_row_linear(rows, self._parts.others[name], norm)
        normed = rows if norm is None else self.do.add_norm(rows, None, norm, None)
        found: Tensor = self.do.linear(normed, self._many.others[name])
        return found

    def multiply(self, rows: Tensor, weight: Tensor, out: Tensor | None = None) -> Tensor:
        """``rows @ weight.T`` for a weight of ``alone``.

        Args:
            out: [T, N], written and returned; rows need not be adjacent.
        """
        if self.are_few(rows):
            return self.do.few_row_linear(rows, weight, out=out)
        return torch.mm(rows, weight.t(), out=out)

    def forward(
        self,
        stream: Tensor,
        squares: Tensor | None,
        heads_of: HeadsOf,
        final: Norm | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """All layers.

        Args:
            stream: [T, H] residual stream before them; rows need not be adjacent. Not written.
            squares: the rows' squares, if a kernel has left them.
            final: a norm behind the last layer.

        Returns:
            The residual stream behind them [T, H], and its squares if they are known; or the rows
            behind ``final``, and ``None``.
        """
        if self.are_few(stream):
            stream, squares = self._few_rows(stream, squares, heads_of)
        elif self._parts.layers:
            return self._many_rows(stream, heads_of, final), None
        if final is None:
            return stream, squares
        return self.do.add_norm(stream, None, final, None), None

    def _few_rows(
        self, stream: Tensor, squares: Tensor | None, heads_of: HeadsOf
    ) -> tuple[Tensor, Tensor | None]:
        do = self.do
        for index, layer in enumerate(self._parts.layers):
            qkv = do.few_row_linear(stream, layer.qkv, layer.attention_norm, squares)
            stream, squares = do.few_row_residual(heads_of(index, qkv), layer.o, stream)
            gated = do.few_row_linear(stream, layer.gate_up, layer.mlp_norm, squares, gated=True)
            stream, squares = do.few_row_residual(gated, layer.down, stream)
        return stream, squares

    def _many_rows(self, stream: Tensor, heads_of: HeadsOf, final: Norm | None) -> Tensor:
        do, layers = self.do, self._many.layers
        norms = [*(layer.attention_norm for layer in layers), final]
        normed = do.add_norm(stream, None, layers[0].attention_norm, None)
        for index, (layer, behind) in enumerate(zip(layers, norms[1:], strict=True)):
            mixed = heads_of(index, do.linear(normed, layer.qkv))
            middle = torch.empty(stream.shape, dtype=stream.dtype, device=stream.device)
            normed = do.linear_add_norm(mixed, layer.o, stream, layer.mlp_norm, middle)
            gated = do.silu_gate(do.linear(normed, layer.gate_up))
            if behind is None:
                return middle.add_(do.linear(gated, layer.down))
            stream = torch.empty_like(middle)
            normed = do.linear_add_norm(gated, layer.down, middle, behind, stream)
        return normed
