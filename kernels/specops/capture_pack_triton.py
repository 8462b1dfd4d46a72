"""Packing committed rows into a ring in two launches; the definition is
``specops.capture_pack.pack_kept_rows``.

The first launch numbers the requests' rows; in the second, each program packs one vector. Neither
waits for the host, and rows that are not kept cost an early return.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from specops.capture_pack import PackRing, check_step


@triton.jit(do_not_specialize=["num_requests"])
def _number_rows(counts_ptr, next_ptr, starts_ptr, num_requests, BLOCK: tl.constexpr):
    """Number every request's first row and advance the counter."""
    # One warp, so that all threads have read the counter before it advances.
    request = tl.arange(0, BLOCK)
    is_request = request < num_requests
    count = tl.load(counts_ptr + request, mask=is_request, other=0).to(tl.int64)
    start = tl.load(next_ptr) + tl.cumsum(count, axis=0) - count
    tl.store(starts_ptr + request, start, mask=is_request)
    tl.store(next_ptr, tl.max(tl.where(is_request, start + count, 0), axis=0))


@triton.jit(do_not_specialize=["num_query", "capacity"])
def _pack_rows(
    features_ptr, hidden_ptr, counts_ptr, first_ptr, lanes_ptr, starts_ptr,
    rows_ptr, scales_ptr, ring_lanes_ptr, ring_positions_ptr,
    num_query, capacity, features_stride, hidden_stride,
    NUM_LAYERS: tl.constexpr, H: tl.constexpr, BLOCK: tl.constexpr, IS_FP8: tl.constexpr,
    ROUND_FIRST: tl.constexpr,
):  # fmt: skip
    """Pack one vector of one row."""
    vector, row = tl.program_id(0), tl.program_id(1)
    request, query = row // num_query, row % num_query
    if query >= tl.load(counts_ptr + request):
        return
    at = (tl.load(starts_ptr + request) + query) % capacity
    i = tl.arange(0, BLOCK)
    if vector < NUM_LAYERS:
        source = features_ptr + row.to(tl.int64) * features_stride + vector * H
    else:
        source = hidden_ptr + row.to(tl.int64) * hidden_stride
    x = tl.load(source + i, mask=i < H, other=0.0)
    whole = at * (NUM_LAYERS + 1) + vector
    target = rows_ptr + whole * H + i
    if IS_FP8:
        wide = x.to(tl.float32)
        # IEEE division: the plain operator may be off by 2 units in the last place.
        scale = tl.div_rn(tl.max(tl.abs(wide), axis=0), 448.0)
        scale = tl.maximum(scale, 1e-12)
        y = tl.div_rn(wide, scale)
        if ROUND_FIRST:
            y = _rounded_to_e4m3(y)
        tl.store(target, y.to(tl.float8e4nv), mask=i < H)
        tl.store(scales_ptr + whole, scale)
    else:
        tl.store(target, x, mask=i < H)
    if vector == NUM_LAYERS:
        tl.store(ring_lanes_ptr + at, tl.load(lanes_ptr + request))
        tl.store(ring_positions_ptr + at, tl.load(first_ptr + request) + query)


@triton.jit
def _rounded_to_e4m3(y):
    """The nearest float8_e4m3fn value, ties to even, as float32.

    Triton's interpreter truncates where a GPU rounds, but leaves a rounded value unchanged.
    """
    bits = y.to(tl.int32, bitcast=True)
    normal = (bits + 0x7FFFF + ((bits >> 20) & 1)) & -0x100000
    # Below 2^-6 the spacing is 2^-9, that of a float32 around 1.5 * 2^14.
    small = (y + 24576.0) - 24576.0
    return tl.where(tl.abs(y) < 0.015625, small, normal.to(tl.float32, bitcast=True))


def pack_kept_rows(
    features_TmH: Tensor,
    hidden_TH: Tensor,
    counts_R: Tensor,
    first_R: Tensor,
    lanes_R: Tensor,
    ring: PackRing,
) -> None:
    """See ``specops.capture_pack.pack_kept_rows``, which has the same arguments; never waits.

    Raises:
        ValueError: see ``check_step``; or vectors are not contiguous, or ``counts_R``,
            ``first_R`` or ``lanes_R`` is not contiguous int32.
    """
    num_query = check_step(features_TmH, hidden_TH, counts_R, ring)
    num_rows, num_layers, hidden_size = features_TmH.shape
    if features_TmH.stride()[1:] != (hidden_size, 1) or hidden_TH.stride(1) != 1:
        raise ValueError("the vectors of a row must be adjacent")
    held = (counts_R, first_R, lanes_R)
    if not all(t.dtype == torch.int32 and t.is_contiguous() for t in held):
        raise ValueError("counts, first and lanes must be contiguous int32")
    starts = torch.empty(len(counts_R), dtype=torch.int64, device=counts_R.device)
    _number_rows[(1,)](
        counts_R, ring.next_1, starts, len(counts_R),
        BLOCK=max(256, triton.next_power_of_2(len(counts_R))), num_warps=1,
    )  # fmt: skip
    block = triton.next_power_of_2(hidden_size)
    _pack_rows[(num_layers + 1, num_rows)](
        features_TmH, hidden_TH, counts_R, first_R, lanes_R, starts,
        ring.rows, ring.lanes if ring.scales is None else ring.scales, ring.lanes, ring.positions,
        num_query, len(ring.rows), features_TmH.stride(0), hidden_TH.stride(0),
        NUM_LAYERS=num_layers, H=hidden_size, BLOCK=block, IS_FP8=ring.scales is not None,
        ROUND_FIRST=hidden_TH.device.type != "cuda", num_warps=max(1, min(8, block // 1024)),
    )  # fmt: skip
