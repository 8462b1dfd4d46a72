"""What precedes and follows a product of few rows in its own kernel, so that neither takes a launch
of its own; see ``specops.linear_triton``.

Before it: the norms of a drafter's pair of inputs, or the joining of attention's parts. After it:
rotary embedding and the write to the pages, or the choice of the largest output. The definitions
are in ``specops.joined``.

Shapes: M rows, K inputs, N outputs, Hq/Hkv heads, D head dimension, P parts of a request's keys.
"""

from __future__ import annotations

import triton
import triton.language as tl

from specops.best_ids_triton import best_of


@triton.jit
def pair_squares(rows, is_row, width, ROWS: tl.constexpr, WIDE_K: tl.constexpr):
    """[ROWS] sums of squares of the rows at these pointers."""
    total = tl.zeros([ROWS], tl.float32)
    for start in tl.range(0, width, WIDE_K, num_stages=3):  # several blocks in flight
        k = start + tl.arange(0, WIDE_K)
        is_k = is_row[:, None] & (k < width)[None, :]
        x = tl.load(rows[:, None] + k[None, :], mask=is_k, other=0.0).to(tl.float32)
        total += tl.sum(x * x, axis=1)
    return total


@triton.jit
def _normed(x, weight, scale):
    """``rms_norm`` in the dtype of x, given the inverse of the root mean square."""
    normed = x.to(tl.float32) * scale
    if weight.dtype != tl.float32:
        normed = normed.to(x.dtype).to(tl.float32)
    return (weight.to(tl.float32) * normed).to(x.dtype)


@triton.jit
def _norms_of_pair(first_norm_ptr, second_norm_ptr, k, is_k, half):
    """The weights of both norms at columns of the pair."""
    is_first = k < half
    first = tl.load(first_norm_ptr + k, mask=is_k & is_first, other=0.0)
    second = tl.load(second_norm_ptr + k - half, mask=is_k & (k >= half), other=0.0)
    return tl.where(is_first, first, second)


@triton.jit
def rows_of_pair(
    hidden, embeds, hidden_norm_ptr, embed_norm_ptr, is_row, k, is_k, half, hidden_scale,
    embed_scale, HIDDEN_FIRST: tl.constexpr,
):  # fmt: skip
    """A block [ROWS, BLOCK_K] of normed pairs, from pointers to the rows of both halves."""
    if HIDDEN_FIRST:
        firsts, seconds, first_scale, second_scale = hidden, embeds, hidden_scale, embed_scale
        weight = _norms_of_pair(hidden_norm_ptr, embed_norm_ptr, k, is_k, half)
    else:
        firsts, seconds, first_scale, second_scale = embeds, hidden, embed_scale, hidden_scale
        weight = _norms_of_pair(embed_norm_ptr, hidden_norm_ptr, k, is_k, half)
    is_first = k < half
    mask = is_row[:, None] & (is_k & is_first)[None, :]
    first = tl.load(firsts[:, None] + k[None, :], mask=mask, other=0.0)
    mask = is_row[:, None] & (is_k & (k >= half))[None, :]
    second = tl.load(seconds[:, None] + (k - half)[None, :], mask=mask, other=0.0)
    x = tl.where(is_first[None, :], first, second)
    scale = tl.where(is_first[None, :], first_scale[:, None], second_scale[:, None])
    return _normed(x, weight[None, :], scale)


@triton.jit
def row_of_pair(
    hidden_ptr, embed_ptr, hidden_norm_ptr, embed_norm_ptr, k, is_k, half, hidden_scale,
    embed_scale, HIDDEN_FIRST: tl.constexpr,
):  # fmt: skip
    """A block [BLOCK_K] of one normed pair, rounded to its dtype, as float32."""
    if HIDDEN_FIRST:
        first_ptr, second_ptr, first_scale, second_scale = (
            hidden_ptr, embed_ptr, hidden_scale, embed_scale,
        )  # fmt: skip
        weight = _norms_of_pair(hidden_norm_ptr, embed_norm_ptr, k, is_k, half)
    else:
        first_ptr, second_ptr, first_scale, second_scale = (
            embed_ptr, hidden_ptr, embed_scale, hidden_scale,
        )  # fmt: skip
        weight = _norms_of_pair(embed_norm_ptr, hidden_norm_ptr, k, is_k, half)
    is_first = k < half
    first = tl.load(first_ptr + k, mask=is_k & is_first, other=0.0)
    second = tl.load(second_ptr + k - half, mask=is_k & (k >= half), other=0.0)
    x = tl.where(is_first, first, second)
    return _normed(x, weight, tl.where(is_first, first_scale, second_scale)).to(tl.float32)


@triton.jit
def _first_part(row, head, num_parts, num_query, GROUP: tl.constexpr, NUM_KV: tl.constexpr):
    """Where the first part of a row and query head is; the others follow ``num_query * GROUP``
    apart."""
    whole = (row // num_query * NUM_KV + head // GROUP) * num_parts
    return whole * (num_query * GROUP) + row % num_query * GROUP + head % GROUP


@triton.jit
def _joined(
    parts_ptr, lse_ptr, at, is_at, dim, is_wanted, num_parts, step,
    D: tl.constexpr, PARTS_UP: tl.constexpr, dtype: tl.constexpr,
):  # fmt: skip
    """Parts of attention, weighted by their sums of weights. ``at`` may have one column for all of
    ``dim``. A part that a request does not have has -inf as its logarithm, and holds anything.

    The loops are unrolled, so that no load waits for another part's.
    """
    top = tl.load(lse_ptr + at, mask=is_at, other=float("-inf"))
    for part in tl.static_range(1, PARTS_UP):
        is_part = is_at & (part < num_parts)
        lse = tl.load(lse_ptr + at + part * step, mask=is_part, other=float("-inf"))
        top = tl.maximum(top, lse)
    base = tl.where(top == float("-inf"), 0.0, top)
    total = tl.zeros(at.shape, tl.float32)
    mixed = tl.zeros(is_wanted.shape, tl.float32)
    for part in tl.static_range(0, PARTS_UP):
        is_part = is_at & (part < num_parts)
        here = at + part * step
        lse = tl.load(lse_ptr + here, mask=is_part, other=float("-inf"))
        share = tl.exp2(lse - base)
        found = tl.load(parts_ptr + here * D + dim, mask=is_wanted & (share > 0), other=0.0)
        mixed += found * share
        total += share
    return (mixed / tl.where(total > 0, total, 1.0)).to(dtype)


@triton.jit
def rows_of_parts(
    parts_ptr, lse_ptr, row, is_row, start, k, is_k, num_parts, num_query,
    GROUP: tl.constexpr, NUM_KV: tl.constexpr, D: tl.constexpr, PARTS_UP: tl.constexpr,
    BLOCK_K: tl.constexpr, dtype: tl.constexpr,
):  # fmt: skip
    """A block [ROWS, BLOCK_K] of attention's output, from its parts."""
    is_wanted = is_row[:, None] & is_k[None, :]
    if D % BLOCK_K == 0:  # columns of one head
        head = start // D + tl.zeros([1], tl.int32)
        is_at = is_row[:, None] & (head >= 0)[None, :]
    else:
        head = k // D
        is_at = is_wanted
    at = _first_part(row[:, None], head[None, :], num_parts, num_query, GROUP, NUM_KV)
    return _joined(
        parts_ptr, lse_ptr, at, is_at, (k % D)[None, :], is_wanted, num_parts, num_query * GROUP,
        D, PARTS_UP, dtype,
    )  # fmt: skip


@triton.jit
def row_of_parts(
    parts_ptr, lse_ptr, row, k, is_k, num_parts, num_query,
    GROUP: tl.constexpr, NUM_KV: tl.constexpr, D: tl.constexpr, PARTS_UP: tl.constexpr,
    dtype: tl.constexpr,
):  # fmt: skip
    """A block [BLOCK_K] of one row of attention's output, rounded to ``dtype``, as float32."""
    at = _first_part(row, k // D, num_parts, num_query, GROUP, NUM_KV)
    x = _joined(
        parts_ptr, lse_ptr, at, is_k, k % D, is_k, num_parts, num_query * GROUP,
        D, PARTS_UP, dtype,
    )  # fmt: skip
    return x.to(tl.float32)


@triton.jit
def turn_and_write(
    first, second, q_ptr, cos_ptr, sin_ptr, positions_ptr, slots_ptr, keys_ptr, values_ptr,
    bias_ptr, query_norm_ptr, key_norm_ptr, eps, row, is_row, n, tile,
    NUM_QUERY: tl.constexpr, NUM_KV: tl.constexpr, D: tl.constexpr,
    BIAS: tl.constexpr, HEAD_NORM: tl.constexpr,
):  # fmt: skip
    """``specops.rope.rope_and_write`` of a tile: elements of the first half of one head, and those
    of its second half that turn with them. With HEAD_NORM the tile is the whole head."""
    dtype: tl.constexpr = first.dtype
    head = tile // (D // (2 * n.shape[0]))
    dim = n - head * D
    if BIAS:
        bias = tl.load(bias_ptr + n)[None, :].to(tl.float32)
        first = (first.to(tl.float32) + bias).to(dtype)
        bias = tl.load(bias_ptr + n + D // 2)[None, :].to(tl.float32)
        second = (second.to(tl.float32) + bias).to(dtype)
    x_1, x_2 = first.to(tl.float32), second.to(tl.float32)
    if HEAD_NORM:
        squares = tl.sum(x_1 * x_1, axis=1) + tl.sum(x_2 * x_2, axis=1)
        scale = tl.rsqrt(squares / D + eps)[:, None]
        query_1, query_2 = tl.load(query_norm_ptr + dim), tl.load(query_norm_ptr + D // 2 + dim)
        key_1, key_2 = tl.load(key_norm_ptr + dim), tl.load(key_norm_ptr + D // 2 + dim)
        weight_1 = tl.where(head < NUM_QUERY, query_1, key_1)
        weight_2 = tl.where(head < NUM_QUERY, query_2, key_2)
        x_1, x_2 = x_1 * scale, x_2 * scale
        if weight_1.dtype != tl.float32:
            x_1, x_2 = x_1.to(dtype).to(tl.float32), x_2.to(dtype).to(tl.float32)
        x_1 = (weight_1.to(tl.float32)[None, :] * x_1).to(dtype).to(tl.float32)
        x_2 = (weight_2.to(tl.float32)[None, :] * x_2).to(dtype).to(tl.float32)

    is_out = is_row[:, None] & (dim >= 0)[None, :]
    if head >= NUM_QUERY + NUM_KV:
        slot = tl.load(slots_ptr + row, mask=is_row, other=0)
        at = (slot * NUM_KV + head - NUM_QUERY - NUM_KV)[:, None] * D + dim[None, :]
        tl.store(values_ptr + at, first, mask=is_out)
        tl.store(values_ptr + at + D // 2, second, mask=is_out)
    else:
        position = tl.load(positions_ptr + row, mask=is_row, other=0)
        angle = position[:, None] * (D // 2) + dim[None, :]
        cos = tl.load(cos_ptr + angle, mask=is_out, other=0.0).to(tl.float32)
        sin = tl.load(sin_ptr + angle, mask=is_out, other=0.0).to(tl.float32)
        # Rounded after every operation, as in the definition.
        turned_1 = (x_1 * cos).to(dtype).to(tl.float32) - (x_2 * sin).to(dtype).to(tl.float32)
        turned_2 = (x_2 * cos).to(dtype).to(tl.float32) + (x_1 * sin).to(dtype).to(tl.float32)
        turned_1, turned_2 = turned_1.to(dtype), turned_2.to(dtype)
        if head < NUM_QUERY:
            at = (row.to(tl.int64) * NUM_QUERY + head)[:, None] * D + dim[None, :]
            tl.store(q_ptr + at, turned_1, mask=is_out)
            tl.store(q_ptr + at + D // 2, turned_2, mask=is_out)
        else:
            slot = tl.load(slots_ptr + row, mask=is_row, other=0)
            at = (slot * NUM_KV + head - NUM_QUERY)[:, None] * D + dim[None, :]
            tl.store(keys_ptr + at, turned_1, mask=is_out)
            tl.store(keys_ptr + at + D // 2, turned_2, mask=is_out)


@triton.jit
def keep_best(value, tops_ptr, ids_ptr, row, is_row, n, is_n, tile, num_tiles):
    """The largest of a tile's outputs in each row, and its id."""
    tops = tl.where(is_n[None, :], value.to(tl.float32), float("-inf"))
    top, best_id = best_of(tops, n[None, :], 1)
    tl.store(tops_ptr + row * num_tiles + tile, top, mask=is_row)
    tl.store(ids_ptr + row * num_tiles + tile, best_id, mask=is_row)
