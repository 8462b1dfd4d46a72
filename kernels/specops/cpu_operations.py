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

from dataclasses import dataclass

import torch
from torch import Tensor

from specops.linear import Norm, rms_norm
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
    q_norm, k_norm, head_dim = heads.query_norm, heads.key_norm, qk_THD.shape[2]
    either = q_norm or k_norm
    if either is None:
        return qk_THD
    normed = torch.nn.functional.rms_norm(qk_THD, (head_dim,), None, either.eps)
    for norm, part in ((q_norm, slice(heads.num_query)), (k_norm, slice(heads.num_query, None))):
        if norm is None:
            normed[:, part] = qk_THD[:, part]
        else:
            normed[:, part].mul_(norm.weight_K)
    return normed


def linear_add_norm(
    x_MK: Tensor, weight_NK: Tensor, residual_MN: Tensor, norm: Norm, out: Tensor
) -> Tensor:
    """See ``specops.rows.linear_add_norm``."""
    return rms_norm(linear_add(x_MK, weight_NK, residual_MN, out), norm)


def linear_add(x_MK: Tensor, weight_NK: Tensor, residual_MN: Tensor, out: Tensor) -> Tensor:
    """``residual + x @ weight.T``, written to ``out``, which may be the residual itself."""
    return torch.addmm(residual_MN, x_MK, weight_NK.t(), out=out)


def can_pack(weight: Tensor) -> bool:
    """Whether ``packed`` takes this weight on this machine."""
    is_plain = weight.dtype == torch.float32 and weight.device.type == "cpu"
    return is_plain and torch.backends.mkldnn.is_available() and hasattr(_ONEDNN, _LINEAR)


_ONEDNN, _LINEAR = torch.ops.mkldnn, "_linear_pointwise"
_ROWS_AT_BEST = 4
"""Rows for which weights are laid out. Of 1, 4 and 16, four are best from one row to 64."""


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
