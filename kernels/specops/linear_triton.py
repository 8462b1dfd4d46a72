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

from specops.linear import Norm
from specops.overlap_triton import fetch_into_l2, let_next_start, wait_for_previous

MAX_ROWS = 64
_PINNED_ROWS = 16
_PROGRAMS = 264
"""Target number of programs: two for each multiprocessor of an H100 or H200."""
_MAX_SPLIT = 16
_LINE_BYTES = 128
_SHARED_BYTES = 100 << 10
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
    products: Iterable[tuple[int, int, bool]], dtype: torch.dtype, device: torch.device
) -> Scratch:
    """Scratch for the plans of some products, each given as (N, K, is gated)."""
    needs = [(1, 1)]
    for num_outputs, num_inputs, gated in products:
        for num_rows in range(1, MAX_ROWS + 1):
            plan = choose_plan(num_rows, num_outputs, num_inputs, gated, dtype.itemsize)
            needs.append(_scratch_needed(plan, num_rows, num_outputs, gated))
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
    value, up, residual_ptr, out_ptr, out_squares_ptr,
    row, is_row, n, is_n, tile, num_tiles, residual_stride, out_stride, dtype: tl.constexpr,
    RESIDUAL: tl.constexpr, GATED: tl.constexpr,
):  # fmt: skip
    """Round the product to ``dtype``, as a separate product would be, then apply what follows."""
    is_out = is_row[:, None] & is_n[None, :]
    value = value.to(dtype)
    if GATED:
        gate = value.to(tl.float32)
        gate = (gate / (1.0 + tl.exp(-gate))).to(dtype)
        value = (gate.to(tl.float32) * up.to(dtype).to(tl.float32)).to(dtype)
    if RESIDUAL:
        at = residual_ptr + row[:, None] * residual_stride + n[None, :]
        before = tl.load(at, mask=is_out, other=0.0)
        value = (before.to(tl.float32) + value.to(tl.float32)).to(dtype)
        wide = tl.where(is_out, value.to(tl.float32), 0.0)
        tl.store(out_squares_ptr + row * num_tiles + tile, tl.sum(wide * wide, axis=1), mask=is_row)
    at = out_ptr + row[:, None] * out_stride + n[None, :]
    tl.store(at, value.to(out_ptr.dtype.element_ty), mask=is_out)


@triton.jit(do_not_specialize=["num_rows", "num_parts"])
def _few_rows(
    x_ptr, weight_ptr, norm_ptr, squares_ptr, residual_ptr, out_ptr, out_squares_ptr,
    parts_ptr, arrived_ptr,
    num_rows, num_outputs, num_inputs, num_parts, eps,
    x_stride, weight_stride, residual_stride, out_stride,
    ROWS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, SPLIT: tl.constexpr,
    STAGES: tl.constexpr, WAY: tl.constexpr, PARTS_UP: tl.constexpr,
    NORM: tl.constexpr, RESIDUAL: tl.constexpr, GATED: tl.constexpr, OVERLAP: tl.constexpr,
    FETCH: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    """One tile of BLOCK_N outputs for all rows or a block of them, or a partial sum (SPLIT)."""
    tile, num_tiles = tl.program_id(0), tl.num_programs(0)
    row = tl.arange(0, ROWS)
    if BLOCKS:
        row += tl.program_id(2) * ROWS
    is_row = row < num_rows
    n = tile * BLOCK_N + tl.arange(0, BLOCK_N)
    is_n = n < num_outputs
    # Gate and up form one operand: 64 rows instead of twice 32.
    PAIRED: tl.constexpr = GATED and WAY == "weights_first"
    pair = tl.arange(0, 2 * BLOCK_N)
    pair_n = tile * BLOCK_N + pair % BLOCK_N
    is_pair = pair_n < num_outputs
    pair_row = pair_n + (pair // BLOCK_N) * num_outputs
    column = tl.arange(0, BLOCK_K)
    steps = tl.cdiv(num_inputs, BLOCK_K * SPLIT)
    begin = tl.program_id(1) * steps * BLOCK_K
    end = tl.minimum(begin + steps * BLOCK_K, num_inputs)

    if OVERLAP:
        let_next_start()
    if FETCH:  # the first blocks, while the previous kernel ends and the rows' squares are summed
        LINE: tl.constexpr = 1024 // weight_ptr.dtype.element_ty.primitive_bitwidth
        LINES: tl.constexpr = BLOCK_K // LINE if BLOCK_K > LINE else 1
        line = tl.arange(0, LINES) * LINE
        first = weight_ptr + tl.minimum(n, num_outputs - 1).to(tl.int64)[:, None] * weight_stride
        for step in tl.static_range(STAGES):
            ahead = tl.minimum(begin + step * BLOCK_K + line, num_inputs - 1)
            fetch_into_l2(first + ahead[None, :])
            if GATED:
                fetch_into_l2(first + num_outputs.to(tl.int64) * weight_stride + ahead[None, :])
    if OVERLAP:
        wait_for_previous()

    scale = tl.zeros([ROWS], tl.float32)
    if NORM:
        squares = _row_squares(
            x_ptr, squares_ptr, row, is_row, num_inputs, num_parts, x_stride,
            ROWS, BLOCK_K, PARTS_UP,
        )  # fmt: skip
        scale = tl.rsqrt(squares / num_inputs + eps)

    if WAY == "multiply":
        scale_0 = tl.sum(tl.where(row == 0, scale, 0.0), axis=0)
        scale_1 = tl.sum(tl.where(row == 1, scale, 0.0), axis=0)
        sums_0 = tl.zeros([BLOCK_N, BLOCK_K], tl.float32)
        sums_1 = tl.zeros([BLOCK_N, BLOCK_K], tl.float32)
        up_sums_0 = tl.zeros([BLOCK_N, BLOCK_K], tl.float32)
        up_sums_1 = tl.zeros([BLOCK_N, BLOCK_K], tl.float32)
        for start in tl.range(begin, end, BLOCK_K, num_stages=STAGES):
            k = start + column
            is_k = k < num_inputs  # only the last part can end inside a block
            weight = _weight_tile(weight_ptr, n, is_n, k, is_k, weight_stride).to(tl.float32)
            x_0 = _row_of_x(x_ptr, norm_ptr, k, is_k, scale_0, NORM)
            sums_0 += weight * x_0[None, :]
            if ROWS > 1:
                x_1 = _row_of_x(x_ptr + x_stride, norm_ptr, k, is_k & (num_rows > 1), scale_1, NORM)
                sums_1 += weight * x_1[None, :]
            if GATED:
                up_weight = _weight_tile(
                    weight_ptr, n + num_outputs, is_n, k, is_k, weight_stride
                ).to(tl.float32)
                up_sums_0 += up_weight * x_0[None, :]
                if ROWS > 1:
                    up_sums_1 += up_weight * x_1[None, :]
        value = tl.where(
            row[:, None] == 0, tl.sum(sums_0, axis=1)[None, :], tl.sum(sums_1, axis=1)[None, :]
        )
        up = value
        if GATED:
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
            x = _rows_of_x(x_ptr, norm_ptr, row, is_row, k, is_k, x_stride, scale, NORM)
            if WAY == "weights_first":
                sums = tl.dot(weight, tl.trans(x), sums, input_precision="ieee")
            else:
                sums = tl.dot(x, tl.trans(weight), sums, input_precision="ieee")
                if GATED:
                    up_weight = _weight_tile(
                        weight_ptr, n + num_outputs, is_n, k, is_k, weight_stride
                    )
                    up_sums = tl.dot(x, tl.trans(up_weight), up_sums, input_precision="ieee")
        if PAIRED:
            both = tl.reshape(tl.trans(sums), (ROWS, 2, BLOCK_N))
            value, up = tl.split(tl.permute(both, (0, 2, 1)))
        elif WAY == "weights_first":
            value, up = tl.trans(sums), tl.trans(sums)
        else:
            value, up = sums, up_sums

    dtype: tl.constexpr = x_ptr.dtype.element_ty
    if SPLIT == 1:
        _finish(
            value, up, residual_ptr, out_ptr, out_squares_ptr,
            row, is_row, n, is_n, tile, num_tiles, residual_stride, out_stride, dtype,
            RESIDUAL, GATED,
        )  # fmt: skip
    else:
        halves: tl.constexpr = 2 if GATED else 1
        is_out = is_row[:, None] & is_n[None, :]
        place = row[:, None] * (num_outputs * halves) + n[None, :]
        part_size = ROWS * num_outputs * halves
        mine = parts_ptr + tl.program_id(1) * part_size
        tl.store(mine + place, value, mask=is_out)
        if GATED:
            tl.store(mine + num_outputs + place, up, mask=is_out)
        tl.debug_barrier()  # the whole part is written before it is announced
        if tl.atomic_add(arrived_ptr + tile, 1, sem="acq_rel") == SPLIT - 1:
            whole = _add_parts(parts_ptr, place, is_out, part_size, SPLIT)
            whole_up = whole
            if GATED:
                whole_up = _add_parts(parts_ptr, num_outputs + place, is_out, part_size, SPLIT)
            _finish(
                whole, whole_up, residual_ptr, out_ptr, out_squares_ptr,
                row, is_row, n, is_n, tile, num_tiles, residual_stride, out_stride, dtype,
                RESIDUAL, GATED,
            )  # fmt: skip
            tl.store(arrived_ptr + tile, 0)


def _check(name: str, tensor: Tensor, shape: tuple[int, int]) -> None:
    if tensor.shape != shape:
        raise ValueError(f"{name} must be {list(shape)}, got {list(tensor.shape)}")
    if tensor.stride(1) != 1:
        raise ValueError(f"the columns of {name} must be adjacent, got strides {tensor.stride()}")


def _launch(
    x_MK: Tensor,
    weight: Tensor,
    out: Tensor,
    *,
    plan: Plan | None,
    scratch: Scratch | None,
    norm: Norm | None = None,
    squares_MP: Tensor | None = None,
    residual: Tensor | None = None,
    gated: bool = False,
    overlap: bool = False,
    pinned: bool = False,
) -> Tensor | None:
    """Launch the kernel; returns the squares of ``out`` if there is a residual."""
    num_rows, num_inputs = x_MK.shape
    num_outputs = out.shape[1]
    _check("x", x_MK, (num_rows, num_inputs))
    _check("weight", weight, (num_outputs * (1 + gated), num_inputs))
    _check("out", out, (num_rows, num_outputs))
    if pinned:
        plan = pinned_plan(num_outputs, num_inputs, gated, x_MK.element_size())
    in_blocks = plan is not None and plan.rows is not None
    if num_rows < 1 or (num_rows > MAX_ROWS and not in_blocks):
        raise ValueError(f"x must have 1..{MAX_ROWS} rows, got {num_rows}")
    if weight.dtype != x_MK.dtype:
        raise ValueError(f"x is {x_MK.dtype}, the weight {weight.dtype}; they must be the same")
    if plan is None:
        plan = choose_plan(num_rows, num_outputs, num_inputs, gated, x_MK.element_size())
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
    if plan.split > 1:
        if scratch is None:
            raise ValueError(f"{plan} needs scratch")
        held = (scratch.parts.numel(), scratch.arrived.numel())
        needed = _scratch_needed(plan, num_rows, num_outputs, gated)
        if held[0] < needed[0] or held[1] < needed[1]:
            raise ValueError(
                f"scratch holds {held[0]} sums and {held[1]} tiles; "
                f"{plan} needs {needed[0]} and {needed[1]}"
            )
    squares = None
    if residual is not None:
        _check("residual", residual, (num_rows, num_outputs))
        squares = torch.empty(num_rows, tiles, dtype=torch.float32, device=x_MK.device)
    num_parts = 0 if squares_MP is None else squares_MP.shape[1]
    if squares_MP is not None and not squares_MP.is_contiguous():
        raise ValueError("squares must be contiguous")
    nothing = x_MK  # placeholder for pointers that are not read
    _few_rows[(tiles, plan.split, triton.cdiv(num_rows, rows))](
        x_MK, weight,
        nothing if norm is None else norm.weight_K,
        nothing if squares_MP is None else squares_MP,
        nothing if residual is None else residual,
        out,
        nothing if squares is None else squares,
        nothing if scratch is None else scratch.parts,
        nothing if scratch is None else scratch.arrived,
        num_rows, num_outputs, num_inputs, num_parts, 0.0 if norm is None else norm.eps,
        x_MK.stride(0), weight.stride(0), 0 if residual is None else residual.stride(0),
        out.stride(0),
        ROWS=rows, BLOCK_N=plan.block_n, BLOCK_K=plan.block_k, SPLIT=plan.split,
        STAGES=plan.num_stages, WAY=plan.way,
        PARTS_UP=triton.next_power_of_2(num_parts) if num_parts else 0,
        NORM=norm is not None, RESIDUAL=residual is not None, GATED=gated, OVERLAP=overlap,
        FETCH=x_MK.is_cuda, BLOCKS=in_blocks,
        num_warps=plan.num_warps, launch_pdl=overlap,
    )  # fmt: skip
    return squares


def few_row_linear(
    x_MK: Tensor,
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
) -> Tensor:
    """See ``specops.linear.few_row_linear``, which has the same arguments and result.

    Args:
        x_MK: [M, K], 1 <= M <= 64; any M if pinned.
        plan: ``None``: ``choose_plan``'s, without a split if there is no scratch.
        scratch: needed by plans that split columns.
        overlap: start while the previous kernel still runs (``specops.overlap_triton``).
        pinned: use ``pinned_plan``: a row's result does not depend on the other rows.

    Raises:
        ValueError: wrong shape, dtype or memory layout, or an unsuitable plan.
    """
    num_outputs = weight_NK.shape[0] // (1 + gated)
    if out is None:
        out = x_MK.new_empty(len(x_MK), num_outputs)
    _launch(
        x_MK, weight_NK, out, plan=plan, scratch=scratch, norm=norm, squares_MP=squares_MP,
        gated=gated, overlap=overlap, pinned=pinned,
    )  # fmt: skip
    return out


def few_row_residual(
    x_MK: Tensor,
    weight_NK: Tensor,
    residual_MN: Tensor,
    out: Tensor | None = None,
    *,
    plan: Plan | None = None,
    scratch: Scratch | None = None,
    overlap: bool = False,
    pinned: bool = False,
) -> tuple[Tensor, Tensor]:
    """See ``specops.linear.few_row_residual``, and ``few_row_linear`` for the other arguments."""
    if out is None:
        out = x_MK.new_empty(residual_MN.shape)
    squares = _launch(
        x_MK, weight_NK, out, plan=plan, scratch=scratch, residual=residual_MN, overlap=overlap,
        pinned=pinned,
    )  # fmt: skip
    assert squares is not None
    return out, squares
