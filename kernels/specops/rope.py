"""Splitting the product of queries, keys and values into what attention needs.

The torch definition. Shapes: T rows, Hq/Hkv heads, D head dimension (even).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from specops.linear import Norm, rms_norm


@dataclass(frozen=True, slots=True)
class Heads:
    """Layout of a row of the product, and the norms of its heads."""

    num_query: int
    """Hq."""
    num_kv: int
    """Hkv; a row holds Hq query heads, Hkv key heads and Hkv value heads, in this order."""
    query_norm: Norm | None = None
    """RMSNorm over D of each query head (Qwen3); ``key_norm`` must have the same eps."""
    key_norm: Norm | None = None
    bias_C: Tensor | None = None
    """[(Hq + 2 Hkv) * D], added to a row first (Qwen2), in the row's dtype."""
    norms_HD: Tensor | None = None
    """[Hq + Hkv, D] copies of the norms' weights for every head, where ``cpu_operations`` may use
    copies."""


@dataclass(frozen=True, slots=True)
class RopeTable:
    """Cosines and sines of all positions, [num_positions, D / 2] in the model's dtype.

    Precomputed because Hugging Face rounds them to that dtype before multiplying, and because a
    GPU's fast sine is inaccurate for the large angles of far positions.
    """

    cos: Tensor
    sin: Tensor


def rope_table(
    inv_freq: Tensor, scaling: float, num_positions: int, dtype: torch.dtype
) -> RopeTable:
    """Table of rotary embeddings (Su et al. 2021), as computed by Hugging Face.

    Args:
        inv_freq: [D / 2] float32, including any frequency scaling (Llama 3).
        scaling: factor of cosines and sines (YaRN); 1.0 for most models.
    """
    positions = torch.arange(num_positions, device=inv_freq.device, dtype=torch.float32)
    angles = positions[:, None] * inv_freq.float()
    return RopeTable((angles.cos() * scaling).to(dtype), (angles.sin() * scaling).to(dtype))


def _rotate(x_THD: Tensor, cos_TD2: Tensor, sin_TD2: Tensor) -> Tensor:
    """Rotate pairs of elements, one from each half, as Llama's weights require."""
    first, second = x_THD.chunk(2, dim=-1)
    cos, sin = cos_TD2[:, None], sin_TD2[:, None]
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


def rope_and_write(
    qkv_TC: Tensor,
    heads: Heads,
    table: RopeTable,
    positions_T: Tensor,
    slots_T: Tensor,
    keys: Tensor,
    values: Tensor,
) -> Tensor:
    """Add the bias, normalise and rotate queries and keys, and write keys and values to their
    slots.

    Args:
        qkv_TC: [T, (Hq + 2 Hkv) * D]; rows need not be adjacent.
        positions_T: [T] int64, each below the table's number of positions (not checked).
        slots_T: [T] int64, distinct slots of the rows' keys and values.
        keys, values: [num_slots, Hkv, D] contiguous, written in place.

    Returns:
        Queries, [T, Hq, D].
    """
    head_dim = keys.shape[2]
    if heads.bias_C is not None:
        qkv_TC = qkv_TC + heads.bias_C
    sizes = [heads.num_query, heads.num_kv, heads.num_kv]
    heads_TND = qkv_TC.view(len(qkv_TC), sum(sizes), head_dim)
    q, k, v = torch.split(heads_TND, sizes, dim=1)
    if heads.query_norm is not None:
        q = rms_norm(q, heads.query_norm)
    if heads.key_norm is not None:
        k = rms_norm(k, heads.key_norm)
    cos, sin = table.cos[positions_T], table.sin[positions_T]
    keys.index_copy_(0, slots_T, _rotate(k, cos, sin))
    values.index_copy_(0, slots_T, v)
    return _rotate(q, cos, sin)
