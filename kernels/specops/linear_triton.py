"""Products of a few rows, one kernel each; the definitions are in ``specops.linear``.

Every program streams some rows of the weight once. There are three variants:

- ``multiply``: multiplies and adds in float32, for one or two rows of x;
- ``weights_first``: a matrix product with the weight as left operand, so that Hopper's tensor cores
  read both operands from shared memory; at least 64 rows of the weight at a time;
- ``rows_first``: a matrix product with x, padded to 16 rows, as left operand; narrow tiles.

If the weight has too few rows to fill the GPU, its columns are split among programs. Each writes
its partial sums, and the last one to finish adds them in a fixed order, so results do not depend on
which one that was.

Shapes: M rows, K inputs, N outputs, P partial sums of a row's squares.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Literal

import torch
import triton
import triton.language as tl
from torch import Tensor

from specops.attention import AttendedParts
from specops.best_ids import BestParts
from specops.few_row_ends_triton import (
    keep_best,
    pair_squares,
    row_of_pair,
    row_of_parts,
    rows_of_pair,
    rows_of_parts,
    turn_and_write,
)
from specops.linear import Norm
from specops.overlap_triton import fetch_into_l2, let_next_start, wait_for_previous
from specops.rope import HeadPlaces
from specops.rows import Pair

MAX_ROWS = 64
_PINNED_ROWS = 16
_PROGRAMS = 264
"""Target number of programs: two for each multiprocessor of an H100 or H200."""
_MULTIPROCESSORS = 132
_MAX_SPLIT = 16
_LINE_BYTES = 128
_SHARED_BYTES = 100 << 10
_MOST_AHEAD = 8
_WIDE_ELEMENTS = 1 << 14
"""Of rows whose squares are summed at once, in a kernel that finds their norm itself."""
_THIRD_BYTES = 72 << 10
"""Shared memory per program with which three fit on a multiprocessor."""
_FULL = 0.9
"""From this share of ``_PROGRAMS`` upwards, fewer and wider blocks in flight are faster."""

Way = Literal["multiply", "weights_first", "rows_first"]


@dataclass(frozen=True, slots=True)
class Plan:
    """How a product is cut into programs."""

    way: Way
    block_n: int
    """Outputs per program. A gated product reads twice as many rows of the weight; with
    ``weights_first`` they form one operand, at least 64 rows."""
    block_k: int
    """Columns read at a time."""
    split: int = 1
    """Programs that share a tile's columns."""
    num_warps: int = 4
    num_stages: int = 4
    """Blocks in flight, including the one being multiplied."""
    rows: int | None = None
    """Rows of x per program, for products of any number of rows; ``None``: all, up to 64. With a
    fixed number and no split, a row's result does not depend on the other rows."""


@dataclass(frozen=True, slots=True)
class Scratch:
    """Partial sums of programs that share a tile. Launches sharing one must run in sequence."""

    parts: Tensor
    """[split * rows * N] float32."""
    arrived: Tensor
    """[tiles] int32; zeros between launches."""


def choose_plan(
    num_rows: int, num_outputs: int, num_inputs: int, gated: bool, itemsize: int = 2
) -> Plan:
    """The plan for one shape, chosen by a rule, so that nothing is tuned at start-up.

    Blocks in flight take at most 100 KB of shared memory, so two programs fit on a multiprocessor;
    columns are split only as far as all programs run at once. The rule comes from a sweep of 15
    products of Qwen3-8B on an H200 (``benchmarks/results/ops_linear_sweep.json``).

    Args:
        num_outputs, num_inputs: N, K.
        itemsize: bytes of an element of the weight.
    """
    block_k = min(_LINE_BYTES // itemsize, _up(num_inputs))
    if num_rows <= 2 and gated:
        return Plan("multiply", 4, min(512 // itemsize, _up(num_inputs)), 1, 2, 5)
    if num_rows <= 2 and num_outputs < 64 * _PROGRAMS:
        return Plan("multiply", 8, min(1024 // itemsize, _up(num_inputs)), num_stages=1)
    rows = _padded(num_rows)
    if gated:  # three per multiprocessor: 12,288 outputs are 384 programs, just under one wave
        block_k = 2 * block_k if num_inputs % (2 * block_k) == 0 else block_k
        stages = min(8, _THIRD_BYTES // ((64 + rows) * block_k * itemsize))
        return Plan("weights_first", 32, block_k, num_stages=stages)
    tiles = triton.cdiv(num_outputs, 64)
    split = max(1, min(_PROGRAMS // tiles, triton.cdiv(num_inputs, 4 * block_k), _MAX_SPLIT))
    if tiles * split >= _FULL * _PROGRAMS and num_inputs % (2 * block_k) == 0:
        stages = min(3, _SHARED_BYTES // ((64 + rows) * 2 * block_k * itemsize))
        return Plan("weights_first", 64, 2 * block_k, split, num_stages=stages)
    stages = min(8, _SHARED_BYTES // ((64 + rows) * block_k * itemsize))
    return Plan("weights_first", 64, block_k, split, num_stages=stages)


def choose_joined_plan(
    num_rows: int, num_outputs: int, num_inputs: int, gated: bool, itemsize: int = 2,
    half: int = 0, is_whole: bool = False, part_dim: int = 0,
) -> Plan:  # fmt: skip
    """The plan for one shape of a small model, whose products take as long as their launches and
    their first loads. All multiprocessors get something to do, and most of a program's weights are
    in flight from its start. Larger products have ``choose_plan``'s.

    Args:
        half: half the dimension of a head, if the outputs are turned; a tile is then that many
            pairs of outputs as ``block_n`` says.
        is_whole: a tile must be a whole head.
        part_dim: dimension of a head, if the rows are parts of attention. A program then joins the
            parts of few heads, and has nothing else in flight.
    """
    if num_rows <= 2 and half and not is_whole:
        block_k = min(2048 // itemsize // num_rows, _up(num_inputs))
        return Plan("multiply", min(4, half), block_k, num_stages=1)
    if (
        num_rows <= (1 if part_dim else 2)
        and not (gated or half)
        and num_outputs < 8 * _MULTIPROCESSORS
    ):
        return Plan("multiply", 4, min(2048 // itemsize, _up(num_inputs)), num_stages=1)
    is_wide = is_whole or part_dim > 0  # too much for one thread's registers
    plan = choose_plan(
        max(num_rows, 3) if is_wide else num_rows, num_outputs, num_inputs, gated, itemsize
    )
    if plan.way == "multiply":
        return plan
    if part_dim:
        block_k = max(16, min(_LINE_BYTES // itemsize, part_dim))
        tiles, blocks = triton.cdiv(num_outputs, 16), triton.cdiv(num_inputs, block_k)
        split = max(1, min(blocks, _MAX_SPLIT, 3 * _MULTIPROCESSORS // tiles))
        return Plan("rows_first", 16, block_k, split, num_stages=1)
    each = 2 if half else 1
    if half:
        plan = replace(plan, block_n=half if is_whole else min(32, half))
    tiles = triton.cdiv(num_outputs, plan.block_n * each)
    if tiles * plan.split >= _MULTIPROCESSORS:
        return plan
    block_n = half if is_whole else min(8, half) if half else 16
    tiles = triton.cdiv(num_outputs, block_n * each)
    block_k = min(_LINE_BYTES // itemsize, _up(num_inputs))
    split = min(_MULTIPROCESSORS // tiles, num_inputs // (2 * block_k), _MAX_SPLIT)
    tile_bytes = (block_n * (2 if half or gated else 1) + _padded(num_rows)) * block_k * itemsize
    stages = max(1, min(6, _SHARED_BYTES // tile_bytes))
    return Plan("rows_first", block_n, block_k, max(1, split), num_stages=stages)


def pinned_plan(num_outputs: int, num_inputs: int, gated: bool, itemsize: int = 2) -> Plan:
    """The plan of a weight for any number of rows. For the arguments see ``choose_plan``."""
    plan = choose_plan(_PINNED_ROWS, num_outputs, num_inputs, gated, itemsize)
    # Tensor cores do not multiply float32 exactly, so a thread holds all columns of a block.
    block_k = plan.block_k if itemsize < 4 else 16
    return replace(plan, split=1, block_k=block_k, rows=_PINNED_ROWS)


def _up(number: int) -> int:
    return max(16, int(triton.next_power_of_2(number)))


def _padded(num_rows: int) -> int:
    """Rows of a matrix product's operand."""
    return max(16, int(triton.next_power_of_2(num_rows)))


def make_scratch(
    products: Iterable[tuple[int, int, bool]], dtype: torch.dtype, device: torch.device,
    joined: bool = False,
) -> Scratch:  # fmt: skip
    """Scratch for the plans of some products, each given as (N, K, is gated).

    Args:
        joined: also for ``choose_joined_plan``'s, whichever way their outputs go.
    """
    needs = [(1, 1)]
    for num_outputs, num_inputs, gated in products:
        for num_rows in range(1, MAX_ROWS + 1):
            plan = choose_plan(num_rows, num_outputs, num_inputs, gated, dtype.itemsize)
            needs.append(_scratch_needed(plan, num_rows, num_outputs, gated))
    if joined:  # at most so many programs of 64 outputs, or thrice of 16, share tiles
        needs.append((_PROGRAMS * 64 * _padded(MAX_ROWS), 3 * _MULTIPROCESSORS))
    sums, tiles = (max(sizes) for sizes in zip(*needs, strict=True))
    return Scratch(
        torch.empty(sums, dtype=torch.float32, device=device),
        torch.zeros(tiles, dtype=torch.int32, device=device),
    )


def _scratch_needed(plan: Plan, num_rows: int, num_outputs: int, gated: bool) -> tuple[int, int]:
    """(Partial sums, tiles) of a product; zeros if it is not split."""
    if plan.split == 1:
        return 0, 0
    sums = plan.split * _padded(num_rows) * num_outputs * (1 + gated)
    return sums, int(triton.cdiv(num_outputs, plan.block_n))


@triton.jit
def _rows_of_x(
    x_ptr, norm_ptr, row, is_row, k, is_k, x_stride, scale,
    NORM: tl.constexpr,
):  # fmt: skip
    """A block [ROWS, BLOCK_K] of normed x, in the dtype of x."""
    x = tl.load(
        x_ptr + row[:, None] * x_stride + k[None, :],
        mask=is_row[:, None] & is_k[None, :],
        other=0.0,
    )
    if NORM:
        weight = tl.load(norm_ptr + k, mask=is_k, other=0.0)
        normed = x.to(tl.float32) * scale[:, None]
        if weight.dtype != tl.float32:
            normed = normed.to(x.dtype).to(tl.float32)
        x = (weight.to(tl.float32)[None, :] * normed).to(x.dtype)
    return x


@triton.jit
def _row_of_x(x_ptr, norm_ptr, k, is_k, scale, NORM: tl.constexpr):
    """A block [BLOCK_K] of one row of normed x, rounded to its dtype, as float32."""
    x = tl.load(x_ptr + k, mask=is_k, other=0.0)
    if NORM:
        weight = tl.load(norm_ptr + k, mask=is_k, other=0.0)
        normed = x.to(tl.float32) * scale
        if weight.dtype != tl.float32:
            normed = normed.to(x.dtype).to(tl.float32)
        x = (weight.to(tl.float32) * normed).to(x.dtype)
    return x.to(tl.float32)


@triton.jit
def _row_squares(
    x_ptr, squares_ptr, row, is_row, num_inputs, num_parts, x_stride,
    ROWS: tl.constexpr, BLOCK_K: tl.constexpr, PARTS_UP: tl.constexpr,
):  # fmt: skip
    """[ROWS] sum of squares of each row: from partial sums, or from x if PARTS_UP = 0."""
    if PARTS_UP > 0:
        part = tl.arange(0, PARTS_UP)
        parts = tl.load(
            squares_ptr + row[:, None] * num_parts + part[None, :],
            mask=is_row[:, None] & (part < num_parts)[None, :],
            other=0.0,
        )
        total = tl.sum(parts, axis=1)
    else:
        total = tl.zeros([ROWS], tl.float32)
        for start in range(0, num_inputs, BLOCK_K):
            k = start + tl.arange(0, BLOCK_K)
            x = tl.load(
                x_ptr + row[:, None] * x_stride + k[None, :],
                mask=is_row[:, None] & (k < num_inputs)[None, :],
                other=0.0,
            ).to(tl.float32)
            total += tl.sum(x * x, axis=1)
    return total


@triton.jit
def _weight_tile(weight_ptr, n, is_n, k, is_k, stride):
    """A tile [BLOCK_N, BLOCK_K] of the weight, read only once, so evicted first."""
    return tl.load(
        weight_ptr + n.to(tl.int64)[:, None] * stride + k[None, :],
        mask=is_n[:, None] & is_k[None, :],
        other=0.0,
        eviction_policy="evict_first",
    )


@triton.jit
def _add_parts(parts_ptr, place, is_place, part_size, SPLIT: tl.constexpr):
    """Sum of a tile's parts in order, read past the L1 cache, which may hold stale values."""
    total = tl.load(parts_ptr + place, mask=is_place, other=0.0, cache_modifier=".cg")
    for part in tl.static_range(1, SPLIT):
        total += tl.load(
            parts_ptr + part * part_size + place, mask=is_place, other=0.0, cache_modifier=".cg"
        )
    return total


@triton.jit
def _finish(
    value, up, residual_ptr, out_ptr, out_squares_ptr, best_ids_ptr,
    cos_ptr, sin_ptr, positions_ptr, slots_ptr, keys_ptr, values_ptr, bias_ptr,
    query_norm_ptr, key_norm_ptr, head_eps,
    row, is_row, n, is_n, tile, num_tiles, residual_stride, out_stride, dtype: tl.constexpr,
    RESIDUAL: tl.constexpr, GATED: tl.constexpr, BEST: tl.constexpr,
    HEADS: tl.constexpr, NUM_KV: tl.constexpr, D: tl.constexpr,
    BIAS: tl.constexpr, HEAD_NORM: tl.constexpr,
):  # fmt: skip
    """Round the product to ``dtype``, as a separate product would be, then apply what follows."""
    is_out = is_row[:, None] & is_n[None, :]
    value = value.to(dtype)
    if BEST:
        keep_best(value, out_squares_ptr, best_ids_ptr, row, is_row, n, is_n, tile, num_tiles)
    elif HEADS > 0:
        turn_and_write(
            value, up.to(dtype), out_ptr, cos_ptr, sin_ptr, positions_ptr, slots_ptr, keys_ptr,
            values_ptr, bias_ptr, query_norm_ptr, key_norm_ptr, head_eps, row, is_row, n, tile,
            HEADS, NUM_KV, D, BIAS, HEAD_NORM,
        )  # fmt: skip
    else:
        if GATED:
            gate = value.to(tl.float32)
            gate = (gate / (1.0 + tl.exp(-gate))).to(dtype)
            value = (gate.to(tl.float32) * up.to(dtype).to(tl.float32)).to(dtype)
        if RESIDUAL:
            at = residual_ptr + row[:, None] * residual_stride + n[None, :]
            before = tl.load(at, mask=is_out, other=0.0)
            value = (before.to(tl.float32) + value.to(tl.float32)).to(dtype)
            wide = tl.where(is_out, value.to(tl.float32), 0.0)
            sums = tl.sum(wide * wide, axis=1)
            tl.store(out_squares_ptr + row * num_tiles + tile, sums, mask=is_row)
        at = out_ptr + row[:, None] * out_stride + n[None, :]
        tl.store(at, value.to(out_ptr.dtype.element_ty), mask=is_out)


@triton.jit(
    do_not_specialize=["num_rows", "num_parts", "num_query"],
    do_not_specialize_on_alignment=["ids_ptr", "positions_ptr", "slots_ptr"],
)
def _few_rows(
    x_ptr, weight_ptr, norm_ptr, squares_ptr, residual_ptr, out_ptr, out_squares_ptr,
    parts_ptr, arrived_ptr,
    ids_ptr, table_ptr, other_norm_ptr, other_eps, lse_ptr, best_ids_ptr,
    cos_ptr, sin_ptr, positions_ptr, slots_ptr, keys_ptr, values_ptr, bias_ptr,
    query_norm_ptr, key_norm_ptr, head_eps,
    num_rows, num_outputs, num_inputs, num_parts, num_query, eps,
    x_stride, weight_stride, residual_stride, out_stride,
    ROWS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, SPLIT: tl.constexpr,
    STAGES: tl.constexpr, AHEAD: tl.constexpr, WAY: tl.constexpr, PARTS_UP: tl.constexpr,
    NORM: tl.constexpr, RESIDUAL: tl.constexpr, GATED: tl.constexpr, OVERLAP: tl.constexpr,
    FETCH: tl.constexpr, BLOCKS: tl.constexpr,
    PAIR: tl.constexpr, HIDDEN_FIRST: tl.constexpr, JOINS: tl.constexpr,
    BEST: tl.constexpr, HEADS: tl.constexpr, NUM_KV: tl.constexpr, D: tl.constexpr,
    GROUP: tl.constexpr, BIAS: tl.constexpr, HEAD_NORM: tl.constexpr, WIDE_K: tl.constexpr,
):  # fmt: skip
    """One tile of BLOCK_N outputs for all rows or a block of them, or a partial sum (SPLIT).

    What the rows are: x; with PAIR, embeddings and hidden states; with JOINS, JOINS parts of
    attention. What becomes of the product: it is written; with RESIDUAL or GATED, added or gated
    first; with BEST, only its largest element is; with HEADS, the number of query heads, it is
    turned and written to the pages, and a tile is BLOCK_N pairs of outputs that turn together.
    """
    dtype: tl.constexpr = weight_ptr.dtype.element_ty
    tile, num_tiles = tl.program_id(0), tl.num_programs(0)
    row = tl.arange(0, ROWS)
    if BLOCKS:
        row += tl.program_id(2) * ROWS
    is_row = row < num_rows
    TWO: tl.constexpr = GATED or HEADS > 0
    if HEADS > 0:
        TILES_OF_HEAD: tl.constexpr = D // (2 * BLOCK_N)
        begin_n = tile // TILES_OF_HEAD * D + tile % TILES_OF_HEAD * BLOCK_N
        apart = num_outputs * 0 + D // 2
    else:
        begin_n = tile * BLOCK_N
        apart = num_outputs
    n = begin_n + tl.arange(0, BLOCK_N)
    is_n = n < num_outputs
    # Gate and up form one operand: 64 rows instead of twice 32.
    PAIRED: tl.constexpr = TWO and WAY == "weights_first"
    pair = tl.arange(0, 2 * BLOCK_N)
    pair_n = begin_n + pair % BLOCK_N
    is_pair = pair_n < num_outputs
    pair_row = pair_n + (pair // BLOCK_N) * apart
    column = tl.arange(0, BLOCK_K)
    steps = tl.cdiv(num_inputs, BLOCK_K * SPLIT)
    begin = tl.program_id(1) * steps * BLOCK_K
    end = tl.minimum(begin + steps * BLOCK_K, num_inputs)

    if OVERLAP and not PAIR:
        let_next_start()
    if FETCH:  # the first blocks, while the previous kernel ends and the rows' squares are summed
        LINE: tl.constexpr = 1024 // weight_ptr.dtype.element_ty.primitive_bitwidth
        LINES: tl.constexpr = BLOCK_K // LINE if BLOCK_K > LINE else 1
        line = tl.arange(0, LINES) * LINE
        first = weight_ptr + tl.minimum(n, num_outputs - 1).to(tl.int64)[:, None] * weight_stride
        for step in tl.static_range(AHEAD):
            ahead = tl.minimum(begin + step * BLOCK_K + line, num_inputs - 1)
            fetch_into_l2(first + ahead[None, :])
            if TWO:
                fetch_into_l2(first + apart.to(tl.int64) * weight_stride + ahead[None, :])
    if OVERLAP:
        wait_for_previous()
        if PAIR:  # only now: the next kernel may fetch weights, which a swap may have written
            let_next_start()

    scale = tl.zeros([ROWS], tl.float32)
    other_scale = scale
    half = num_inputs // 2
    embeds = table_ptr  # the rows' embeddings, where there are any
    if PAIR:
        token = tl.load(ids_ptr + row, mask=is_row, other=0).to(tl.int64)
        embeds = table_ptr + token * half
        is_read = end > half if HIDDEN_FIRST else begin < half
        if is_read:  # a program of a split product may have columns of one half alone
            squares = pair_squares(embeds, is_row, half, ROWS, WIDE_K)
            other_scale = tl.rsqrt(squares / half + other_eps)
    if NORM:
        width = half if PAIR else num_inputs
        squares = _row_squares(
            x_ptr, squares_ptr, row, is_row, width, num_parts, x_stride, ROWS, WIDE_K, PARTS_UP,
        )  # fmt: skip
        scale = tl.rsqrt(squares / width + eps)

    if WAY == "multiply":
        scale_0 = tl.sum(tl.where(row == 0, scale, 0.0), axis=0)
        scale_1 = tl.sum(tl.where(row == 1, scale, 0.0), axis=0)
        if PAIR:
            embeds_0 = table_ptr + tl.sum(tl.where(row == 0, token, 0), axis=0) * half
            embeds_1 = table_ptr + tl.sum(tl.where(row == 1, token, 0), axis=0) * half
            other_scale_0 = tl.sum(tl.where(row == 0, other_scale, 0.0), axis=0)
            other_scale_1 = tl.sum(tl.where(row == 1, other_scale, 0.0), axis=0)
        sums_0 = tl.zeros([BLOCK_N, BLOCK_K], tl.float32)
        sums_1 = tl.zeros([BLOCK_N, BLOCK_K], tl.float32)
        up_sums_0 = tl.zeros([BLOCK_N, BLOCK_K], tl.float32)
        up_sums_1 = tl.zeros([BLOCK_N, BLOCK_K], tl.float32)
        for start in tl.range(begin, end, BLOCK_K, num_stages=STAGES):
            k = start + column
            is_k = k < num_inputs  # only the last part can end inside a block
            weight = _weight_tile(weight_ptr, n, is_n, k, is_k, weight_stride).to(tl.float32)
            if PAIR:
                x_0 = row_of_pair(
                    x_ptr, embeds_0, norm_ptr, other_norm_ptr, k, is_k, half, scale_0,
                    other_scale_0, HIDDEN_FIRST,
                )  # fmt: skip
            elif JOINS > 0:
                x_0 = row_of_parts(
                    x_ptr, lse_ptr, 0, k, is_k, num_parts, num_query, GROUP, NUM_KV, D, JOINS,
                    dtype,
                )  # fmt: skip
            else:
                x_0 = _row_of_x(x_ptr, norm_ptr, k, is_k, scale_0, NORM)
            sums_0 += weight * x_0[None, :]
            if ROWS > 1:
                if PAIR:
                    x_1 = row_of_pair(
                        x_ptr + x_stride, embeds_1, norm_ptr, other_norm_ptr, k,
                        is_k & (num_rows > 1), half, scale_1, other_scale_1, HIDDEN_FIRST,
                    )  # fmt: skip
                elif JOINS > 0:
                    x_1 = row_of_parts(
                        x_ptr, lse_ptr, 1, k, is_k & (num_rows > 1), num_parts, num_query,
                        GROUP, NUM_KV, D, JOINS, dtype,
                    )  # fmt: skip
                else:
                    x_1 = _row_of_x(
                        x_ptr + x_stride, norm_ptr, k, is_k & (num_rows > 1), scale_1, NORM
                    )
                sums_1 += weight * x_1[None, :]
            if TWO:
                up_weight = _weight_tile(weight_ptr, n + apart, is_n, k, is_k, weight_stride).to(
                    tl.float32
                )
                up_sums_0 += up_weight * x_0[None, :]
                if ROWS > 1:
                    up_sums_1 += up_weight * x_1[None, :]
        value = tl.where(
            row[:, None] == 0, tl.sum(sums_0, axis=1)[None, :], tl.sum(sums_1, axis=1)[None, :]
        )
        up = value
        if TWO:
            up = tl.where(
                row[:, None] == 0,
                tl.sum(up_sums_0, axis=1)[None, :],
                tl.sum(up_sums_1, axis=1)[None, :],
            )
    else:
        if PAIRED:
            sums = tl.zeros([2 * BLOCK_N, ROWS], tl.float32)
        elif WAY == "weights_first":
            sums = tl.zeros([BLOCK_N, ROWS], tl.float32)
        else:
            sums = tl.zeros([ROWS, BLOCK_N], tl.float32)
        up_sums = sums
        for start in tl.range(begin, end, BLOCK_K, num_stages=STAGES):
            k = start + column
            is_k = k < num_inputs  # only the last part can end inside a block
            if PAIRED:
                weight = _weight_tile(weight_ptr, pair_row, is_pair, k, is_k, weight_stride)
            else:
                weight = _weight_tile(weight_ptr, n, is_n, k, is_k, weight_stride)
            if PAIR:
                x = rows_of_pair(
                    x_ptr + row * x_stride, embeds, norm_ptr, other_norm_ptr, is_row, k, is_k,
                    half, scale, other_scale, HIDDEN_FIRST,
                )  # fmt: skip
            elif JOINS > 0:
                x = rows_of_parts(
                    x_ptr, lse_ptr, row, is_row, start, k, is_k, num_parts, num_query, GROUP,
                    NUM_KV, D, JOINS, BLOCK_K, dtype,
                )  # fmt: skip
            else:
                x = _rows_of_x(x_ptr, norm_ptr, row, is_row, k, is_k, x_stride, scale, NORM)
            if WAY == "weights_first":
                sums = tl.dot(weight, tl.trans(x), sums, input_precision="ieee")
            else:
                sums = tl.dot(x, tl.trans(weight), sums, input_precision="ieee")
                if TWO:
                    up_weight = _weight_tile(weight_ptr, n + apart, is_n, k, is_k, weight_stride)
                    up_sums = tl.dot(x, tl.trans(up_weight), up_sums, input_precision="ieee")
        if PAIRED:
            both = tl.reshape(tl.trans(sums), (ROWS, 2, BLOCK_N))
            value, up = tl.split(tl.permute(both, (0, 2, 1)))
        elif WAY == "weights_first":
            value, up = tl.trans(sums), tl.trans(sums)
        else:
            value, up = sums, up_sums

    if SPLIT == 1:
        _finish(
            value, up, residual_ptr, out_ptr, out_squares_ptr, best_ids_ptr,
            cos_ptr, sin_ptr, positions_ptr, slots_ptr, keys_ptr, values_ptr, bias_ptr,
            query_norm_ptr, key_norm_ptr, head_eps,
            row, is_row, n, is_n, tile, num_tiles, residual_stride, out_stride, dtype,
            RESIDUAL, GATED, BEST, HEADS, NUM_KV, D, BIAS, HEAD_NORM,
        )  # fmt: skip
    else:
        halves: tl.constexpr = 2 if GATED else 1
        is_out = is_row[:, None] & is_n[None, :]
        place = row[:, None] * (num_outputs * halves) + n[None, :]
        part_size = ROWS * num_outputs * halves
        mine = parts_ptr + tl.program_id(1) * part_size
        tl.store(mine + place, value, mask=is_out)
        if TWO:
            tl.store(mine + apart + place, up, mask=is_out)
        tl.debug_barrier()  # the whole part is written before it is announced
        if tl.atomic_add(arrived_ptr + tile, 1, sem="acq_rel") == SPLIT - 1:
            whole = _add_parts(parts_ptr, place, is_out, part_size, SPLIT)
            whole_up = whole
            if TWO:
                whole_up = _add_parts(parts_ptr, apart + place, is_out, part_size, SPLIT)
            _finish(
                whole, whole_up, residual_ptr, out_ptr, out_squares_ptr, best_ids_ptr,
                cos_ptr, sin_ptr, positions_ptr, slots_ptr, keys_ptr, values_ptr, bias_ptr,
                query_norm_ptr, key_norm_ptr, head_eps,
                row, is_row, n, is_n, tile, num_tiles, residual_stride, out_stride, dtype,
                RESIDUAL, GATED, BEST, HEADS, NUM_KV, D, BIAS, HEAD_NORM,
            )  # fmt: skip
            tl.store(arrived_ptr + tile, 0)


def _check(name: str, tensor: Tensor, shape: tuple[int, int]) -> None:
    if tensor.shape != shape:
        raise ValueError(f"{name} must be {list(shape)}, got {list(tensor.shape)}")
    if tensor.stride(1) != 1:
        raise ValueError(f"the columns of {name} must be adjacent, got strides {tensor.stride()}")


def _launch(
    x: Tensor | Pair | AttendedParts,
    weight: Tensor,
    out: Tensor | None,
    *,
    plan: Plan | None,
    scratch: Scratch | None,
    norm: Norm | None = None,
    squares_MP: Tensor | None = None,
    residual: Tensor | None = None,
    gated: bool = False,
    to: HeadPlaces | None = None,
    best: BestParts | None = None,
    overlap: bool = False,
    pinned: bool = False,
    joined: bool = False,
) -> Tensor | None:
    """Launch the kernel; returns the squares of ``out`` if there is a residual."""
    rows_in = _rows_in(x, norm, squares_MP)
    num_rows, num_inputs = rows_in.num_rows, weight.shape[1]
    num_outputs = len(weight) // (1 + gated)
    if rows_in.num_inputs is not None:
        num_inputs = rows_in.num_inputs
    _check("weight", weight, (num_outputs * (1 + gated), num_inputs))
    if out is not None and to is None:
        _check("out", out, (num_rows, num_outputs))
    if pinned:
        plan = pinned_plan(num_outputs, num_inputs, gated, weight.element_size())
    in_blocks = plan is not None and plan.rows is not None
    if num_rows < 1 or (num_rows > MAX_ROWS and not in_blocks):
        raise ValueError(f"x must have 1..{MAX_ROWS} rows, got {num_rows}")
    if weight.dtype != rows_in.dtype:
        raise ValueError(f"x is {rows_in.dtype}, the weight {weight.dtype}; they must be the same")
    half = 0 if to is None else to.keys.shape[2] // 2
    if plan is None:
        plan = choose_plan(num_rows, num_outputs, num_inputs, gated, weight.element_size())
        if joined or to is not None:
            is_whole = to is not None and to.heads.query_norm is not None
            plan = choose_joined_plan(
                num_rows,
                num_outputs,
                num_inputs,
                gated,
                weight.element_size(),
                half,
                is_whole,
                0 if rows_in.parts is None else rows_in.parts.mixed.shape[-1],
            )
        plan = plan if scratch is not None else replace(plan, split=1)
    if plan.way == "multiply":
        if num_rows > 2 or plan.split > 1 or in_blocks:
            raise ValueError(f"'multiply' takes 1..2 rows and no split, got {num_rows}, {plan}")
        rows = num_rows
    else:
        rows = _padded(num_rows if plan.rows is None else plan.rows)
    if in_blocks and plan.split > 1:
        raise ValueError(f"blocks of rows share no scratch: split must be 1, got {plan}")
    tiles = triton.cdiv(num_outputs, plan.block_n)
    if to is not None:
        _check_heads(to, num_rows, num_outputs, plan)
        tiles = num_outputs // (2 * plan.block_n)
    if best is not None and best.tops_MP.shape[1] != tiles:
        raise ValueError(f"there are {tiles} tiles, and places for {best.tops_MP.shape[1]}")
    if plan.split > 1:
        if scratch is None:
            raise ValueError(f"{plan} needs scratch")
        held = (scratch.parts.numel(), scratch.arrived.numel())
        needed = _scratch_needed(plan, num_rows, num_outputs, gated)
        if held[0] < needed[0] or held[1] < tiles:
            raise ValueError(
                f"scratch holds {held[0]} sums and {held[1]} tiles; "
                f"{plan} needs {needed[0]} and {tiles}"
            )
    squares = None
    if residual is not None:
        _check("residual", residual, (num_rows, num_outputs))
        squares = torch.empty(num_rows, tiles, dtype=torch.float32, device=weight.device)
    is_small = joined or to is not None or rows_in.pair is not None
    nothing = rows_in.rows  # placeholder for pointers that are not read
    pair, heads = rows_in.pair, None if to is None else to.heads
    query_norm = None if heads is None else heads.query_norm
    key_norm = None if heads is None else heads.key_norm
    bias = None if heads is None else heads.bias_C
    parts = rows_in.parts
    head_dim = parts.mixed.shape[-1] if parts is not None else 2 * half
    _few_rows[(tiles, plan.split, triton.cdiv(num_rows, rows))](
        rows_in.rows, weight,
        nothing if rows_in.norm is None else rows_in.norm.weight_K,
        nothing if rows_in.squares is None else rows_in.squares,
        nothing if residual is None else residual,
        nothing if out is None else out,
        squares if squares is not None else nothing if best is None else best.tops_MP,
        nothing if scratch is None else scratch.parts,
        nothing if scratch is None else scratch.arrived,
        None if pair is None else pair.ids_M,
        None if pair is None else pair.table_VH,
        None if pair is None else pair.embed_norm.weight_K,
        0.0 if pair is None else pair.embed_norm.eps,
        None if parts is None else parts.lse,
        None if best is None else best.ids_MP,
        *((None,) * 6 if to is None else (
            to.table.cos, to.table.sin, to.positions_T, to.slots_T, to.keys, to.values,
        )),
        bias,
        None if query_norm is None else query_norm.weight_K,
        None if key_norm is None else key_norm.weight_K,
        0.0 if query_norm is None else query_norm.eps,
        num_rows, num_outputs, num_inputs, rows_in.num_parts,
        1 if parts is None else parts.num_query,
        0.0 if rows_in.norm is None else rows_in.norm.eps,
        rows_in.stride, weight.stride(0), 0 if residual is None else residual.stride(0),
        0 if out is None or to is not None else out.stride(0),
        ROWS=rows, BLOCK_N=plan.block_n, BLOCK_K=plan.block_k, SPLIT=plan.split,
        STAGES=plan.num_stages, AHEAD=_blocks_ahead(num_inputs, plan, is_small), WAY=plan.way,
        PARTS_UP=0 if rows_in.squares is None else triton.next_power_of_2(rows_in.num_parts),
        NORM=rows_in.norm is not None, RESIDUAL=residual is not None, GATED=gated, OVERLAP=overlap,
        FETCH=weight.is_cuda, BLOCKS=in_blocks,
        PAIR=pair is not None, HIDDEN_FIRST=pair is not None and pair.hidden_first,
        JOINS=0 if parts is None else triton.next_power_of_2(parts.num_parts),
        BEST=best is not None, HEADS=0 if heads is None else heads.num_query,
        NUM_KV=parts.num_kv if parts is not None else 0 if heads is None else heads.num_kv,
        D=head_dim, GROUP=1 if parts is None else parts.group,
        BIAS=bias is not None, HEAD_NORM=query_norm is not None,
        WIDE_K=_wide_k(rows, num_inputs if pair is None else num_inputs // 2, plan, is_small),
        num_warps=plan.num_warps, launch_pdl=overlap,
    )  # fmt: skip
    return squares


@dataclass(frozen=True, slots=True)
class _RowsIn:
    """What a product multiplies."""

    rows: Tensor
    """x, hidden states, or parts of attention."""
    num_rows: int
    num_inputs: int | None
    dtype: torch.dtype
    stride: int = 0
    norm: Norm | None = None
    squares: Tensor | None = None
    num_parts: int = 0
    """Of the rows' squares, or of attention."""
    pair: Pair | None = None
    parts: AttendedParts | None = None


def _rows_in(
    x: Tensor | Pair | AttendedParts, norm: Norm | None, squares_MP: Tensor | None
) -> _RowsIn:
    if isinstance(x, AttendedParts):
        if norm is not None:
            raise ValueError("parts of attention have no norm")
        return _RowsIn(
            x.mixed, x.num_rows, x.num_heads * x.mixed.shape[-1], x.dtype,
            num_parts=x.num_parts, parts=x,
        )  # fmt: skip
    pair = None
    if isinstance(x, Pair):
        if norm is not None or squares_MP is not None:
            raise ValueError("a pair has norms and squares of its own")
        pair, norm, squares_MP = x, x.hidden_norm, x.squares_MP
        x = pair.hidden_MH
        _check("hidden", x, (len(pair.ids_M), pair.table_VH.shape[1]))
        if not (pair.table_VH.is_contiguous() and pair.ids_M.is_contiguous()):
            raise ValueError("ids and table must be contiguous")
        if x.dtype != pair.table_VH.dtype:
            raise ValueError(f"hidden is {x.dtype}, the table {pair.table_VH.dtype}")
    num_rows, width = x.shape
    if pair is None:
        _check("x", x, (num_rows, width))
    if squares_MP is not None and not squares_MP.is_contiguous():
        raise ValueError("squares must be contiguous")
    num_parts = 0 if squares_MP is None else squares_MP.shape[1]
    num_inputs = width if pair is None else 2 * width
    return _RowsIn(x, num_rows, num_inputs, x.dtype, x.stride(0), norm, squares_MP, num_parts, pair)


def _blocks_ahead(num_inputs: int, plan: Plan, is_small: bool) -> int:
    """Blocks of the weight that are fetched while the previous kernel ends: those that are in
    flight at first, or, in a small product, all of a program's."""
    if not is_small:
        return plan.num_stages
    return min(int(triton.cdiv(num_inputs, plan.block_k * plan.split)), _MOST_AHEAD)


def _wide_k(rows: int, num_inputs: int, plan: Plan, is_wide: bool) -> int:
    """Columns of which squares are summed at once. A block's, or, where launches count, as many as
    registers hold: each further read of a row waits for the one before."""
    if not is_wide:
        return plan.block_k
    return min(_up(num_inputs), max(16, _WIDE_ELEMENTS // rows))


def _check_heads(to: HeadPlaces, num_rows: int, num_outputs: int, plan: Plan) -> None:
    heads, head_dim = to.heads, to.keys.shape[2]
    num_heads = heads.num_query + 2 * heads.num_kv
    if num_outputs != num_heads * head_dim:
        raise ValueError(
            f"the weight must have rows of {num_heads} heads of {head_dim}, got {num_outputs}"
        )
    if head_dim < 4 or head_dim & (head_dim - 1):
        raise ValueError(
            f"the head dimension must be a power of two and at least 4, got {head_dim}"
        )
    if (heads.query_norm is None) != (heads.key_norm is None):
        raise ValueError("query_norm and key_norm must be given together")
    pairs = head_dim // 2
    if pairs % plan.block_n or (heads.query_norm is not None and plan.block_n != pairs):
        raise ValueError(f"a tile of {plan} does not fit heads of {head_dim}")
    query_norm, key_norm = heads.query_norm, heads.key_norm
    if query_norm is not None and key_norm is not None and query_norm.eps != key_norm.eps:
        raise ValueError(f"both norms must have one eps, got {query_norm.eps} and {key_norm.eps}")
    held = {
        "keys": to.keys, "values": to.values, "positions": to.positions_T, "slots": to.slots_T,
        "cos": to.table.cos, "sin": to.table.sin,
    }  # fmt: skip
    for name, tensor in held.items():
        if not tensor.is_contiguous():
            raise ValueError(f"{name} must be contiguous, got strides {tensor.stride()}")
    if len(to.positions_T) != num_rows or len(to.slots_T) != num_rows:
        raise ValueError(f"positions and slots must be of {num_rows} rows")


def few_row_linear(
    x: Tensor | Pair,
    weight_NK: Tensor,
    norm: Norm | None = None,
    squares_MP: Tensor | None = None,
    *,
    gated: bool = False,
    out: Tensor | None = None,
    plan: Plan | None = None,
    scratch: Scratch | None = None,
    overlap: bool = False,
    pinned: bool = False,
    joined: bool = False,
) -> Tensor:
    """See ``specops.joined.few_row_linear``, which has the same arguments and result.

    Args:
        x: M rows, 1 <= M <= 64; any M if pinned.
        plan: ``None``: ``choose_plan``'s, without a split if there is no scratch.
        scratch: needed by plans that split columns.
        overlap: start while the previous kernel still runs (``specops.overlap_triton``).
        pinned: use ``pinned_plan``: a row's result does not depend on the other rows.
        joined: the plan is ``choose_joined_plan``'s.

    Raises:
        ValueError: wrong shape, dtype or memory layout, or an unsuitable plan.
    """
    if out is None:
        num_rows = len(x.ids_M if isinstance(x, Pair) else x)
        out = weight_NK.new_empty(num_rows, len(weight_NK) // (1 + gated))
    _launch(
        x, weight_NK, out, plan=plan, scratch=scratch, norm=norm, squares_MP=squares_MP,
        gated=gated, overlap=overlap, pinned=pinned, joined=joined,
    )  # fmt: skip
    return out


def few_row_residual(
    x: Tensor | AttendedParts,
    weight_NK: Tensor,
    residual_MN: Tensor,
    out: Tensor | None = None,
    *,
    plan: Plan | None = None,
    scratch: Scratch | None = None,
    overlap: bool = False,
    pinned: bool = False,
    joined: bool = False,
) -> tuple[Tensor, Tensor]:
    """See ``specops.joined.few_row_residual``, and ``few_row_linear`` for the other arguments."""
    if out is None:
        out = weight_NK.new_empty(residual_MN.shape)
    squares = _launch(
        x, weight_NK, out, plan=plan, scratch=scratch, residual=residual_MN, overlap=overlap,
        pinned=pinned, joined=joined,
    )  # fmt: skip
    assert squares is not None
    return out, squares


def few_row_heads(
    x: Tensor | Pair,
    weight_CK: Tensor,
    to: HeadPlaces,
    norm: Norm | None = None,
    squares_MP: Tensor | None = None,
    *,
    plan: Plan | None = None,
    scratch: Scratch | None = None,
    overlap: bool = False,
) -> Tensor:
    """See ``specops.joined.few_row_heads``, and ``few_row_linear`` for the other arguments.

    Raises:
        ValueError: also for what ``specops.rope_triton.rope_and_write`` refuses.
    """
    num_rows = len(x.ids_M if isinstance(x, Pair) else x)
    q = weight_CK.new_empty(num_rows, to.heads.num_query, to.keys.shape[2])
    _launch(
        x, weight_CK, q, plan=plan, scratch=scratch, norm=norm, squares_MP=squares_MP, to=to,
        overlap=overlap,
    )  # fmt: skip
    return q


def few_row_best(
    x_MK: Tensor,
    weight_NK: Tensor,
    norm: Norm | None = None,
    squares_MP: Tensor | None = None,
    *,
    plan: Plan | None = None,
    scratch: Scratch | None = None,
    overlap: bool = False,
) -> BestParts:
    """See ``specops.joined.few_row_best``, and ``few_row_linear`` for the other arguments. A part
    is a tile."""
    num_rows, num_outputs = len(x_MK), len(weight_NK)
    if plan is None:
        itemsize = weight_NK.element_size()
        plan = choose_joined_plan(num_rows, num_outputs, weight_NK.shape[1], False, itemsize)
        plan = plan if scratch is not None else replace(plan, split=1)
    shape = (num_rows, triton.cdiv(num_outputs, plan.block_n))
    tops = torch.empty(shape, dtype=torch.float32, device=weight_NK.device)
    best = BestParts(tops, torch.empty(shape, dtype=torch.int32, device=weight_NK.device))
    _launch(
        x_MK, weight_NK, None, plan=plan, scratch=scratch, norm=norm, squares_MP=squares_MP,
        best=best, overlap=overlap, joined=True,
    )  # fmt: skip
    return best
