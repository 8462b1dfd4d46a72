"""The operations of a decoder layer in float32 on a CPU, in fewer calls than the definitions.

A step of few rows of a small model is bound by the number of calls: each takes a microsecond or
two, whatever it computes. In float32 nothing is rounded between two operations, so a sum can be
left to the product, and queries and keys can be normalised and rotated together.

Products with packed weights are oneDNN's, which torch's compiler uses, too. The layers of a model
of 12 M parameters take 1.7 ms for one row and 2.0 ms for five, instead of 2.1 and 3.8 by MKL with
weights by columns. A row of such a product is bitwise independent of the other rows.

Shapes: T rows, Hq/Hkv heads, C = (Hq + 2 Hkv) * D, D head dimension, M rows, K inputs, N outputs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from specops.linear import Norm, rms_norm, root_mean_square
from specops.rope import Heads, RopeTable


@dataclass(frozen=True, slots=True)
class RopeRows:
    """Rows of a ``RopeTable``, the same for all layers of a pass."""

    cos_T1D: Tensor
    """[T, 1, D]: the cosines twice."""
    sin_T1D: Tensor
    """[T, 1, D]: the negative sines, then the sines."""


def rope_rows(table: RopeTable, positions_T: Tensor) -> RopeRows:
    """Read the table at the rows' positions, [T] int64."""
    cos, sin = table.cos[positions_T], table.sin[positions_T]
    return RopeRows(torch.cat((cos, cos), dim=-1)[:, None], torch.cat((-sin, sin), dim=-1)[:, None])


def rope_and_write(
    qkv_TC: Tensor,
    heads: Heads,
    rows: RopeRows,
    positions_T: Tensor,
    slots_T: Tensor,
    keys: Tensor,
    values: Tensor,
) -> Tensor:
    """``specops.rope.rope_and_write`` with the rows of its table. Bitwise equal."""
    num_query, num_kv, head_dim = heads.num_query, heads.num_kv, keys.shape[2]
    if heads.bias_C is not None:
        qkv_TC = qkv_TC + heads.bias_C
    heads_TND = qkv_TC.view(len(qkv_TC), num_query + 2 * num_kv, head_dim)
    qk = _normed(heads_TND[:, : num_query + num_kv], heads)
    # The halves of a head change places: (a, b) -> (a cos - b sin, b cos + a sin).
    turned = torch.roll(qk, head_dim // 2, dims=-1).mul_(rows.sin_T1D)
    turned = turned.add_(qk * rows.cos_T1D)
    keys.index_copy_(0, slots_T, turned[:, num_query:])
    values.index_copy_(0, slots_T, heads_TND[:, num_query + num_kv :])
    return turned[:, :num_query]


def _normed(qk_THD: Tensor, heads: Heads) -> Tensor:
    """Queries and keys behind the norms that they have."""
    q_norm, k_norm = heads.query_norm, heads.key_norm
    either = q_norm or k_norm
    if either is None:
        return qk_THD
    if heads.norms_HD is not None:
        return (qk_THD * heads.norms_HD).div_(root_mean_square(qk_THD, either.eps))
    parts = qk_THD[:, : heads.num_query], qk_THD[:, heads.num_query :]
    normed = (
        x if norm is None else rms_norm(x, norm)
        for x, norm in zip(parts, (q_norm, k_norm), strict=True)
    )
    return torch.cat(tuple(normed), dim=1)


def joint_norms(heads: Heads) -> Heads:
    """The same heads with copies of their norms' weights side by side, if they have both."""
    if heads.query_norm is None or heads.key_norm is None:
        return heads
    weights = heads.query_norm.weight_K, heads.key_norm.weight_K
    counts = heads.num_query, heads.num_kv
    parts = [w.expand(count, -1) for w, count in zip(weights, counts, strict=True)]
    return replace(heads, norms_HD=torch.cat(parts))


def linear_add_norm(
    x_MK: Tensor, weight_NK: Tensor, residual_MN: Tensor, norm: Norm, out: Tensor
) -> Tensor:
    """See ``specops.rows.linear_add_norm``."""
    return rms_norm(linear_add(x_MK, weight_NK, residual_MN, out), norm)


def linear_add(x_MK: Tensor, weight_NK: Tensor, residual_MN: Tensor, out: Tensor) -> Tensor:
    """``residual + x @ weight.T``, written to ``out``, which may be the residual itself."""
    return torch.addmm(residual_MN, x_MK, weight_NK.t(), out=out)


_ONEDNN, _LINEAR = torch.ops.mkldnn, "_linear_pointwise"
_ROWS_AT_BEST = 4
"""Rows for which weights are laid out. Of 1, 4 and 16, four are best from one row to 64."""
_MOST_PACKED_BYTES = 1 << 30
"""Of one model; packed weights are copies."""


def can_pack(weights: Sequence[Tensor]) -> bool:
    """Whether ``packed`` takes the weights of a model on this machine, and is worth the memory."""
    is_plain = all(w.dtype == torch.float32 and w.device.type == "cpu" for w in weights)
    num_bytes = sum(weight.numel() * weight.element_size() for weight in weights)
    has_onednn: bool = torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
    has_product = has_onednn and hasattr(_ONEDNN, _LINEAR)
    return is_plain and has_product and num_bytes <= _MOST_PACKED_BYTES


def packed(weight_NK: Tensor) -> Tensor:
    """A copy of a weight, laid out for ``packed_linear``."""
    copy: Tensor = _ONEDNN._reorder_linear_weight(weight_NK, _ROWS_AT_BEST)
    return copy


def packed_linear(x_MK: Tensor, packed_NK: Tensor) -> Tensor:
    """``x @ weight.T``, [M, N]."""
    product: Tensor = _ONEDNN._linear_pointwise.default(x_MK, packed_NK, None, "none", [], "")
    return product


def packed_linear_add_norm(
    x_MK: Tensor, packed_NK: Tensor, residual_MN: Tensor, norm: Norm, out: Tensor
) -> Tensor:
    """See ``specops.rows.linear_add_norm``."""
    return rms_norm(torch.add(residual_MN, packed_linear(x_MK, packed_NK), out=out), norm)


def silu_gate(gate_up_M2N: Tensor) -> Tensor:
    """See ``specops.linear.silu_gate``."""
    gate, up = gate_up_M2N.chunk(2, dim=-1)
    return torch.nn.functional.silu(gate).mul_(up)
