"""Paged attention of a few new tokens as fused kernels; the definitions are
``specops.attention.attend_pages`` and ``write_rows``.

Every program takes one request, one key head and one part of its keys. The query rows of a request
and the query heads that share the key head are packed into one tile, so that each key is read once,
and the keys are split so that few requests fill a whole card; a second kernel joins the parts
(Dao et al. 2023, Flash-Decoding).

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
"""Of an H100 or H200. The figures below are an H200's: with what a pass takes anyway they come
within 3 % (at worst 13 %) of 92 measured cuts of requests of one length."""
_BYTES_PER_US = 4.29e6
"""Keys and values that all multiprocessors together read."""
_PROGRAM_BYTES_PER_US = 27e3
"""What one program reads at most, alone on its multiprocessor: it waits for its blocks."""
_CROWDED = 0.82
"""Of that speed is left beside other programs, and at the end, when the last ones lie unevenly."""
_START_US = 1.7
"""Until a program's first block is there."""
_JOIN_US = 2.0
_JOIN_BYTES_PER_US = 3.2e6
"""Parts written and read again."""
_UNEQUAL = 0.56
"""Mean length over the longest, where lengths lie evenly between an eighth and all of it."""
_LAST = 0.2
"""Share of a longest part's time for which the card as good as idles, where lengths are unequal: of
programs simulated at these speeds, not measured."""
_USUAL_CONTEXTS = (2048, 8192, 32768)
"""What requests are taken to have, up to the table's width, which is as much as any may get."""
_LOG2_E = 1.4426950408889634
_PART_KEYS = 128
"""Fewest keys of a part: below, joining costs more than it saves."""
_MAX_PARTS = 32
"""One request of 32,768 keys: 46.3 us in 32 parts, 50.5 in 36, 48.0 in 64; of 2,048 in a table of
40,960: 9.9 in 32, 11.5 in 36 (``benchmarks/results/ops_attention_sweep_rounds.json``).
"""
_TILE_BYTES = 16 << 10
"""Of one block of keys. With its values and two of each on their way 64 KB: three programs of 16
rows, or two of more rows, fit a multiprocessor, which needs some 30 KB on their way for its share
of the bandwidth."""
_TILE_OUTPUTS = 1 << 14
"""Most float32 outputs of one tile: 64 registers of each thread of eight warps."""
_PLACE_ROWS = 128
"""Rows of one program of ``places_of``."""


@dataclass(frozen=True, slots=True)
class Tiling:
    """What one program works on at a time."""

    rows: int
    """Query rows times query heads that share a key head."""
    keys: int
    """Of one block."""
    num_warps: int
    num_stages: int = 3
    """Blocks in flight, the one being multiplied included."""


@triton.jit
def _span(
    first_ptr, counts_ptr, request, num_query, num_parts, num_keys, window,
    KEYS: tl.constexpr, PART_KEYS: tl.constexpr, HAS_COUNTS: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
):  # fmt: skip
    """Row 0's position, rows that are no padding, first and last key + 1, and keys of a part."""
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
    HAS_SOFTCAP: tl.constexpr, JOINED: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """One part of the keys of one request and key head, for a tile of the rows that share it.

    With ``JOINED`` there is one part, whose output is final; else writes the part's normalised
    output and the log2 of its sum of weights.
    """
    if OVERLAP:
        let_next_start()
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
    if HAS_ANCESTORS:
        ancestors = tl.load(ancestors_ptr + request * num_query + query, mask=is_real, other=0)
        last = tl.where(is_real, first - 1, -1)  # the last key that is seen without asking
        if HAS_WINDOW:
            bits = (ancestors[:, None] >> tl.arange(0, 64)[None, :].to(tl.int64)) & 1
            reach = first + tl.sum(bits, axis=1).to(tl.int32) - 1

    top = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    mixed = tl.zeros([ROWS, D], tl.float32)
    # Pages are read one block ahead, so that a block's loads depend on no other load of its turn
    # and the compiler keeps several blocks on their way.
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
        base = tl.where(higher == float("-inf"), 0.0, higher)  # a row may see nothing of this part
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
    """Output of one query row and query head: its parts, each by its share of the weights."""
    if OVERLAP:
        wait_for_previous()
    row, head, request = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    _, _, begin, end, part_keys = _span(
        first_ptr, counts_ptr, request, num_query, num_parts, num_keys, window,
        KEYS, PART_KEYS, HAS_COUNTS, HAS_WINDOW,
    )  # fmt: skip
    part = tl.arange(0, PARTS_UP)
    is_part = begin + part * part_keys < end  # the others left early
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
    """Key and value of one row, all heads."""
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
    """The rows, copied only where a row's heads do not lie side by side."""
    is_packed = rows_THD.stride(2) == 1 and rows_THD.stride(1) == rows_THD.shape[2]
    return rows_THD if is_packed else rows_THD.contiguous()


def _check_pool(keys: Tensor, values: Tensor, decode: DecodePass) -> None:
    head_dim = keys.shape[2]
    if head_dim < 16 or head_dim & (head_dim - 1):
        raise ValueError(f"the head dimension must be a power of two from 16 on, got {head_dim}")
    held = (decode.pages_RP, decode.first_R, decode.counts_R, decode.ancestors_RQ)
    if not all(t is None or t.is_contiguous() for t in (keys, values, *held)):
        raise ValueError("keys, values and the tensors of a DecodePass must be contiguous")


def write_rows(
    k_THD: Tensor, v_THD: Tensor, keys: Tensor, values: Tensor, decode: DecodePass
) -> None:
    """See ``specops.attention.write_rows``: keys and values in one launch.

    Raises:
        ValueError: a pool or a tensor of the pass is not contiguous, or the head dimension is no
            power of two.
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
    """On the whole card.

    As compiled for an H100: 70 KB of shared memory let three of 16 rows run on a multiprocessor,
    registers and shared memory two of 32 or 64, one of 128.
    """
    return _MULTIPROCESSORS * {16: 3, 32: 2, 64: 2}.get(tiling.rows, 1)


@functools.cache
def parts_of(
    num_requests: int, num_kv: int, num_rows: int, num_keys: int, head_dim: int, element_size: int
) -> int:
    """Parts that each request's keys are split into at most, from shapes alone.

    The number with the least estimated time over the usual contexts, each weighed by the time that
    reading its keys takes.

    Args:
        num_rows: query rows and heads that share a key head.
        num_keys: that the page table has room for; requests may have any number up to it.
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
    """Of requests that all have ``num_keys``, and of some from an eighth of that on: the mean, for
    as many keys.

    Where requests are of one length, programs come in rounds, and those of a last round that fills
    little of the card are bound by what each can read. Of many lengths, one begins where another
    ends, until the last are left.

    Args:
        num_whole: programs if nothing were split.
        places: programs that run at once.
        key_bytes: of a key and its value.
        join_bytes: of a part of every request.
    """
    part_keys = max(_PART_KEYS, -(-num_keys // parts))
    filled = -(-num_keys // part_keys)  # the other parts leave early
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
    """For ``num_rows`` query rows and heads that share a key head.

    Three blocks in flight: with two, four programs of 16 rows fit a multiprocessor instead of
    three, which makes up for it where they all have work, but a program alone reads at two thirds
    of the speed, and the last ones are alone.
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
    """See ``specops.attention.attend_pages``, whose arguments and result these are.

    One launch, and one that joins where keys are split. What is launched depends on shapes only:
    each part takes its share of a request's actual length, and leaves where there is none.

    Args:
        num_parts: parts that each request's keys are split into at most, up to 64; ``None`` fills
            the card.
        tiling: ``None`` takes ``choose_tiling``'s.
        overlap: the joining starts while parts are still under way (``specops.overlap_triton``).
        pinned: one part and one tiling for all shapes, so that a row's result depends on nothing
            that is computed beside it; instead of ``num_parts`` and ``tiling``.

    Raises:
        ValueError: a pool or a tensor of the pass is not contiguous, or the head dimension is no
            power of two.
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
    counts = q if decode.counts_R is None else decode.counts_R  # never followed where it stands in
    span = {
        "GROUP": share,
        "NUM_KV": num_kv,
        "D": head_dim,
        "KEYS": chosen.keys,
        "PART_KEYS": _PART_KEYS,
        "HAS_COUNTS": decode.counts_R is not None,
        "HAS_WINDOW": window is not None,
        "OVERLAP": overlap and parts > 1,
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
        JOINED=parts == 1, num_warps=chosen.num_warps, num_stages=chosen.num_stages,
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
    """BLOCK rows of any requests, in the order of the result."""
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
