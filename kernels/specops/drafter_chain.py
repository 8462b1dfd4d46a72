"""A pass of a drafter with one decoder layer, and the chain of greedy tokens that it drafts.

The torch definitions, composed of those of the layer's operations. A kernel that equals them does a
pass, or the whole chain, in one launch.

Shapes: R rows, one for each request, H hidden, C = Hq * D, I inputs of ``down``, V draft
vocabulary, Vt target vocabulary, K draft tokens.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from specops.attention import DecodePass, attend_pages, places_of
from specops.best_ids import best_ids
from specops.linear import Norm, few_row_linear, few_row_residual
from specops.rope import Heads, RopeTable, rope_and_write
from specops.rows import norm_pair


@dataclass(frozen=True, slots=True)
class DrafterLayer:
    """Weights of a drafter with one layer, which reads the embedding of a token and a hidden row.
    All are contiguous, in one dtype."""

    embed_VtH: Tensor
    input_norm: Norm
    """Of the embedding."""
    hidden_norm: Norm
    """Of the hidden row."""
    qkv: Tensor
    """[(Hq + 2 Hkv) * D, 2H]; columns of the embedding first."""
    heads: Heads
    table: RopeTable
    o_HC: Tensor
    post_norm: Norm
    """Behind the attention."""
    gate_up: Tensor
    """[2I, H], gate rows first."""
    down_HI: Tensor
    norm: Norm
    """Before the head."""
    head_VH: Tensor
    d2t_V: Tensor | None = None
    """[V] int64, target id minus draft id, of a reduced vocabulary."""

    @property
    def head_dim(self) -> int:
        """D."""
        return self.o_HC.shape[1] // self.heads.num_query

    @property
    def scale(self) -> float:
        """Factor of the attention's scores."""
        return float(self.head_dim**-0.5)


@dataclass(frozen=True, slots=True)
class ChainText:
    """Tokens of a chain that are known before it is drafted."""

    tokens_RK: Tensor
    """[R, K] int64; more columns are ignored."""
    is_text_RK: Tensor
    """[R, K] bool: these tokens are taken instead of the drafter's."""


def run_pass(
    layer: DrafterLayer,
    ids_R: Tensor,
    hidden_RH: Tensor,
    at: DecodePass,
    keys: Tensor,
    values: Tensor,
) -> Tensor:
    """One row of each request through the layer; writes its key and value to its slot.

    Args:
        ids_R: [R] int64 target ids, each in 0..Vt-1 (not checked).
        hidden_RH: the output of the row before; rows need not be adjacent.
        at: the rows; without counts or ancestors.
        keys, values: [num_slots, Hkv, D], written in place.

    Returns:
        Outputs [R, H], before the final norm.
    """
    places = places_of(at, 1)
    pair = norm_pair(ids_R, layer.embed_VtH, hidden_RH, layer.input_norm, layer.hidden_norm)
    qkv = few_row_linear(pair, layer.qkv)
    positions, slots = places.positions.flatten(), places.slots.flatten()
    q = rope_and_write(qkv, layer.heads, layer.table, positions, slots, keys, values)
    mixed = attend_pages(q, keys, values, at, layer.scale).flatten(1)
    stream, squares = few_row_residual(mixed, layer.o_HC, hidden_RH)
    gated = few_row_linear(stream, layer.gate_up, layer.post_norm, squares, gated=True)
    return few_row_residual(gated, layer.down_HI, stream)[0]


def draft(
    layer: DrafterLayer,
    outputs_RH: Tensor,
    at: DecodePass,
    num_draft: int,
    keys: Tensor,
    values: Tensor,
    text: ChainText | None = None,
) -> Tensor:
    """Draft the most likely tokens; the rows of all but the last are written to their slots.

    Args:
        outputs_RH: output of each anchor's row; rows need not be adjacent.
        at: one row for each request, at the position after its anchor.
        text: tokens that are taken instead of the drafter's.

    Returns:
        [R, num_draft] int64 target ids.
    """
    tokens: list[Tensor] = []
    for number in range(num_draft):
        if number:
            here = replace(at, first_R=at.first_R + (number - 1))
            outputs_RH = run_pass(layer, tokens[-1], outputs_RH, here, keys, values)
        best_R = best_ids(few_row_linear(outputs_RH, layer.head_VH, layer.norm), layer.d2t_V)
        if text is not None:
            is_text_R = text.is_text_RK[:, number]
            best_R = torch.where(is_text_R, text.tokens_RK[:, number], best_R)
        tokens.append(best_R)
    return torch.stack(tokens, dim=1)
