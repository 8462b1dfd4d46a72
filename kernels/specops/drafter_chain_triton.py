"""A drafter's pass, or its whole chain of greedy passes, in one launch; the definitions are in
``specops.drafter_chain``.

With few rows, the launches of a small drafter's pass take three times as long as reading its
weights. Here at most one program runs on each multiprocessor. All programs do each phase together
and meet between two of them, so each may read what the others wrote:

    copy of the given rows | draft head, best of each program's part
    norms + q, k, v | RoPE, write to the pages, attention of a part of the keys
    join of the parts + o + residual | norm + gate, up, silu | down + residual

Each phase is a list of tiles: program i takes tiles i, i + N, i + 2 N, ... of N programs. The order
in which programs start does not matter, only that all of them fit on the GPU at once, which a
cooperative launch ensures.

Shapes: R rows (one for each request), H hidden, C = (Hq + 2 Hkv) * D, I inputs of ``down``, V draft
vocabulary, K draft tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from specops.attention import DecodePass
from specops.best_ids_triton import _best
from specops.drafter_chain import ChainText, DrafterLayer
from specops.overlap_triton import fetch_into_l2

MAX_ROWS = 32
MAX_DRAFT = 64
"""Longest chain in one launch."""
_PARTS = 4
"""Parts of the keys of up to 16 requests; more fill the GPU with one. A number for each batch size
would be a kernel to compile for each."""
_FETCHED_BYTES = 24 << 20
"""Largest layer that is prefetched, and most of the head: together less than an H200's L2 cache."""
_NUM_WARPS = 8
_BLOCK_K = 32
"""Columns that each warp multiplies at a time, of one head."""
_LEAST_HEAD = 16
_KEYS = 64
"""Keys per block of attention."""
_LOG2_E = 1.4426950408889634
_SPINS = 1 << 22
"""Looks at the counter after which a program gives up waiting: a second and more."""
_LEAD = 1 << 31
_FLAG = 32
"""Place of a flag that a program gave up, on a cache line of its own."""
ALL = (0, 7)
"""First and last phase."""


@triton.jit
def _look(counter_ptr, otherwise):
    """Read a counter that other programs add to; what they wrote before is then visible to the
    whole program. Only one thread reads, the others take ``otherwise``."""
    return tl.inline_asm_elementwise(
        """
        {
            .reg .pred is_first;
            .reg .u32 thread;
            mov.u32 thread, %tid.x;
            setp.eq.u32 is_first, thread, 0;
            mov.s32 $0, $2;
            @is_first ld.acquire.gpu.global.s32 $0, [$1];
        }
        """,
        "=&r,l,r",
        [counter_ptr.to(tl.int64, bitcast=True), otherwise],
        dtype=tl.int32,
        is_pure=False,
        pack=1,
    )


@triton.jit
def _meet(meet_ptr, lead, left, FLAG: tl.constexpr):
    """Wait until all programs have come here. Returns how often this one may still look.

    Each time all have come, they have added 2**31 together, of which program 0 adds ``lead``: the
    counter's sign changes, its other bits are as before, and it never needs a reset.
    """
    tl.debug_barrier()
    own = tl.where(tl.program_id(0) == 0, lead, 1)
    before = tl.atomic_add(meet_ptr, own, sem="acq_rel", scope="gpu")
    now = before + own
    while ((before ^ now) >= 0) & (left > 0):
        now = _look(meet_ptr, before ^ -2147483648)
        left -= 1
    if (before ^ now) >= 0:
        tl.store(meet_ptr + FLAG, 1)
    tl.debug_barrier()
    return left


@triton.jit
def _fetch(weight_ptr, num_elements, AHEAD: tl.constexpr):
    """Prefetch this program's share of a weight."""
    LINE: tl.constexpr = 1024 // weight_ptr.dtype.element_ty.primitive_bitwidth
    line = tl.arange(0, AHEAD) * LINE
    for start in range(
        tl.program_id(0) * AHEAD * LINE, num_elements, tl.num_programs(0) * AHEAD * LINE
    ):
        fetch_into_l2(weight_ptr + tl.minimum(start + line, num_elements - 1))


@triton.jit
def _fetch_layer(
    qkv_ptr, o_ptr, gate_up_ptr, down_ptr,
    H: tl.constexpr, C: tl.constexpr, MIXED: tl.constexpr, INNER: tl.constexpr,
    AHEAD: tl.constexpr,
):  # fmt: skip
    """Prefetch this program's share of the layer, while others still work or the chosen tokens are
    on their way. Few bytes for the head, whose weight passes through the L2 cache in between."""
    _fetch(qkv_ptr, 2 * H * C, AHEAD)
    _fetch(o_ptr, H * MIXED, AHEAD)
    _fetch(gate_up_ptr, 2 * H * INNER, AHEAD)
    _fetch(down_ptr, H * INNER, AHEAD)


@triton.jit
def _scale_of(x_ptr, row_at, is_row, eps, H: tl.constexpr, ROWS: tl.constexpr):
    """[ROWS] reciprocal root of the mean square of rows of H numbers."""
    BLOCK: tl.constexpr = 256
    squares = tl.zeros([ROWS, BLOCK], tl.float32)
    for start in tl.static_range(0, H, BLOCK):
        k = start + tl.arange(0, BLOCK)
        x = tl.load(
            x_ptr + row_at[:, None] + k[None, :],
            mask=is_row[:, None] & (k < H)[None, :],
            other=0.0,
            cache_modifier=".cg",
        ).to(tl.float32)
        squares += x * x
    return tl.rsqrt(tl.sum(squares, axis=1) / H + eps)


@triton.jit
def _normed(x, weight, scale):
    """``weight * x * scale`` in x's dtype, rounded as by ``specops.linear.rms_norm``; a float32
    weight is multiplied before the result is rounded."""
    wide = x.to(tl.float32) * scale
    if weight.dtype != tl.float32:
        wide = wide.to(x.dtype).to(tl.float32)
    return (weight.to(tl.float32) * wide).to(x.dtype)


@triton.jit
def _add_product(
    sums, x_ptr, row_at, is_row, norm_ptr, scale, weight_ptr, n, is_n, weight_stride,
    K: tl.constexpr, SPLIT: tl.constexpr, BLOCK_K: tl.constexpr, STAGES: tl.constexpr,
    NORM: tl.constexpr,
):  # fmt: skip
    """Add x @ weight.T to ``sums`` [SPLIT, ROWS, BLOCK_N]; each warp sums columns of its own."""
    column = tl.arange(0, SPLIT)[:, None] * BLOCK_K + tl.arange(0, BLOCK_K)[None, :]
    if NORM:  # read one block ahead: too small for the compiler to keep several in flight
        ahead = tl.load(norm_ptr + column, mask=column < K, other=0.0)
    for start in tl.range(0, K, SPLIT * BLOCK_K, num_stages=STAGES):
        k = start + column
        is_k = k < K
        weight = tl.load(
            weight_ptr + n[None, :, None] * weight_stride + k[:, None, :],
            mask=is_n[None, :, None] & is_k[:, None, :],
            other=0.0,
        )
        x = tl.load(
            x_ptr + row_at[None, :, None] + k[:, None, :],
            mask=is_row[None, :, None] & is_k[:, None, :],
            other=0.0,
            cache_modifier=".cg",
        )
        if NORM:
            norm = ahead
            ahead_k = k + SPLIT * BLOCK_K
            ahead = tl.load(norm_ptr + ahead_k, mask=ahead_k < K, other=0.0)
            x = _normed(x, norm[:, None, :], scale[None, :, None])
        sums = tl.dot(x, tl.permute(weight, (0, 2, 1)), sums, input_precision="ieee")
    return sums


@triton.jit
def _heads(
    token, embed_ptr, hidden_ptr, hidden_stride, embed_norm_ptr, hidden_norm_ptr, weight_ptr,
    qkv_ptr, row, is_row, embed_eps, hidden_eps,
    H: tl.constexpr, C: tl.constexpr, ROWS: tl.constexpr, BLOCK_N: tl.constexpr,
    SPLIT: tl.constexpr, BLOCK_K: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Queries, keys and values before RoPE, from the normed embeddings and hidden rows."""
    embed_at, hidden_at = token * H, row * hidden_stride
    embed_scale = _scale_of(embed_ptr, embed_at, is_row, embed_eps, H, ROWS)
    hidden_scale = _scale_of(hidden_ptr, hidden_at, is_row, hidden_eps, H, ROWS)
    for tile in range(tl.program_id(0), tl.cdiv(C, BLOCK_N), tl.num_programs(0)):
        n = tile * BLOCK_N + tl.arange(0, BLOCK_N)
        is_n = n < C
        sums = tl.zeros([SPLIT, ROWS, BLOCK_N], tl.float32)
        sums = _add_product(
            sums, embed_ptr, embed_at, is_row, embed_norm_ptr, embed_scale,
            weight_ptr, n, is_n, 2 * H, H, SPLIT, BLOCK_K, STAGES, True,
        )  # fmt: skip
        sums = _add_product(
            sums, hidden_ptr, hidden_at, is_row, hidden_norm_ptr, hidden_scale,
            weight_ptr + H, n, is_n, 2 * H, H, SPLIT, BLOCK_K, STAGES, True,
        )  # fmt: skip
        at = qkv_ptr + row[:, None] * C + n[None, :]
        value = tl.sum(sums, axis=0).to(qkv_ptr.dtype.element_ty)
        tl.store(at, value, mask=is_row[:, None] & is_n[None, :])


@triton.jit
def _turned(x_ptr, cos, sin, sign, at, partner, mask):
    """Heads after RoPE, rounded after every operation, as in the definition."""
    x = tl.load(x_ptr + at, mask=mask, other=0.0, cache_modifier=".cg")
    other = tl.load(x_ptr + partner, mask=mask, other=0.0, cache_modifier=".cg").to(tl.float32)
    straight = (x.to(tl.float32) * cos).to(x.dtype).to(tl.float32)
    across = (other * sin).to(x.dtype).to(tl.float32)
    return (straight + sign * across).to(x.dtype)


@triton.jit
def _attend(
    qkv_ptr, cos_ptr, sin_ptr, keys_ptr, values_ptr, pages_ptr, first_ptr, part_ptr, lse_ptr,
    ahead, num_rows, num_pages, first_key, scale,
    NUM_KV: tl.constexpr, GROUP: tl.constexpr, GROUP_UP: tl.constexpr, D: tl.constexpr,
    PAGE: tl.constexpr, KEYS: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """RoPE, and attention of each row's query heads to one part of its keys. The row's own key and
    value belong to part 0, which writes them to their slot."""
    NUM_QUERY: tl.constexpr = NUM_KV * GROUP
    C: tl.constexpr = (NUM_QUERY + 2 * NUM_KV) * D
    dim, member = tl.arange(0, D), tl.arange(0, GROUP_UP)
    partner = (dim + D // 2) % D
    sign = tl.where(dim < D // 2, -1.0, 1.0)
    is_member = member < GROUP
    for item in range(tl.program_id(0), num_rows * NUM_KV * PARTS, tl.num_programs(0)):
        part = item % PARTS
        head = item // PARTS % NUM_KV
        request = item // (PARTS * NUM_KV)
        first = tl.load(first_ptr + request) + ahead
        is_held = (first >= 0) & (first < num_pages * PAGE)
        position = tl.maximum(first, 0).to(tl.int64)
        end_of_all = tl.where(first >= 0, tl.minimum(first, num_pages * PAGE), 0)
        blocks = tl.maximum((end_of_all + PARTS * KEYS - 1) // (PARTS * KEYS), 1)
        begin = part * blocks * KEYS
        end = tl.minimum(begin + blocks * KEYS, end_of_all)

        cos = tl.load(cos_ptr + position * (D // 2) + dim % (D // 2)).to(tl.float32)
        sin = tl.load(sin_ptr + position * (D // 2) + dim % (D // 2)).to(tl.float32)
        qkv = qkv_ptr + request * C
        q_at = (head * GROUP + member)[:, None] * D
        q = _turned(
            qkv, cos[None, :], sin[None, :], sign[None, :],
            q_at + dim[None, :], q_at + partner[None, :], is_member[:, None],
        )  # fmt: skip
        k_at = (NUM_QUERY + head) * D
        own_k = _turned(qkv, cos, sin, sign, k_at + dim, k_at + partner, dim < D)
        own_v = tl.load(qkv + (NUM_QUERY + NUM_KV + head) * D + dim, cache_modifier=".cg")
        if part == 0:
            page = tl.load(
                pages_ptr + request * num_pages + position // PAGE, mask=is_held, other=0
            )
            slot = tl.where(is_held, page.to(tl.int64) * PAGE + position % PAGE, 0)
            tl.store(keys_ptr + (slot * NUM_KV + head) * D + dim, own_k)
            tl.store(values_ptr + (slot * NUM_KV + head) * D + dim, own_v)

        sees_own = is_held & (part == 0) & (first >= first_key)
        score = tl.sum(q.to(tl.float32) * own_k.to(tl.float32)[None, :], axis=1) * scale
        top = tl.where(sees_own, score, float("-inf"))
        total = tl.where(sees_own, tl.full([GROUP_UP], 1.0, tl.float32), 0.0)
        mixed = tl.where(
            sees_own, tl.zeros([GROUP_UP, D], tl.float32) + own_v.to(tl.float32)[None, :], 0.0
        )
        table_ptr = pages_ptr + request * num_pages
        ahead_key = begin + tl.arange(0, KEYS)
        page = tl.load(table_ptr + ahead_key // PAGE, mask=ahead_key < end, other=0)
        for start in range(begin, end, KEYS):
            key = start + tl.arange(0, KEYS)
            slot = page.to(tl.int64) * PAGE + key % PAGE
            place = (slot * NUM_KV + head)[:, None] * D + dim[None, :]
            is_key = (key < end) & (key >= first_key)
            ahead_key = key + KEYS
            page = tl.load(table_ptr + ahead_key // PAGE, mask=ahead_key < end, other=0)
            k = tl.load(keys_ptr + place, mask=is_key[:, None], other=0.0, cache_modifier=".cg")
            scores = tl.dot(q, tl.trans(k), input_precision="ieee") * scale
            scores = tl.where(is_key[None, :], scores, float("-inf"))
            higher = tl.maximum(top, tl.max(scores, axis=1))
            base = tl.where(higher == float("-inf"), 0.0, higher)
            weights = tl.exp2(scores - base[:, None])
            shrink = tl.exp2(top - base)
            v = tl.load(values_ptr + place, mask=is_key[:, None], other=0.0, cache_modifier=".cg")
            mixed = mixed * shrink[:, None] + tl.dot(weights.to(v.dtype), v, input_precision="ieee")
            total = total * shrink + tl.sum(weights, axis=1)
            top = higher

        some = tl.where(total > 0, total, 1.0)
        whole = (part * num_rows + request) * NUM_QUERY + head * GROUP + member
        tl.store(lse_ptr + whole, top + tl.log2(some), mask=is_member)
        at = part_ptr + whole[:, None] * D + dim[None, :]
        tl.store(at, mixed / some[:, None], mask=is_member[:, None])


@triton.jit
def _join_and_project(
    part_ptr, lse_ptr, weight_ptr, residual_ptr, residual_stride, out_ptr, row, is_row, num_rows,
    H: tl.constexpr, NUM_QUERY: tl.constexpr, D: tl.constexpr, PARTS: tl.constexpr,
    ROWS: tl.constexpr, BLOCK_N: tl.constexpr, SPLIT: tl.constexpr, BLOCK_K: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """``residual + attention @ weight.T``, joining the parts of the attention on the way."""
    K: tl.constexpr = NUM_QUERY * D
    dtype: tl.constexpr = out_ptr.dtype.element_ty
    column = tl.arange(0, SPLIT)[:, None] * BLOCK_K + tl.arange(0, BLOCK_K)[None, :]
    part = tl.arange(0, PARTS)
    for tile in range(tl.program_id(0), tl.cdiv(H, BLOCK_N), tl.num_programs(0)):
        n = tile * BLOCK_N + tl.arange(0, BLOCK_N)
        is_n = n < H
        sums = tl.zeros([SPLIT, ROWS, BLOCK_N], tl.float32)
        for start in tl.range(0, K, SPLIT * BLOCK_K, num_stages=STAGES if PARTS == 1 else 1):
            k = start + column
            is_k = k < K
            weight = tl.load(
                weight_ptr + n[None, :, None] * K + k[:, None, :],
                mask=is_n[None, :, None] & is_k[:, None, :],
                other=0.0,
            )
            is_x = is_row[None, :, None] & is_k[:, None, :]
            if PARTS == 1:
                at = row[None, :, None] * K + k[:, None, :]
                x = tl.load(part_ptr + at, mask=is_x, other=0.0, cache_modifier=".cg")
            else:
                # All of a block's columns belong to one head, or it holds whole heads.
                head = (start + tl.arange(0, SPLIT) * BLOCK_K) // D
                lse_at = (part[None, None, :] * num_rows + row[None, :, None]) * NUM_QUERY
                is_lse = is_row[None, :, None] & (head < NUM_QUERY)[:, None, None]
                lse = tl.load(
                    lse_ptr + lse_at + head[:, None, None],
                    mask=is_lse & (part >= 0)[None, None, :],
                    other=float("-inf"),
                    cache_modifier=".cg",
                )
                top = tl.max(lse, axis=2)
                top = tl.where(top == float("-inf"), 0.0, top)
                share = tl.exp2(lse - top[:, :, None])
                total = tl.sum(share, axis=2)
                total = tl.where(total > 0, total, 1.0)
                x = tl.zeros([SPLIT, ROWS, BLOCK_K], tl.float32)
                for one in tl.static_range(PARTS):
                    own = tl.sum(tl.where(part[None, None, :] == one, share, 0.0), axis=2) / total
                    at = (one * num_rows + row[None, :, None]) * K + k[:, None, :]
                    found = tl.load(part_ptr + at, mask=is_x, other=0.0, cache_modifier=".cg")
                    x += own[:, :, None] * found
            sums = tl.dot(x.to(dtype), tl.permute(weight, (0, 2, 1)), sums, input_precision="ieee")
        value = tl.sum(sums, axis=0).to(dtype)
        is_out = is_row[:, None] & is_n[None, :]
        before = tl.load(
            residual_ptr + row[:, None] * residual_stride + n[None, :],
            mask=is_out, other=0.0, cache_modifier=".cg",
        )  # fmt: skip
        value = (before.to(tl.float32) + value.to(tl.float32)).to(dtype)
        tl.store(out_ptr + row[:, None] * H + n[None, :], value, mask=is_out)


@triton.jit
def _gate_up(
    stream_ptr, norm_ptr, weight_ptr, out_ptr, row, is_row, eps,
    H: tl.constexpr, INNER: tl.constexpr, ROWS: tl.constexpr, BLOCK_N: tl.constexpr,
    SPLIT: tl.constexpr, BLOCK_K: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """``silu(gate) * up`` of the normed stream. Gate and up rows form one operand in turns."""
    dtype: tl.constexpr = out_ptr.dtype.element_ty
    scale = _scale_of(stream_ptr, row * H, is_row, eps, H, ROWS)
    pair = tl.arange(0, 2 * BLOCK_N)
    for tile in range(tl.program_id(0), tl.cdiv(INNER, BLOCK_N), tl.num_programs(0)):
        own = tile * BLOCK_N + pair // 2
        sums = tl.zeros([SPLIT, ROWS, 2 * BLOCK_N], tl.float32)
        sums = _add_product(
            sums, stream_ptr, row * H, is_row, norm_ptr, scale, weight_ptr,
            own + (pair % 2) * INNER, own < INNER, H, H, SPLIT, BLOCK_K, STAGES, True,
        )  # fmt: skip
        both = tl.reshape(tl.sum(sums, axis=0).to(dtype), [ROWS, BLOCK_N, 2])
        gate, up = tl.split(both)
        wide = gate.to(tl.float32)
        gate = (wide / (1.0 + tl.exp(-wide))).to(dtype)
        value = (gate.to(tl.float32) * up.to(tl.float32)).to(dtype)
        n = tile * BLOCK_N + tl.arange(0, BLOCK_N)
        at = out_ptr + row[:, None] * INNER + n[None, :]
        tl.store(at, value, mask=is_row[:, None] & (n < INNER)[None, :])


@triton.jit
def _down(
    gated_ptr, weight_ptr, stream_ptr, out_ptr, squares_ptr, norm_ptr, weighted_ptr, row, is_row,
    H: tl.constexpr, INNER: tl.constexpr, ROWS: tl.constexpr, BLOCK_N: tl.constexpr,
    SPLIT: tl.constexpr, BLOCK_K: tl.constexpr, STAGES: tl.constexpr,
    WEIGHTED: tl.constexpr,
):  # fmt: skip
    """``stream + gated @ weight.T``, and partial sums of each row's squares; with WEIGHTED also
    the output multiplied by the final norm's weight, for the head."""
    dtype: tl.constexpr = out_ptr.dtype.element_ty
    TILES: tl.constexpr = (H + BLOCK_N - 1) // BLOCK_N
    for tile in range(tl.program_id(0), TILES, tl.num_programs(0)):
        n = tile * BLOCK_N + tl.arange(0, BLOCK_N)
        is_n = n < H
        sums = tl.zeros([SPLIT, ROWS, BLOCK_N], tl.float32)
        sums = _add_product(
            sums, gated_ptr, row * INNER, is_row, gated_ptr, 0.0,
            weight_ptr, n, is_n, INNER, INNER, SPLIT, BLOCK_K, STAGES, False,
        )  # fmt: skip
        value = tl.sum(sums, axis=0).to(dtype)
        is_out = is_row[:, None] & is_n[None, :]
        at = row[:, None] * H + n[None, :]
        before = tl.load(stream_ptr + at, mask=is_out, other=0.0, cache_modifier=".cg")
        value = (before.to(tl.float32) + value.to(tl.float32)).to(dtype)
        tl.store(out_ptr + at, value, mask=is_out)
        if WEIGHTED:
            norm = tl.load(norm_ptr + n, mask=is_n, other=0.0)[None, :]
            weighted = (value.to(tl.float32) * norm.to(tl.float32)).to(dtype)
            tl.store(weighted_ptr + at, weighted, mask=is_out)
        wide = tl.where(is_out, value.to(tl.float32), 0.0)
        tl.store(squares_ptr + row * TILES + tile, tl.sum(wide * wide, axis=1), mask=is_row)


@triton.jit
def _head(
    rows_ptr, weighted_ptr, weight_ptr, tops_ptr, ids_ptr, row, is_row, eps, vocab,
    H: tl.constexpr, ROWS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """The largest logit of each row, rounded as if it were written, and the lowest id that has it,
    among this program's tiles. All steps of all tiles are one loop, so that loads never pause.

    Rows are multiplied by the norm's weight when they are made, and by their scale at a tile's end,
    which halves the instructions of the loop.
    """
    dtype: tl.constexpr = rows_ptr.dtype.element_ty
    STEPS: tl.constexpr = (H + BLOCK_K - 1) // BLOCK_K
    program, num_programs = tl.program_id(0), tl.num_programs(0)
    scale = _scale_of(rows_ptr, row * H, is_row, eps, H, ROWS)
    lane = tl.arange(0, BLOCK_N)
    num_tiles = tl.cdiv(vocab, BLOCK_N)
    mine = tl.cdiv(num_tiles - tl.minimum(program, num_tiles), num_programs)
    first_id = tl.where(mine > 0, program * BLOCK_N, vocab)
    tops = tl.full([ROWS, BLOCK_N], float("-inf"), tl.float32)
    ids = tl.zeros([ROWS, BLOCK_N], tl.int32) + (first_id + lane)[None, :]
    sums = tl.zeros([ROWS, BLOCK_N], tl.float32)
    for step in tl.range(0, mine * STEPS, num_stages=STAGES):
        n = (program + step // STEPS * num_programs) * BLOCK_N + lane
        k = step % STEPS * BLOCK_K + tl.arange(0, BLOCK_K)
        is_k = k < H
        weight = tl.load(
            weight_ptr + n.to(tl.int64)[:, None] * H + k[None, :],
            mask=(n < vocab)[:, None] & is_k[None, :],
            other=0.0,
            eviction_policy="evict_first",
        )
        x = tl.load(
            weighted_ptr + row[:, None] * H + k[None, :],
            mask=is_row[:, None] & is_k[None, :],
            other=0.0,
            cache_modifier=".cg",
        )
        sums = tl.dot(x, tl.trans(weight), sums, input_precision="ieee")
        if step % STEPS == STEPS - 1:
            logits = (sums * scale[:, None]).to(dtype).to(tl.float32)
            logits = tl.where((n < vocab)[None, :], logits, float("-inf"))
            is_better = (logits > tops) | ((logits != logits) & (tops == tops))
            tops = tl.where(is_better, logits, tops)
            ids = tl.where(is_better, n[None, :], ids)
            sums = tl.zeros([ROWS, BLOCK_N], tl.float32)
    top, best = _best(tops, ids, 1)
    tl.store(tops_ptr + row * num_programs + program, top, mask=is_row)
    tl.store(ids_ptr + row * num_programs + program, best, mask=is_row)


@triton.jit
def _token(
    tops_ptr, ids_ptr, d2t_ptr, text_ptr, is_text_ptr, text_stride, step, row, is_row, vocab,
    ROWS: tl.constexpr, PROGRAMS_UP: tl.constexpr, PARTS: tl.constexpr, HAS_MAP: tl.constexpr,
    HAS_TEXT: tl.constexpr,
):  # fmt: skip
    """[ROWS] int64 target ids: the text's tokens, or the best of all programs' parts."""
    num_programs = tl.num_programs(0)
    tops = tl.full([ROWS, PARTS], float("-inf"), tl.float32)
    ids = tl.full([ROWS, PARTS], 2**31 - 1, tl.int32)
    for start in tl.static_range(0, PROGRAMS_UP, PARTS):
        part = start + tl.arange(0, PARTS)
        at = row[:, None] * num_programs + part[None, :]
        is_part = is_row[:, None] & (part < num_programs)[None, :]
        top = tl.load(tops_ptr + at, mask=is_part, other=float("-inf"), cache_modifier=".cg")
        id = tl.load(ids_ptr + at, mask=is_part, other=2**31 - 1, cache_modifier=".cg")
        is_better = (top > tops) | ((top != top) & (tops == tops)) | ((top == tops) & (id < ids))
        tops, ids = tl.where(is_better, top, tops), tl.where(is_better, id, ids)
    _top, best = _best(tops, ids, 1)
    token = tl.minimum(tl.maximum(best, 0), vocab - 1).to(tl.int64)
    if HAS_MAP:
        token += tl.load(d2t_ptr + token, mask=is_row, other=0)
    if HAS_TEXT:
        is_text = tl.load(is_text_ptr + row * text_stride + step, mask=is_row, other=0)
        text = tl.load(text_ptr + row * text_stride + step, mask=is_row, other=0)
        token = tl.where(is_text != 0, text, token)
    return tl.where(is_row, token, 0)


@triton.jit(
    do_not_specialize=["lead", "num_ahead", "num_rows", "num_pages", "first_key", "first_step",
                       "last_step", "num_steps", "text_stride"],
    do_not_specialize_on_alignment=["first_ptr", "text_ptr", "is_text_ptr", "ids_ptr"],
)  # fmt: skip
def _chain(
    ids_ptr, hidden_ptr, hidden_stride, first_ptr, pages_ptr, text_ptr, is_text_ptr, text_stride,
    embed_ptr, input_norm_ptr, hidden_norm_ptr, post_norm_ptr, final_norm_ptr,
    qkv_weight_ptr, o_weight_ptr, gate_up_weight_ptr, down_weight_ptr, head_weight_ptr, d2t_ptr,
    cos_ptr, sin_ptr, keys_ptr, values_ptr,
    qkv_ptr, part_ptr, lse_ptr, stream_ptr, gated_ptr, rows_ptr, squares_ptr, weighted_ptr,
    tops_ptr, part_ids_ptr, tokens_ptr, meet_ptr,
    lead, num_ahead, num_rows, num_pages, first_key, first_step, last_step, num_steps, vocab, scale,
    input_eps, hidden_eps, post_eps, final_eps,
    H: tl.constexpr, INNER: tl.constexpr, NUM_KV: tl.constexpr, GROUP: tl.constexpr,
    GROUP_UP: tl.constexpr, D: tl.constexpr, PAGE: tl.constexpr, ROWS: tl.constexpr,
    KEYS: tl.constexpr, PARTS: tl.constexpr, SPLIT: tl.constexpr, BLOCK_K: tl.constexpr,
    HEADS_N: tl.constexpr, OUT_N: tl.constexpr, GATE_N: tl.constexpr, HEAD_N: tl.constexpr,
    HEAD_K: tl.constexpr, STAGES: tl.constexpr, HEAD_STAGES: tl.constexpr,
    PROGRAMS_UP: tl.constexpr, TOPS: tl.constexpr, HAS_MAP: tl.constexpr, HAS_TEXT: tl.constexpr,
    CHOOSES: tl.constexpr, MEETS: tl.constexpr, FROM: tl.constexpr, TO: tl.constexpr,
    AHEAD: tl.constexpr, SPINS: tl.constexpr, FLAG: tl.constexpr,
):  # fmt: skip
    """Steps ``first_step`` to ``last_step`` of a chain, phases FROM to TO of each.

    With CHOOSES, step 0 chooses a token from the given rows, and each further step is a pass over
    the tokens of the one before it and the choice of the next; else there is one pass, over the
    given tokens.
    """
    C: tl.constexpr = (GROUP + 2) * NUM_KV * D
    row = tl.arange(0, ROWS)
    is_row = row < num_rows
    left = tl.full((), SPINS, tl.int32)
    if AHEAD > 0 and not CHOOSES:
        _fetch_layer(
            qkv_weight_ptr, o_weight_ptr, gate_up_weight_ptr, down_weight_ptr,
            H, C, NUM_KV * GROUP * D, INNER, AHEAD,
        )  # fmt: skip
    if CHOOSES and FROM == 0:  # noqa: SIM102, decided when compiling
        if first_step == 0:
            if AHEAD > 0:
                _fetch(head_weight_ptr, tl.minimum(vocab * H, num_ahead), AHEAD)
            for one in range(tl.program_id(0), num_rows, tl.num_programs(0)):
                for start in tl.static_range(0, H, 1024):
                    k = start + tl.arange(0, 1024)
                    x = tl.load(hidden_ptr + one * hidden_stride + k, mask=k < H)
                    tl.store(rows_ptr + one * H + k, x, mask=k < H)
                    norm = tl.load(final_norm_ptr + k, mask=k < H)
                    x = (x.to(tl.float32) * norm.to(tl.float32)).to(x.dtype)
                    tl.store(weighted_ptr + one * H + k, x, mask=k < H)
            if MEETS:
                left = _meet(meet_ptr, lead, left, FLAG)
    for step in range(first_step, last_step):
        if CHOOSES:
            size = num_rows * H
            before_ptr, before_stride = rows_ptr + (step - 1) * size, H
            out_ptr = rows_ptr + step * size
        else:
            before_ptr, before_stride, out_ptr = hidden_ptr, hidden_stride, rows_ptr
        if step > 0:
            if FROM <= 1 and TO >= 1:
                if CHOOSES:
                    token = _token(
                        tops_ptr, part_ids_ptr, d2t_ptr, text_ptr, is_text_ptr, text_stride,
                        step - 1, row, is_row, vocab, ROWS, PROGRAMS_UP, TOPS, HAS_MAP, HAS_TEXT,
                    )  # fmt: skip
                    if tl.program_id(0) == 0:
                        tl.store(tokens_ptr + row * num_steps + step - 1, token, mask=is_row)
                else:
                    token = tl.load(ids_ptr + row, mask=is_row, other=0)
                _heads(
                    token, embed_ptr, before_ptr, before_stride, input_norm_ptr, hidden_norm_ptr,
                    qkv_weight_ptr, qkv_ptr, row, is_row, input_eps, hidden_eps,
                    H, C, ROWS, HEADS_N, SPLIT, BLOCK_K, STAGES,
                )  # fmt: skip
                if MEETS:
                    left = _meet(meet_ptr, lead, left, FLAG)
            if FROM <= 2 and TO >= 2:
                _attend(
                    qkv_ptr, cos_ptr, sin_ptr, keys_ptr, values_ptr, pages_ptr, first_ptr,
                    part_ptr, lse_ptr, step - 1, num_rows, num_pages, first_key, scale,
                    NUM_KV, GROUP, GROUP_UP, D, PAGE, KEYS, PARTS,
                )  # fmt: skip
                if AHEAD > 0:  # of the head, while the layer leaves the memory idle
                    _fetch(head_weight_ptr, tl.minimum(vocab * H, num_ahead), AHEAD)
                if MEETS:
                    left = _meet(meet_ptr, lead, left, FLAG)
            if FROM <= 3 and TO >= 3:
                _join_and_project(
                    part_ptr, lse_ptr, o_weight_ptr, before_ptr, before_stride, stream_ptr,
                    row, is_row, num_rows, H, NUM_KV * GROUP, D, PARTS, ROWS, OUT_N, SPLIT,
                    BLOCK_K, STAGES,
                )  # fmt: skip
                if MEETS:
                    left = _meet(meet_ptr, lead, left, FLAG)
            if FROM <= 4 and TO >= 4:
                _gate_up(
                    stream_ptr, post_norm_ptr, gate_up_weight_ptr, gated_ptr, row, is_row,
                    post_eps, H, INNER, ROWS, GATE_N, SPLIT, BLOCK_K, STAGES,
                )  # fmt: skip
                if MEETS:
                    left = _meet(meet_ptr, lead, left, FLAG)
            if FROM <= 5 and TO >= 5:
                _down(
                    gated_ptr, down_weight_ptr, stream_ptr, out_ptr, squares_ptr, final_norm_ptr,
                    weighted_ptr, row, is_row,
                    H, INNER, ROWS, OUT_N, SPLIT, BLOCK_K, STAGES, CHOOSES,
                )  # fmt: skip
                if MEETS and CHOOSES:
                    left = _meet(meet_ptr, lead, left, FLAG)
        if CHOOSES and FROM <= 6 and TO >= 6:
            _head(
                out_ptr, weighted_ptr, head_weight_ptr, tops_ptr, part_ids_ptr, row, is_row,
                final_eps, vocab, H, ROWS, HEAD_N, HEAD_K, HEAD_STAGES,
            )  # fmt: skip
            if AHEAD > 0:  # noqa: SIM102, decided when compiling
                if step + 1 < num_steps:
                    _fetch_layer(
                        qkv_weight_ptr, o_weight_ptr, gate_up_weight_ptr, down_weight_ptr,
                        H, C, NUM_KV * GROUP * D, INNER, AHEAD,
                    )  # fmt: skip
            if MEETS:
                left = _meet(meet_ptr, lead, left, FLAG)
    if CHOOSES and TO >= 7:  # noqa: SIM102, decided when compiling
        if (last_step == num_steps) & (tl.program_id(0) == 0):
            token = _token(
                tops_ptr, part_ids_ptr, d2t_ptr, text_ptr, is_text_ptr, text_stride,
                num_steps - 1, row, is_row, vocab, ROWS, PROGRAMS_UP, TOPS, HAS_MAP, HAS_TEXT,
            )  # fmt: skip
            tl.store(tokens_ptr + row * num_steps + num_steps - 1, token, mask=is_row)


@dataclass(frozen=True, slots=True)
class Meeting:
    """Where the programs of a launch meet. Launches sharing one must run in sequence."""

    counter: Tensor
    """[64] int32, zeros at first."""
    num_programs: int
    cooperative: bool = True
    """The GPU starts all programs or none; ``False``: they start as they find room, which suffices
    while no other kernel waits for its own programs in the same way."""

    def gave_up(self) -> bool:
        """Whether a program has ever stopped waiting for the others, so that what its launch left
        is wrong. Waits for the device."""
        return bool(self.counter[_FLAG])


def make_meeting(
    device: torch.device, num_programs: int | None = None, *, cooperative: bool = True
) -> Meeting:
    """A place to meet for ``num_programs``; ``None``: one on each multiprocessor of a GPU, and the
    one that Triton's interpreter can run."""
    if num_programs is None and device.type != "cuda":
        num_programs = 1
    elif num_programs is None:
        num_programs = torch.cuda.get_device_properties(device).multi_processor_count
    counter = torch.zeros(2 * _FLAG, dtype=torch.int32, device=device)
    return Meeting(counter, num_programs, cooperative)


def _lead(num_programs: int) -> int:
    """What program 0 adds so that all of them add 2**31, as an int32."""
    value = _LEAD - (num_programs - 1)
    return value - (1 << 32) if value >= _LEAD else value


def _tile(num_outputs: int, num_programs: int) -> int:
    """Outputs of a tile: as few as let every program have at most one, in 8..32."""
    wanted = triton.cdiv(num_outputs, num_programs)
    return min(32, max(8, int(triton.next_power_of_2(wanted))))


def why_not(layer: DrafterLayer, page_size: int) -> str | None:
    """``None`` if the kernel computes this layer."""
    if layer.head_dim < _LEAST_HEAD:
        return f"the head dimension {layer.head_dim} is below {_LEAST_HEAD}"
    if layer.heads.query_norm is not None or layer.heads.bias_C is not None:
        return "heads have norms or a bias"
    if page_size & (page_size - 1):
        return f"the page size {page_size} is not a power of two"
    return None


@dataclass(frozen=True, slots=True)
class Result:
    """What a launch leaves."""

    outputs: Tensor
    """[R, H] of a pass; [K, R, H] of a chain: the given rows, then the outputs of each pass."""
    squares_RP: Tensor
    """[R, P] float32, partial sums of the squares of the last outputs."""
    tokens_RK: Tensor
    """[R, K] int64 of a chain; of a pass, nothing."""


def takes(layer: DrafterLayer, hidden_RH: Tensor, at: DecodePass) -> bool:
    """Whether these rows can be processed in one launch."""
    return (
        1 <= len(hidden_RH) <= MAX_ROWS
        and len(at.pages_RP) == len(hidden_RH)
        and at.counts_R is None
        and at.ancestors_RQ is None
        and why_not(layer, at.page_size) is None
    )


def run_pass(
    layer: DrafterLayer,
    ids_R: Tensor,
    hidden_RH: Tensor,
    at: DecodePass,
    keys: Tensor,
    values: Tensor,
    meeting: Meeting,
    *,
    number: int = 1,
    **how: Any,
) -> Result:
    """See ``specops.drafter_chain.run_pass``. For ``how`` see ``_launch``.

    Args:
        number: the rows are ``number - 1`` positions further than ``at`` says.

    Raises:
        ValueError: more than ``MAX_ROWS`` rows, or a wrong shape or memory layout.
    """
    return _launch(
        layer, ids_R, hidden_RH, at, keys, values, None, None, meeting, number=number, **how
    )


def draft(
    layer: DrafterLayer,
    outputs_RH: Tensor,
    at: DecodePass,
    num_draft: int,
    keys: Tensor,
    values: Tensor,
    meeting: Meeting,
    text: ChainText | None = None,
    **how: Any,
) -> Result:
    """See ``specops.drafter_chain.draft``. For ``how`` see ``_launch``.

    Raises:
        ValueError: more than ``MAX_ROWS`` rows or ``MAX_DRAFT`` tokens, or a wrong shape or memory
            layout.
    """
    if not 1 <= num_draft <= MAX_DRAFT:
        raise ValueError(f"a chain must be of 1..{MAX_DRAFT} tokens, got {num_draft}")
    return _launch(layer, None, outputs_RH, at, keys, values, num_draft, text, meeting, **how)


def _launch(
    layer: DrafterLayer,
    ids_R: Tensor | None,
    hidden_RH: Tensor,
    at: DecodePass,
    keys: Tensor,
    values: Tensor,
    num_draft: int | None,
    text: ChainText | None,
    meeting: Meeting,
    *,
    number: int = 0,
    apart: bool = False,
    fetch: bool | None = None,
) -> Result:
    """Launch a pass (``num_draft`` is ``None``) or a chain.

    Args:
        number: see ``run_pass``; 0 for a chain.
        apart: launch every phase by itself, so that programs need not meet. Slow; for tests.
        fetch: prefetch the layer's weights; ``None``: on a GPU.
    """
    num_rows, width = hidden_RH.shape
    num_pages = at.pages_RP.shape[1]
    num_kv, head_dim = keys.shape[1:]
    heads, device = layer.heads, hidden_RH.device
    group, inner = heads.num_query // num_kv, layer.down_HI.shape[1]
    _check(layer, hidden_RH, at, keys, values)
    num_steps = number + 1 if num_draft is None else num_draft
    products = layer.qkv, layer.o_HC, layer.gate_up, layer.down_HI
    if fetch is None:
        fetch = hidden_RH.is_cuda and sum(w.nbytes for w in products) <= _FETCHED_BYTES
    num_programs = meeting.num_programs
    rows = max(16, triton.next_power_of_2(num_rows))
    parts = _PARTS if rows == 16 else 1
    channels = (heads.num_query + 2 * num_kv) * head_dim
    is_wide = hidden_RH.dtype == torch.float32
    out_n = _tile(width, num_programs)

    def empty(*shape: int, dtype: torch.dtype = hidden_RH.dtype) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=device)

    weighted = empty(num_rows, width)
    qkv, stream, gated = (
        empty(num_rows, channels), empty(num_rows, width), empty(num_rows, inner),
    )  # fmt: skip
    sums = empty(parts, num_rows, heads.num_query, head_dim, dtype=torch.float32)
    lse = empty(parts, num_rows, heads.num_query, dtype=torch.float32)
    outputs = empty(*(() if num_draft is None else (num_draft,)), num_rows, width)
    squares = empty(num_rows, triton.cdiv(width, out_n), dtype=torch.float32)
    tops = empty(num_rows, num_programs, dtype=torch.float32)
    part_ids = empty(num_rows, num_programs, dtype=torch.int32)
    tokens = empty(num_rows, 1 if num_draft is None else num_draft, dtype=torch.int64)
    ids = tokens if ids_R is None else ids_R.contiguous()
    d2t = layer.d2t_V
    known = None
    if text is not None:
        known = text.tokens_RK.contiguous(), text.is_text_RK.contiguous().view(torch.uint8)
    head_n = 64 if is_wide else 128
    # The first tile of each program.
    num_ahead = min(num_programs * head_n * width, _FETCHED_BYTES // hidden_RH.element_size())

    def launch(first_step: int, last_step: int, phases: tuple[int, int], meets: bool) -> None:
        _chain[(num_programs,)](
            ids, hidden_RH, hidden_RH.stride(0), at.first_R, at.pages_RP,
            tokens if known is None else known[0], tokens if known is None else known[1],
            0 if known is None else known[0].stride(0),
            layer.embed_VtH, layer.input_norm.weight_K, layer.hidden_norm.weight_K,
            layer.post_norm.weight_K, layer.norm.weight_K,
            layer.qkv, layer.o_HC, layer.gate_up, layer.down_HI, layer.head_VH,
            tokens if d2t is None else d2t,
            layer.table.cos, layer.table.sin, keys, values,
            qkv, sums, lse, stream, gated, outputs, squares, weighted, tops, part_ids, tokens,
            meeting.counter,
            _lead(num_programs), num_ahead, num_rows, num_pages, at.first_key,
            first_step, last_step, num_steps, layer.head_VH.shape[0], layer.scale * _LOG2_E,
            layer.input_norm.eps, layer.hidden_norm.eps, layer.post_norm.eps, layer.norm.eps,
            H=width, INNER=inner, NUM_KV=num_kv, GROUP=group,
            GROUP_UP=max(16, triton.next_power_of_2(group)), D=head_dim, PAGE=at.page_size,
            ROWS=rows, KEYS=_KEYS, PARTS=parts, SPLIT=_NUM_WARPS, BLOCK_K=min(_BLOCK_K, head_dim),
            HEADS_N=_tile(channels, num_programs), OUT_N=out_n,
            GATE_N=_tile(inner, num_programs), HEAD_N=head_n,
            HEAD_K=32 if is_wide else 64,
            STAGES=2 if is_wide else 3, HEAD_STAGES=2 if is_wide else 7,
            PROGRAMS_UP=triton.next_power_of_2(num_programs),
            TOPS=min(64, triton.next_power_of_2(num_programs)),
            HAS_MAP=d2t is not None, HAS_TEXT=known is not None,
            CHOOSES=num_draft is not None, MEETS=meets, FROM=phases[0], TO=phases[1],
            AHEAD=_NUM_WARPS * 32 if fetch else 0, SPINS=_SPINS, FLAG=_FLAG,
            # A fused multiply-add would skip the rounding of RoPE's products.
            enable_fp_fusion=is_wide, num_warps=_NUM_WARPS,
            launch_cooperative_grid=meets and meeting.cooperative,
        )  # fmt: skip

    if apart:
        for step in range(number, num_steps):
            for phase in range(ALL[1]):
                launch(step, step + 1, (phase, phase), False)
        launch(num_steps, num_steps, (ALL[1], ALL[1]), False)
    else:
        launch(number, num_steps, ALL, True)
    return Result(outputs, squares, tokens)


def _check(
    layer: DrafterLayer, hidden_RH: Tensor, at: DecodePass, keys: Tensor, values: Tensor
) -> None:
    num_rows = len(hidden_RH)
    if not 1 <= num_rows <= MAX_ROWS:
        raise ValueError(f"one launch takes 1..{MAX_ROWS} rows, got {num_rows}")
    if len(at.pages_RP) != num_rows or at.counts_R is not None or at.ancestors_RQ is not None:
        raise ValueError("a pass must be of one row for each request, without counts or ancestors")
    if hidden_RH.stride(1) != 1:
        raise ValueError(f"hidden rows must have adjacent columns, got {hidden_RH.stride()}")
    if reason := why_not(layer, at.page_size):
        raise ValueError(f"not in one launch: {reason}")
    for name, tensor in (
        ("keys", keys), ("values", values), ("pages", at.pages_RP), ("first", at.first_R),
        ("embedding", layer.embed_VtH), ("qkv", layer.qkv), ("o", layer.o_HC),
        ("gate_up", layer.gate_up), ("down", layer.down_HI), ("head", layer.head_VH),
    ):  # fmt: skip
        if not tensor.is_contiguous():
            raise ValueError(f"{name} must be contiguous, got strides {tensor.stride()}")
