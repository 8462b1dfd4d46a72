"""Bias, head norms, rotary embedding and the write to the pages in one kernel; the definition is
``specops.rope.rope_and_write``.

Shapes: T rows, Hq/Hkv heads, D head dimension (a power of two, at least 4).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from specops.overlap_triton import fetch_into_l2, let_next_start, wait_for_previous
from specops.rope import Heads, RopeTable

_HEADS_AT_ONCE = 4
_AHEAD_BYTES = 64 << 10
"""Bytes fetched by one program: 512 lines, four per thread."""


@triton.jit(do_not_specialize_on_alignment=["positions_ptr", "slots_ptr"])
def _rope_and_write(
    qkv_ptr, bias_ptr, query_norm_ptr, key_norm_ptr, cos_ptr, sin_ptr, positions_ptr, slots_ptr,
    q_ptr, keys_ptr, values_ptr, ahead_ptr, qkv_stride, eps,
    NUM_QUERY: tl.constexpr, NUM_KV: tl.constexpr, D: tl.constexpr, HEADS: tl.constexpr,
    BLOCKS: tl.constexpr, BIAS: tl.constexpr, NORM: tl.constexpr, OVERLAP: tl.constexpr,
    AHEAD: tl.constexpr, AHEAD_BYTES: tl.constexpr,
):  # fmt: skip
    """Process some heads of one row. The first AHEAD programs prefetch a weight instead."""
    if OVERLAP:
        let_next_start()
    if tl.program_id(0) < AHEAD:
        line = tl.arange(0, AHEAD_BYTES // 128).to(tl.int64) * 128
        if AHEAD > 0:
            fetch_into_l2(ahead_ptr + tl.program_id(0).to(tl.int64) * AHEAD_BYTES + line)
        if OVERLAP:
            wait_for_previous()
    else:
        if OVERLAP:
            wait_for_previous()
        program = tl.program_id(0) - AHEAD
        row = (program // BLOCKS).to(tl.int64)
        head = program % BLOCKS * HEADS + tl.arange(0, HEADS)
        is_head = head < NUM_QUERY + 2 * NUM_KV
        is_query = head < NUM_QUERY
        is_value = head >= NUM_QUERY + NUM_KV
        half = tl.arange(0, D // 2)
        place = qkv_ptr + row * qkv_stride + head[:, None] * D + half[None, :]
        first = tl.load(place, mask=is_head[:, None], other=0.0)
        second = tl.load(place + D // 2, mask=is_head[:, None], other=0.0)
        dtype: tl.constexpr = qkv_ptr.dtype.element_ty
        if BIAS:
            place = bias_ptr + head[:, None] * D + half[None, :]
            bias_1 = tl.load(place, mask=is_head[:, None], other=0.0)
            bias_2 = tl.load(place + D // 2, mask=is_head[:, None], other=0.0)
            first = (first.to(tl.float32) + bias_1.to(tl.float32)).to(dtype)
            second = (second.to(tl.float32) + bias_2.to(tl.float32)).to(dtype)

        x_1, x_2 = first.to(tl.float32), second.to(tl.float32)
        if NORM:
            squares = tl.sum(x_1 * x_1, axis=1) + tl.sum(x_2 * x_2, axis=1)
            scale = tl.rsqrt(squares / D + eps)[:, None]
            query_1 = tl.load(query_norm_ptr + half)[None, :]
            query_2 = tl.load(query_norm_ptr + D // 2 + half)[None, :]
            key_1 = tl.load(key_norm_ptr + half)[None, :]
            key_2 = tl.load(key_norm_ptr + D // 2 + half)[None, :]
            weight_1 = tl.where(is_query[:, None], query_1, key_1).to(tl.float32)
            weight_2 = tl.where(is_query[:, None], query_2, key_2).to(tl.float32)
            x_1, x_2 = x_1 * scale, x_2 * scale
            if query_norm_ptr.dtype.element_ty != tl.float32:
                x_1, x_2 = x_1.to(dtype).to(tl.float32), x_2.to(dtype).to(tl.float32)
            x_1 = (weight_1 * x_1).to(dtype).to(tl.float32)
            x_2 = (weight_2 * x_2).to(dtype).to(tl.float32)

        position = tl.load(positions_ptr + row)
        cos = tl.load(cos_ptr + position * (D // 2) + half)[None, :].to(tl.float32)
        sin = tl.load(sin_ptr + position * (D // 2) + half)[None, :].to(tl.float32)
        # Rounded after every operation, as in the definition.
        turned_1 = (x_1 * cos).to(dtype).to(tl.float32) - (x_2 * sin).to(dtype).to(tl.float32)
        turned_2 = (x_2 * cos).to(dtype).to(tl.float32) + (x_1 * sin).to(dtype).to(tl.float32)
        turned_1, turned_2 = turned_1.to(dtype), turned_2.to(dtype)

        at = q_ptr + (row * NUM_QUERY + head)[:, None] * D + half[None, :]
        tl.store(at, turned_1, mask=is_query[:, None])
        tl.store(at + D // 2, turned_2, mask=is_query[:, None])
        slot = tl.load(slots_ptr + row)
        is_key = (head >= NUM_QUERY) & (head < NUM_QUERY + NUM_KV)
        at = keys_ptr + (slot * NUM_KV + head - NUM_QUERY)[:, None] * D + half[None, :]
        tl.store(at, turned_1, mask=is_key[:, None])
        tl.store(at + D // 2, turned_2, mask=is_key[:, None])
        at = values_ptr + (slot * NUM_KV + head - NUM_QUERY - NUM_KV)[:, None] * D + half[None, :]
        is_value = is_value & is_head
        tl.store(at, first, mask=is_value[:, None])
        tl.store(at + D // 2, second, mask=is_value[:, None])


def rope_and_write(
    qkv_TC: Tensor,
    heads: Heads,
    table: RopeTable,
    positions_T: Tensor,
    slots_T: Tensor,
    keys: Tensor,
    values: Tensor,
    *,
    ahead: Tensor | None = None,
    ahead_bytes: int = 0,
    overlap: bool = False,
) -> Tensor:
    """See ``specops.rope.rope_and_write``, which has the same arguments and result.

    Args:
        ahead: a contiguous weight that a later kernel reads soon. Its first ``ahead_bytes`` are
            fetched into the L2 cache, which attention over few keys leaves idle.
        overlap: start while the previous kernel still runs (``specops.overlap_triton``).

    Raises:
        ValueError: wrong shape, dtype or memory layout.
    """
    num_rows = len(qkv_TC)
    num_heads, head_dim = heads.num_query + 2 * heads.num_kv, keys.shape[2]
    if qkv_TC.shape[1] != num_heads * head_dim or qkv_TC.stride(1) != 1:
        raise ValueError(
            f"a row of the product must be {num_heads} adjacent heads of {head_dim}, "
            f"got {list(qkv_TC.shape)} with strides {qkv_TC.stride()}"
        )
    if head_dim < 4 or head_dim & (head_dim - 1):
        raise ValueError(
            f"the head dimension must be a power of two and at least 4, got {head_dim}"
        )
    if (heads.query_norm is None) != (heads.key_norm is None):
        raise ValueError("query_norm and key_norm must be given together")
    for name, tensor in (("keys", keys), ("values", values), ("positions", positions_T),
                         ("slots", slots_T), ("cos", table.cos), ("sin", table.sin)):  # fmt: skip
        if not tensor.is_contiguous():
            raise ValueError(f"{name} must be contiguous, got strides {tensor.stride()}")
    query_norm, key_norm, bias = heads.query_norm, heads.key_norm, heads.bias_C
    if bias is not None and (bias.shape != qkv_TC.shape[1:] or not bias.is_contiguous()):
        raise ValueError(f"the bias must be contiguous [{qkv_TC.shape[1]}], got {list(bias.shape)}")
    if query_norm is not None and key_norm is not None and query_norm.eps != key_norm.eps:
        raise ValueError(f"both norms must have one eps, got {query_norm.eps} and {key_norm.eps}")
    chunks = 0
    if ahead is not None:
        chunks = min(ahead_bytes, ahead.numel() * ahead.element_size()) // _AHEAD_BYTES
    q = torch.empty(num_rows, heads.num_query, head_dim, dtype=qkv_TC.dtype, device=qkv_TC.device)
    blocks = triton.cdiv(num_heads, _HEADS_AT_ONCE)
    _rope_and_write[(chunks + num_rows * blocks,)](
        qkv_TC,
        qkv_TC if bias is None else bias,
        qkv_TC if query_norm is None else query_norm.weight_K,
        qkv_TC if key_norm is None else key_norm.weight_K,
        table.cos, table.sin, positions_T, slots_T, q, keys, values,
        qkv_TC if ahead is None else ahead.view(-1).view(torch.uint8),
        qkv_TC.stride(0), 0.0 if query_norm is None else query_norm.eps,
        NUM_QUERY=heads.num_query, NUM_KV=heads.num_kv, D=head_dim, HEADS=_HEADS_AT_ONCE,
        BLOCKS=blocks, BIAS=bias is not None, NORM=query_norm is not None, OVERLAP=overlap,
        AHEAD=chunks, AHEAD_BYTES=_AHEAD_BYTES,
        # A fused multiply-add (fma.rn.bf16) would skip the rounding of the product.
        enable_fp_fusion=False, num_warps=4, launch_pdl=overlap,
    )  # fmt: skip
    return q
