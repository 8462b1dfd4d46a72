"""Paged attention of a few new tokens as fused kernels; the definitions are ``attend_pages``,
``write_rows`` and ``places_of`` in ``specops.attention``.

Every program processes one request, one key head and one part of its keys. The request's query rows
and the query heads that share the key head form one tile, so each key is read once. Keys are split
so that even few requests fill the GPU; a second kernel combines the parts (Dao et al. 2023,
Flash-Decoding).

Shapes: T packed rows, R requests of Q query rows each, S keys, Hq/Hkv heads, G = Hq / Hkv,
D head dimension (a power of two, at least 16).
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from specops.attention import DecodePass, Places, check_window
from specops.overlap_triton import let_next_start, wait_for_previous

_MULTIPROCESSORS = 132
"""On an H100 or H200. The numbers below are for an H200. Together with a pass's fixed costs they
predict 92 measured configurations of equally long requests to within 3 % (13 % at worst)."""
_BYTES_PER_US = 4.29e6
"""Bandwidth of all multiprocessors together, reading keys and values."""
_PROGRAM_BYTES_PER_US = 27e3
"""Bandwidth of one program alone on its multiprocessor, bound by latency."""
_CROWDED = 0.82
"""Share of that bandwidth left when programs share multiprocessors, also in an uneven last wave."""
_START_US = 1.7
"""Time until a program's first block has arrived."""
_JOIN_US = 2.0
_JOIN_BYTES_PER_US = 3.2e6
"""Bandwidth of writing the parts and reading them back."""
_UNEQUAL = 0.56
"""Mean over maximum length, for lengths spread evenly between an eighth of the maximum and all of
it."""
_LAST = 0.2
"""Share of the longest part's time during which the GPU is nearly idle if lengths are unequal;
simulated at these speeds, not measured."""
_USUAL_CONTEXTS = (2048, 8192, 32768)
"""Assumed context lengths, limited by the page table's width, the longest possible context."""
_LOG2_E = 1.4426950408889634
_PART_KEYS = 128
"""Minimum keys per part: below this, joining costs more than it saves."""
_MAX_PARTS = 32
"""One request with 32,768 keys takes 46.3 us in 32 parts, 50.5 in 36, 48.0 in 64; one with 2,048 in
a table for 40,960 takes 9.9 us in 32 parts and 11.5 in 36
(``benchmarks/results/ops_attention_sweep_rounds.json``).
"""
_TILE_BYTES = 16 << 10
"""Size of one block of keys. With two blocks each of keys and values in flight this makes 64 KB, so
three programs of 16 rows, or two of more rows, fit on a multiprocessor, which needs about 30 KB in
flight for its share of the bandwidth."""
_TILE_OUTPUTS = 1 << 14
"""Maximum float32 outputs of one tile: 64 registers per thread of eight warps."""
_PLACE_ROWS = 128
"""Rows per program of ``places_of``."""


@dataclass(frozen=True, slots=True)
class Tiling:
    """Block sizes of one program."""

    rows: int
    """Query rows times query heads that share a key head."""
    keys: int
    """Keys per block."""
    num_warps: int
    num_stages: int = 3
    """Blocks in flight, including the one being multiplied."""


@triton.jit
def _span(
    first_ptr, counts_ptr, request, num_query, num_parts, num_keys, window,
    KEYS: tl.constexpr, PART_KEYS: tl.constexpr, HAS_COUNTS: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
):  # fmt: skip
    """(Position of row 0, rows that are not padding, first key, last key + 1, keys per part)."""
    first = tl.load(first_ptr + request)
    count = num_query
    if HAS_COUNTS:
        count = tl.minimum(tl.load(counts_ptr + request), num_query)
    begin = 0
    if HAS_WINDOW:
        begin = tl.maximum(first - window + 1, 0) // KEYS * KEYS
    end = tl.where(count > 0, tl.minimum(first + count, num_keys), 0)
    length = tl.maximum(end - begin, 0)
    blocks = (length + num_parts * KEYS - 1) // (num_parts * KEYS)
    return first, count, begin, end, tl.maximum(blocks * KEYS, PART_KEYS)


@triton.jit(
    do_not_specialize=["window", "num_query", "num_pages", "first_key"],
    do_not_specialize_on_alignment=["first_ptr"],
)
def _attend_pages(
    q_ptr, keys_ptr, values_ptr, pages_ptr, first_ptr, counts_ptr, ancestors_ptr, out_ptr, lse_ptr,
    scale, cap, window, num_query, num_pages, first_key, q_stride,
    GROUP: tl.constexpr, NUM_KV: tl.constexpr, D: tl.constexpr, ROWS: tl.constexpr,
    KEYS: tl.constexpr, PART_KEYS: tl.constexpr, PAGE: tl.constexpr,
    HAS_COUNTS: tl.constexpr, HAS_ANCESTORS: tl.constexpr, HAS_WINDOW: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr, IS_BLOCK: tl.constexpr, JOINED: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """Attend a tile of rows to one part of the keys of one request and key head.

    With ``JOINED`` there is a single part, whose output is final; otherwise writes the part's
    normalised output and the log2 of its sum of weights.
    """
    if OVERLAP:
        let_next_start()
        wait_for_previous()
    num_tiles = tl.num_programs(0) // NUM_KV
    head, tile = tl.program_id(0) // num_tiles, tl.program_id(0) % num_tiles
    part, num_parts, request = tl.program_id(1), tl.num_programs(1), tl.program_id(2)
    first, count, begin, end, part_keys = _span(
        first_ptr, counts_ptr, request, num_query, num_parts, num_pages * PAGE, window,
        KEYS, PART_KEYS, HAS_COUNTS, HAS_WINDOW,
    )  # fmt: skip
    begin += part * part_keys
    end = tl.minimum(begin + part_keys, end)
    if not JOINED:  # noqa: SIM102, this one is decided when compiling
        if begin >= end:
            return

    row = tile * ROWS + tl.arange(0, ROWS)
    query, member = row // GROUP, row % GROUP
    is_row = row < num_query * GROUP
    dim = tl.arange(0, D)
    q_row = (request * num_query + query).to(tl.int64) * q_stride + (head * GROUP + member) * D
    q = tl.load(q_ptr + q_row[:, None] + dim[None, :], mask=is_row[:, None], other=0.0)
    is_real = is_row & (query < count) & (first + query >= 0)
    last = tl.where(is_real, first + query, -1)
    reach = last
    if IS_BLOCK:
        last = tl.where(is_real, first + count - 1, -1)
    if HAS_ANCESTORS:
        ancestors = tl.load(ancestors_ptr + request * num_query + query, mask=is_real, other=0)
        last = tl.where(is_real, first - 1, -1)  # the last key visible to all rows
        if HAS_WINDOW:
            bits = (ancestors[:, None] >> tl.arange(0, 64)[None, :].to(tl.int64)) & 1
            reach = first + tl.sum(bits, axis=1).to(tl.int32) - 1

    top = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    mixed = tl.zeros([ROWS, D], tl.float32)
    # Pages are read one block ahead, so that a block's loads depend on no other load of the same
    # iteration and the compiler keeps several blocks in flight.
    table_ptr = pages_ptr + request * num_pages
    ahead = begin + tl.arange(0, KEYS)
    page = tl.load(table_ptr + ahead // PAGE, mask=ahead < end, other=0)
    for start in range(begin, end, KEYS):
        key = start + tl.arange(0, KEYS)
        slot = page.to(tl.int64) * PAGE + key % PAGE
        place = (slot * NUM_KV + head)[:, None] * D + dim[None, :]
        is_key = (key < end) & (key >= first_key)
        ahead = key + KEYS
        page = tl.load(table_ptr + ahead // PAGE, mask=ahead < end, other=0)
        k = tl.load(keys_ptr + place, mask=is_key[:, None], other=0.0)
        scores = tl.dot(q, tl.trans(k), input_precision="ieee") * scale
        if HAS_SOFTCAP:
            scores = cap * (2 * tl.sigmoid(scores) - 1)
        seen = key[None, :] <= last[:, None]
        if HAS_ANCESTORS:
            own = key - first
            bit = tl.minimum(tl.maximum(own, 0), 63).to(tl.int64)
            on_path = ((ancestors[:, None] >> bit[None, :]) & 1) != 0
            seen = seen | (on_path & (own >= 0)[None, :])
        if HAS_WINDOW:
            seen = seen & (key[None, :] > reach[:, None] - window)
        scores = tl.where(seen & is_key[None, :], scores, float("-inf"))
        higher = tl.maximum(top, tl.max(scores, axis=1))
        base = tl.where(higher == float("-inf"), 0.0, higher)  # a row may see no key of this part
        weights = tl.exp2(scores - base[:, None])
        shrink = tl.exp2(top - base)
        v = tl.load(values_ptr + place, mask=is_key[:, None], other=0.0)
        mixed = mixed * shrink[:, None] + tl.dot(weights.to(v.dtype), v, input_precision="ieee")
        total = total * shrink + tl.sum(weights, axis=1)
        top = higher

    some = tl.where(total > 0, total, 1.0)
    mixed = mixed / some[:, None]
    if JOINED:
        place = (
            (request * num_query + query).to(tl.int64) * (NUM_KV * GROUP) + head * GROUP + member
        )
    else:
        whole = (request * NUM_KV + head) * num_parts + part
        place = whole.to(tl.int64) * (num_query * GROUP) + row
        tl.store(lse_ptr + place, top + tl.log2(some), mask=is_row)
    target = out_ptr + place[:, None] * D + dim[None, :]
    tl.store(target, mixed.to(out_ptr.dtype.element_ty), mask=is_row[:, None])


@triton.jit(
    do_not_specialize=["window", "num_query", "num_keys", "num_parts"],
    do_not_specialize_on_alignment=["first_ptr"],
)
def _join_pages(
    part_ptr, lse_ptr, first_ptr, counts_ptr, out_ptr, window, num_query, num_keys, num_parts,
    GROUP: tl.constexpr, NUM_KV: tl.constexpr, D: tl.constexpr, KEYS: tl.constexpr,
    PART_KEYS: tl.constexpr, PARTS_UP: tl.constexpr, HAS_COUNTS: tl.constexpr,
    HAS_WINDOW: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """Combine the parts of one query row and query head, weighted by their sums of weights."""
    if OVERLAP:
        wait_for_previous()
    row, head, request = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    _, _, begin, end, part_keys = _span(
        first_ptr, counts_ptr, request, num_query, num_parts, num_keys, window,
        KEYS, PART_KEYS, HAS_COUNTS, HAS_WINDOW,
    )  # fmt: skip
    part = tl.arange(0, PARTS_UP)
    is_part = begin + part * part_keys < end  # programs of the other parts exited early
    dim = tl.arange(0, D)
    whole = (request * NUM_KV + head) * num_parts + part
    place = whole.to(tl.int64) * (num_query * GROUP) + row
    lse = tl.load(lse_ptr + place, mask=is_part, other=float("-inf"))
    top = tl.max(lse, axis=0)
    share = tl.exp2(lse - tl.where(top == float("-inf"), 0.0, top))
    parts = tl.load(part_ptr + place[:, None] * D + dim[None, :], mask=is_part[:, None], other=0.0)
    total = tl.sum(share, axis=0)
    mixed = tl.sum(parts * share[:, None], axis=0) / tl.where(total > 0, total, 1.0)
    query_row = (request * num_query + row // GROUP).to(tl.int64)
    target = query_row * (NUM_KV * GROUP) + head * GROUP + row % GROUP
    tl.store(out_ptr + target * D + dim, mixed.to(out_ptr.dtype.element_ty))


@triton.jit(do_not_specialize=["num_query", "num_pages"])
def _write_rows(
    k_ptr, v_ptr, keys_ptr, values_ptr, pages_ptr, first_ptr, counts_ptr,
    num_query, num_pages, k_stride, v_stride,
    WIDTH: tl.constexpr, BLOCK: tl.constexpr, PAGE: tl.constexpr, HAS_COUNTS: tl.constexpr,
):  # fmt: skip
    """Write the keys and values of one row, all heads."""
    row = tl.program_id(0)
    request, query = row // num_query, row % num_query
    position = tl.load(first_ptr + request) + query
    is_held = (position >= 0) & (position < num_pages * PAGE)
    if HAS_COUNTS:
        is_held = is_held & (query < tl.load(counts_ptr + request))
    page = tl.load(pages_ptr + request * num_pages + position // PAGE, mask=is_held, other=0)
    slot = tl.where(is_held, page.to(tl.int64) * PAGE + position % PAGE, 0)
    at = tl.arange(0, BLOCK)
    k = tl.load(k_ptr + row.to(tl.int64) * k_stride + at, mask=at < WIDTH)
    v = tl.load(v_ptr + row.to(tl.int64) * v_stride + at, mask=at < WIDTH)
    tl.store(keys_ptr + slot * WIDTH + at, k, mask=at < WIDTH)
    tl.store(values_ptr + slot * WIDTH + at, v, mask=at < WIDTH)


def _packed(rows_THD: Tensor) -> Tensor:
    """The rows, copied only if a row's heads are not adjacent."""
    is_packed = rows_THD.stride(2) == 1 and rows_THD.stride(1) == rows_THD.shape[2]
    return rows_THD if is_packed else rows_THD.contiguous()


def _check_pool(keys: Tensor, values: Tensor, decode: DecodePass) -> None:
    head_dim = keys.shape[2]
    if head_dim < 16 or head_dim & (head_dim - 1):
        raise ValueError(
            f"the head dimension must be a power of two and at least 16, got {head_dim}"
        )
    held = (decode.pages_RP, decode.first_R, decode.counts_R, decode.ancestors_RQ)
    if not all(t is None or t.is_contiguous() for t in (keys, values, *held)):
        raise ValueError("keys, values and the tensors of a DecodePass must be contiguous")


def write_rows(
    k_THD: Tensor, v_THD: Tensor, keys: Tensor, values: Tensor, decode: DecodePass
) -> None:
    """See ``specops.attention.write_rows``; keys and values in one launch.

    Raises:
        ValueError: a pool or a tensor of the pass is not contiguous, or the head dimension is not
            a power of two.
    """
    _check_pool(keys, values, decode)
    num_query = decode.num_query(len(k_THD))
    k, v = _packed(k_THD), _packed(v_THD)
    width = k.shape[1] * k.shape[2]
    counts = decode.first_R if decode.counts_R is None else decode.counts_R
    _write_rows[(len(k),)](
        k, v, keys, values, decode.pages_RP, decode.first_R, counts,
        num_query, decode.pages_RP.shape[1], k.stride(0), v.stride(0),
        WIDTH=width, BLOCK=triton.next_power_of_2(width), PAGE=decode.page_size,
        HAS_COUNTS=decode.counts_R is not None,
    )  # fmt: skip


def programs_at_once(tiling: Tiling) -> int:
    """Number of programs that run concurrently on the whole GPU.

    Compiled for an H100, three programs of 16 rows, which need 70 KB of shared memory each, fit on
    a multiprocessor; registers and shared memory allow two of 32 or 64 rows, and one of 128.
    """
    return _MULTIPROCESSORS * {16: 3, 32: 2, 64: 2}.get(tiling.rows, 1)


@functools.cache
def parts_of(
    num_requests: int, num_kv: int, num_rows: int, num_keys: int, head_dim: int, element_size: int
) -> int:
    """Maximum number of parts to split each request's keys into, from shapes alone.

    Minimises the estimated time over the usual contexts, each relative to the time that reading
    its keys takes.

    Args:
        num_rows: query rows and heads that share a key head.
        num_keys: capacity of the page table; requests may have any number of keys up to it.
    """
    tiling = choose_tiling(num_rows, head_dim, element_size)
    num_whole = num_requests * num_kv * triton.cdiv(num_rows, tiling.rows)
    places, key_bytes = programs_at_once(tiling), 2 * head_dim * element_size
    join_bytes = 2 * num_requests * num_kv * num_rows * head_dim * 4

    def slowness(parts: int) -> float:
        return sum(
            _estimated_us(num_whole, parts, keys, places, key_bytes, join_bytes) / keys
            for keys in {min(num_keys, usual) for usual in _USUAL_CONTEXTS}
        )

    return min(range(1, max(1, min(num_keys // _PART_KEYS, _MAX_PARTS)) + 1), key=slowness)


def _estimated_us(
    num_whole: int, parts: int, num_keys: int, places: int, key_bytes: int, join_bytes: int
) -> float:
    """Estimated time, averaged over two cases: all requests have ``num_keys`` keys; or their
    lengths are spread between an eighth of that and all of it, scaled to the same number of keys.

    With equal lengths, programs run in waves, and if the last wave fills little of the GPU, its
    programs are bound by the bandwidth of one program. With unequal lengths, a program starts where
    another ends, until only the last ones are left.

    Args:
        num_whole: programs if nothing were split.
        places: programs that run at once.
        key_bytes: size of a key and its value.
        join_bytes: size of one part of every request.
    """
    part_keys = max(_PART_KEYS, -(-num_keys // parts))
    filled = -(-num_keys // part_keys)  # the other parts exit early
    num_programs, part_bytes = num_whole * filled, part_keys * key_bytes
    read_us = part_bytes / _BYTES_PER_US  # a part's share of the card's time
    speed = _CROWDED if num_programs > _MULTIPROCESSORS else 1.0
    part_us = part_bytes / (speed * _PROGRAM_BYTES_PER_US)
    rounds, rest = divmod(num_programs, places)
    equal_us = rounds * (places * read_us + _START_US)
    if rest:
        equal_us += max(part_us, rest * read_us) + _START_US
    unequal_us = max(_UNEQUAL * num_programs * read_us + _LAST * part_us, part_us)
    unequal_us += _START_US * (1 + num_programs / places)
    join_us = _JOIN_US + filled * join_bytes / _JOIN_BYTES_PER_US if parts > 1 else 0.0
    return (equal_us + join_us + (unequal_us + join_us) / _UNEQUAL) / 2


def choose_tiling(num_rows: int, head_dim: int, element_size: int) -> Tiling:
    """The tiling for ``num_rows`` query rows and heads that share a key head.

    Three blocks are in flight. With two, four programs of 16 rows fit on a multiprocessor instead
    of three, which compensates while all of them have work; but a program that runs alone, as the
    last ones do, reads at two thirds of the speed.
    """
    rows = min(_TILE_OUTPUTS // head_dim, 128, max(16, triton.next_power_of_2(num_rows)))
    keys = max(16, min(128, _TILE_BYTES // element_size // max(rows, head_dim)))
    num_warps = 4 if 2 * rows * max(head_dim, keys) <= _TILE_OUTPUTS else 8
    return Tiling(rows, keys, num_warps)


def attend_pages(
    q_THD: Tensor,
    keys: Tensor,
    values: Tensor,
    decode: DecodePass,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    num_parts: int | None = None,
    tiling: Tiling | None = None,
    overlap: bool = False,
    pinned: bool = False,
) -> Tensor:
    """See ``specops.attention.attend_pages``, which has the same arguments and result.

    One launch, plus one that joins the parts if keys are split. Launches depend on shapes only:
    each part processes its share of a request's actual length, and exits if that is empty.

    Args:
        num_parts: maximum number of parts per request, up to 64; ``None``: as many as fill the GPU.
        tiling: ``None``: ``choose_tiling``'s.
        overlap: start while the previous kernel still runs (``specops.overlap_triton``).
        pinned: one part and one tiling for all shapes, so that a row's result does not depend on
            the other rows; overrides ``num_parts`` and ``tiling``.

    Raises:
        ValueError: a pool or a tensor of the pass is not contiguous, or the head dimension is not
            a power of two.
    """
    _check_pool(keys, values, decode)
    if pinned:
        num_parts, tiling = 1, choose_tiling(1, keys.shape[2], keys.element_size())
    num_requests, num_pages = decode.pages_RP.shape
    num_kv, head_dim = keys.shape[1:]
    num_query = decode.num_query(len(q_THD))
    check_window(decode, num_query, window)
    share = q_THD.shape[1] // num_kv
    num_rows = num_query * share
    chosen = tiling or choose_tiling(num_rows, head_dim, keys.element_size())
    num_keys = num_pages * decode.page_size
    tiles = triton.cdiv(num_rows, chosen.rows)
    parts = num_parts or parts_of(
        num_requests, num_kv, num_rows, num_keys, head_dim, keys.element_size()
    )
    q = _packed(q_THD)
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    counts = q if decode.counts_R is None else decode.counts_R  # a placeholder is never read
    span = {
        "GROUP": share,
        "NUM_KV": num_kv,
        "D": head_dim,
        "KEYS": chosen.keys,
        "PART_KEYS": _PART_KEYS,
        "HAS_COUNTS": decode.counts_R is not None,
        "HAS_WINDOW": window is not None,
        "OVERLAP": overlap,
    }
    part_out, lse = out, out
    if parts > 1:
        scratch = (num_requests * num_kv * parts, num_rows)
        part_out = torch.empty((*scratch, head_dim), dtype=torch.float32, device=q.device)
        lse = torch.empty(scratch, dtype=torch.float32, device=q.device)
    _attend_pages[(num_kv * tiles, parts, num_requests)](
        q, keys, values, decode.pages_RP, decode.first_R, counts,
        q if decode.ancestors_RQ is None else decode.ancestors_RQ, part_out, lse,
        scale * _LOG2_E if softcap is None else 2 * scale / softcap, (softcap or 0.0) * _LOG2_E,
        window or 0, num_query, num_pages, decode.first_key, q.stride(0),
        **span, ROWS=chosen.rows, PAGE=decode.page_size,
        HAS_ANCESTORS=decode.ancestors_RQ is not None, HAS_SOFTCAP=softcap is not None,
        IS_BLOCK=decode.is_block,
        JOINED=parts == 1, num_warps=chosen.num_warps, num_stages=chosen.num_stages,
        launch_pdl=overlap,
    )  # fmt: skip
    if parts > 1:
        up = triton.next_power_of_2(parts)
        _join_pages[(num_rows, num_kv, num_requests)](
            part_out, lse, decode.first_R, counts, out, window or 0, num_query, num_keys, parts,
            **span, PARTS_UP=up, num_warps=max(1, min(8, up * head_dim // 1024)),
            launch_pdl=overlap,
        )  # fmt: skip
    return out


@triton.jit(do_not_specialize=["num_requests", "num_query", "num_pages"])
def _places(
    first_ptr, counts_ptr, pages_ptr, positions_ptr, slots_ptr, starts_ptr,
    num_requests, num_query, num_pages,
    PAGE: tl.constexpr, BY_STEP: tl.constexpr, HAS_COUNTS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Locate BLOCK rows, in the order of the result."""
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    is_row = row < num_requests * num_query
    if BY_STEP:
        request, query = row % num_requests, row // num_requests
    else:
        request, query = row // num_query, row % num_query
    position = tl.load(first_ptr + request, mask=is_row, other=0) + query
    is_real = is_row & (position >= 0)
    if HAS_COUNTS:
        is_real = is_real & (query < tl.load(counts_ptr + request, mask=is_row, other=0))
    is_held = is_real & (position < num_pages * PAGE)
    entry = request.to(tl.int64) * num_pages + position // PAGE
    page = tl.load(pages_ptr + entry, mask=is_held, other=0)
    slot = tl.where(is_held, page.to(tl.int64) * PAGE + position % PAGE, 0)
    tl.store(positions_ptr + row, tl.where(is_real, position, 0).to(tl.int64), mask=is_row)
    tl.store(slots_ptr + row, slot, mask=is_row)
    tl.store(starts_ptr + row, position, mask=is_row)


def places_of(decode: DecodePass, num_query: int, *, by_step: bool = False) -> Places:
    """See ``specops.attention.places_of``.

    Raises:
        ValueError: a tensor of the pass is not contiguous.
    """
    first, counts, pages = decode.first_R, decode.counts_R, decode.pages_RP
    if not all(t is None or t.is_contiguous() for t in (first, counts, pages)):
        raise ValueError("the tensors of a DecodePass must be contiguous")
    num_requests = len(first)
    shape = (num_query, num_requests) if by_step else (num_requests, num_query)
    positions = torch.empty(shape, dtype=torch.int64, device=first.device)
    slots, starts = torch.empty_like(positions), torch.empty_like(positions, dtype=torch.int32)
    _places[(triton.cdiv(num_requests * num_query, _PLACE_ROWS),)](
        first, first if counts is None else counts, pages, positions, slots, starts,
        num_requests, num_query, pages.shape[1],
        PAGE=decode.page_size, BY_STEP=by_step, HAS_COUNTS=counts is not None, BLOCK=_PLACE_ROWS,
        num_warps=4,
    )  # fmt: skip
    return Places(positions, slots, starts)
