"""Paged attention of a few new tokens as one fused kernel; its definition is
``specops.attention.group_attention``.

Every program takes one request, one key head and one part of its keys. The query rows of a request
and the query heads that share the key head are packed into one tile, so that each key is read once,
and the keys are split so that few requests fill a whole card; a second kernel joins the parts
(Dao et al. 2023, Flash-Decoding).

Shapes: T packed rows, R requests of a group, Q query rows each, S keys, Hq/Hkv heads, G = Hq / Hkv,
D head dimension (a power of two, at least 16).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from specops.attention import Group

MAX_ROWS = 256
"""Most Q * G of one tile."""
_KEYS_AT_ONCE = 64
_PROGRAMS = 264
"""Wanted at least: two for each multiprocessor of an H100 or H200."""


@triton.jit
def _attend_part(
    q_ptr, keys_ptr, values_ptr, slots_ptr, positions_ptr, out_ptr, top_ptr, sum_ptr,
    scale, softcap, num_keys, part_keys, slots_stride,
    NUM_QUERY: tl.constexpr, GROUP: tl.constexpr, NUM_KV: tl.constexpr, D: tl.constexpr,
    ROWS: tl.constexpr, KEYS: tl.constexpr, FIRST_KEY: tl.constexpr, WINDOW: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
):  # fmt: skip
    """One part of the keys for the packed rows of one request and key head.

    Writes the part's normalised output, the log2 of its largest weight and its sum of weights.
    """
    request, head, part = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    row = tl.arange(0, ROWS)
    query, member = row // GROUP, row % GROUP
    is_row = row < NUM_QUERY * GROUP
    dim = tl.arange(0, D)
    position = tl.load(positions_ptr + request * NUM_QUERY + query, mask=is_row, other=-1)
    q_row = (request * NUM_QUERY + query) * (NUM_KV * GROUP) + head * GROUP + member
    q = tl.load(q_ptr + q_row[:, None] * D + dim[None, :], mask=is_row[:, None], other=0.0)

    last = tl.max(position, axis=0)
    begin = part * part_keys
    if WINDOW > 0:
        earliest = tl.min(tl.where(is_row, position, last), axis=0) - WINDOW + 1
        begin = tl.maximum(begin, earliest // KEYS * KEYS)
    end = tl.minimum(tl.minimum((part + 1) * part_keys, last + 1), num_keys)

    top = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    mixed = tl.zeros([ROWS, D], tl.float32)
    for start in range(begin, end, KEYS):
        key = start + tl.arange(0, KEYS)
        is_key = key < end
        slot = tl.load(slots_ptr + request * slots_stride + key, mask=is_key, other=0)
        place = (slot * NUM_KV + head)[:, None] * D + dim[None, :]
        k = tl.load(keys_ptr + place, mask=is_key[:, None], other=0.0)
        scores = tl.dot(q, tl.trans(k), input_precision="ieee") * scale
        if HAS_SOFTCAP:
            scores = softcap * (2 * tl.sigmoid(2 * scores / softcap) - 1)
        seen = (key[None, :] <= position[:, None]) & (key[None, :] >= FIRST_KEY) & is_key[None, :]
        if WINDOW > 0:
            seen = seen & (key[None, :] > position[:, None] - WINDOW)
        scores = tl.where(seen, scores * 1.4426950408889634, float("-inf"))
        higher = tl.maximum(top, tl.max(scores, axis=1))
        base = tl.where(higher == float("-inf"), 0.0, higher)  # a row may see nothing of this part
        weights = tl.exp2(scores - base[:, None])
        shrink = tl.exp2(top - base)
        v = tl.load(values_ptr + place, mask=is_key[:, None], other=0.0)
        mixed = mixed * shrink[:, None] + tl.dot(weights.to(v.dtype), v, input_precision="ieee")
        total = total * shrink + tl.sum(weights, axis=1)
        top = higher

    whole = (request * NUM_KV + head) * tl.num_programs(2) + part
    tl.store(
        out_ptr + (whole * ROWS + row)[:, None] * D + dim[None, :],
        mixed / tl.where(total > 0, total, 1.0)[:, None],
        mask=is_row[:, None],
    )
    tl.store(top_ptr + whole * ROWS + row, top, mask=is_row)
    tl.store(sum_ptr + whole * ROWS + row, total, mask=is_row)


@triton.jit
def _join_parts(
    out_ptr, top_ptr, sum_ptr, joined_ptr,
    NUM_QUERY: tl.constexpr, GROUP: tl.constexpr, NUM_KV: tl.constexpr, D: tl.constexpr,
    ROWS: tl.constexpr, PARTS: tl.constexpr, PARTS_UP: tl.constexpr,
):  # fmt: skip
    """Output of one query row and query head: its parts, each by its share of the weights."""
    request, row, head = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    part = tl.arange(0, PARTS_UP)
    is_part = part < PARTS
    dim = tl.arange(0, D)
    place = ((request * NUM_KV + head) * PARTS + part) * ROWS + row
    top = tl.load(top_ptr + place, mask=is_part, other=float("-inf"))
    total = tl.load(sum_ptr + place, mask=is_part, other=0.0)
    share = total * tl.exp2(top - tl.max(top, axis=0))
    share = tl.where(total > 0, share, 0.0)
    parts = tl.load(out_ptr + place[:, None] * D + dim[None, :], mask=is_part[:, None], other=0.0)
    mixed = tl.sum(parts * share[:, None], axis=0) / tl.sum(share, axis=0)
    target = (request * NUM_QUERY + row // GROUP) * (NUM_KV * GROUP) + head * GROUP + row % GROUP
    tl.store(joined_ptr + target * D + dim, mixed.to(joined_ptr.dtype.element_ty))


def group_attention(
    q_RQHD: Tensor,
    keys: Tensor,
    values: Tensor,
    group: Group,
    scale: float,
    window: int | None,
    softcap: float | None,
    num_parts: int | None = None,
) -> Tensor:
    """See ``specops.attention.group_attention``, whose arguments and result these are.

    Args:
        keys, values: contiguous.
        num_parts: parts that the keys are split into; ``None`` fills the card.

    Raises:
        ValueError: too many rows for one tile, or a head dimension that is no power of two.
    """
    num_requests, num_keys = group.slots_RS.shape
    num_kv, head_dim = keys.shape[1:]
    share = q_RQHD.shape[2] // num_kv
    num_rows = group.num_query * share
    if num_rows > MAX_ROWS:
        raise ValueError(f"{group.num_query} query rows of {share} heads exceed {MAX_ROWS}")
    if head_dim < 16 or head_dim & (head_dim - 1):
        raise ValueError(f"the head dimension must be a power of two from 16 on, got {head_dim}")
    rows = max(16, triton.next_power_of_2(num_rows))
    blocks = triton.cdiv(num_keys, _KEYS_AT_ONCE)
    wanted = num_parts or triton.cdiv(_PROGRAMS, num_requests * num_kv)
    part_keys = triton.cdiv(blocks, min(wanted, blocks)) * _KEYS_AT_ONCE
    parts = triton.cdiv(num_keys, part_keys)
    scratch = (num_requests * num_kv * parts, rows)
    part_out = torch.empty((*scratch, head_dim), dtype=torch.float32, device=q_RQHD.device)
    top, total = torch.empty((2, *scratch), dtype=torch.float32, device=q_RQHD.device)
    q_RQHD = q_RQHD.contiguous()
    out = torch.empty_like(q_RQHD)
    shape = {
        "NUM_QUERY": group.num_query,
        "GROUP": share,
        "NUM_KV": num_kv,
        "D": head_dim,
        "ROWS": rows,
    }
    _attend_part[(num_requests, num_kv, parts)](
        q_RQHD, keys, values, group.slots_RS, group.positions_RQ.contiguous(), part_out,
        top, total,
        scale, softcap or 0.0, num_keys, part_keys, group.slots_RS.stride(0),
        **shape, KEYS=_KEYS_AT_ONCE, FIRST_KEY=group.first_key, WINDOW=window or 0,
        HAS_SOFTCAP=softcap is not None,
    )  # fmt: skip
    _join_parts[(num_requests, num_rows, num_kv)](
        part_out, top, total, out,
        **shape, PARTS=parts, PARTS_UP=triton.next_power_of_2(parts),
    )  # fmt: skip
    return out
