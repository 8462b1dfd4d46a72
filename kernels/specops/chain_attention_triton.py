"""Kernels for ``specops.chain_attention``, which has the definition.

Rows are processed in blocks of neighbouring positions of the text, whose anchors see neighbouring
keys. Scores are never written: the backward pass computes them again from the logarithms of the
rows' normalisers, as FlashAttention does (Dao 2023, arXiv:2307.08691). The keys' gradients are
summed by the program that owns the keys, so equal updates are equal in every bit.

Shapes as in ``specops.chain_attention``; G = Hq / Hkv.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from specops.chain_attention import Anchors

_ROWS = 64
"""Positions of a block of rows."""
_KEYS = 64
_OWN_ROWS = 32
_LOWEST = tl.constexpr(-1.0e30)


@triton.jit
def _visible(position, first, key, seen):
    """[rows, keys]: which keys of step 0 the rows see. ``first`` is past the end without a row."""
    before = (key[None, :] >= first[:, None]) & (key[None, :] <= position[:, None])
    itself = (key[None, :] == position[:, None]) & (first[:, None] <= position[:, None])
    return (before & (seen[None, :] != 0)) | itself


@triton.jit
def _load_rows(
    q_ptr, place_ptr, begin_ptr, num, position, head, NUM_QUERY: tl.constexpr, D: tl.constexpr
):
    """Rows whose anchors are these positions, whether there are any, the first keys that they see,
    where one head of theirs is, and its queries."""
    row = tl.load(place_ptr + position, mask=position < num, other=-1).to(tl.int64)
    has = row >= 0
    first = tl.load(begin_ptr + position, mask=has, other=num)
    at = (row[:, None] * NUM_QUERY + head) * D + tl.arange(0, D)[None, :]
    return row, has, first, at, tl.load(q_ptr + at, mask=has[:, None], other=0.0)


@triton.jit
def _load_keys(k_ptr, v_ptr, seen_ptr, num, key, kv, NUM_KV: tl.constexpr, D: tl.constexpr):
    """Where one head of these keys of step 0 is, it and its values, and whether others see them."""
    is_key = key < num
    at = (key.to(tl.int64)[:, None] * NUM_KV + kv) * D + tl.arange(0, D)[None, :]
    k = tl.load(k_ptr + at, mask=is_key[:, None], other=0.0)
    v = tl.load(v_ptr + at, mask=is_key[:, None], other=0.0)
    return at, k, v, tl.load(seen_ptr + key, mask=is_key, other=0)


@triton.jit(do_not_specialize=["num", "num_rows", "num_own"])
def _attend(
    q_ptr, k_ptr, v_ptr, own_k_ptr, own_v_ptr, place_ptr, begin_ptr, seen_ptr, out_ptr, norm_ptr,
    num, num_rows, scale, num_own, NUM_QUERY: tl.constexpr, GROUP: tl.constexpr,
    D: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    """Process one head of a block of rows."""
    head = tl.program_id(1)
    num_kv: tl.constexpr = NUM_QUERY // GROUP
    kv = head // GROUP
    position = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    dim = tl.arange(0, D)
    row, has, first, at, q = _load_rows(
        q_ptr, place_ptr, begin_ptr, num, position, head, NUM_QUERY, D
    )

    top = tl.full([ROWS], _LOWEST, tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    mixed = tl.zeros([ROWS, D], tl.float32)
    begin = tl.min(first, axis=0) // KEYS * KEYS
    end = tl.minimum(num, (tl.program_id(0) + 1) * ROWS)
    for start in range(begin, end, KEYS):
        key = start + tl.arange(0, KEYS)
        _, k, v, seen = _load_keys(k_ptr, v_ptr, seen_ptr, num, key, kv, num_kv, D)
        visible = _visible(position, first, key, seen)
        scores = tl.where(visible, tl.dot(q, tl.trans(k)) * scale, _LOWEST)
        higher = tl.maximum(top, tl.max(scores, axis=1))
        weights = tl.where(visible, tl.exp(scores - higher[:, None]), 0.0)
        faded = tl.exp(top - higher)
        total = total * faded + tl.sum(weights, axis=1)
        mixed = mixed * faded[:, None] + tl.dot(weights.to(v.dtype), v)
        top = higher

    wide = q.to(tl.float32)
    for step in range(num_own):
        place = ((step * num_rows + row[:, None]) * num_kv + kv) * D + dim[None, :]
        k = tl.load(own_k_ptr + place, mask=has[:, None], other=0.0).to(tl.float32)
        v = tl.load(own_v_ptr + place, mask=has[:, None], other=0.0).to(tl.float32)
        score = tl.sum(wide * k, axis=1) * scale
        higher = tl.maximum(top, score)
        weight = tl.exp(score - higher)
        faded = tl.exp(top - higher)
        total = total * faded + weight
        mixed = mixed * faded[:, None] + weight[:, None] * v
        top = higher

    total = tl.where(has, total, 1.0)
    mixed = mixed / total[:, None]
    tl.store(out_ptr + at, mixed.to(out_ptr.dtype.element_ty), mask=has[:, None])
    tl.store(norm_ptr + row * NUM_QUERY + head, top + tl.log(total), mask=has)


@triton.jit(do_not_specialize=["num", "num_rows", "num_own"])
def _query_slopes(
    q_ptr, k_ptr, v_ptr, own_k_ptr, own_v_ptr, place_ptr, begin_ptr, seen_ptr, out_ptr, norm_ptr,
    slope_ptr, pull_ptr, q_slope_ptr,
    num, num_rows, scale, num_own, NUM_QUERY: tl.constexpr, GROUP: tl.constexpr,
    D: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    """Process one head of a block of rows; also writes ``pull``, each row's mean of the gradients
    of its weights."""
    head = tl.program_id(1)
    num_kv: tl.constexpr = NUM_QUERY // GROUP
    kv = head // GROUP
    position = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    dim = tl.arange(0, D)
    row, has, first, at, q = _load_rows(
        q_ptr, place_ptr, begin_ptr, num, position, head, NUM_QUERY, D
    )
    slope = tl.load(slope_ptr + at, mask=has[:, None], other=0.0)
    out = tl.load(out_ptr + at, mask=has[:, None], other=0.0)
    norm = tl.load(norm_ptr + row * NUM_QUERY + head, mask=has, other=0.0)
    pull = tl.sum(slope.to(tl.float32) * out.to(tl.float32), axis=1)
    tl.store(pull_ptr + row * NUM_QUERY + head, pull, mask=has)

    found = tl.zeros([ROWS, D], tl.float32)
    begin = tl.min(first, axis=0) // KEYS * KEYS
    end = tl.minimum(num, (tl.program_id(0) + 1) * ROWS)
    for start in range(begin, end, KEYS):
        key = start + tl.arange(0, KEYS)
        _, k, v, seen = _load_keys(k_ptr, v_ptr, seen_ptr, num, key, kv, num_kv, D)
        visible = _visible(position, first, key, seen)
        scores = tl.dot(q, tl.trans(k)) * scale
        weights = tl.where(visible, tl.exp(tl.where(visible, scores - norm[:, None], 0.0)), 0.0)
        pulls = weights * (tl.dot(slope, tl.trans(v)) - pull[:, None])
        found += tl.dot(pulls.to(k.dtype), k)

    wide, wide_slope = q.to(tl.float32), slope.to(tl.float32)
    for step in range(num_own):
        place = ((step * num_rows + row[:, None]) * num_kv + kv) * D + dim[None, :]
        k = tl.load(own_k_ptr + place, mask=has[:, None], other=0.0).to(tl.float32)
        v = tl.load(own_v_ptr + place, mask=has[:, None], other=0.0).to(tl.float32)
        weight = tl.exp(tl.sum(wide * k, axis=1) * scale - norm)
        found += (weight * (tl.sum(wide_slope * v, axis=1) - pull))[:, None] * k

    tl.store(q_slope_ptr + at, (found * scale).to(q_slope_ptr.dtype.element_ty), mask=has[:, None])


@triton.jit(do_not_specialize=["num"])
def _key_slopes(
    q_ptr, k_ptr, v_ptr, place_ptr, begin_ptr, end_ptr, seen_ptr, norm_ptr, slope_ptr, pull_ptr,
    k_slope_ptr, v_slope_ptr,
    num, scale, NUM_QUERY: tl.constexpr, GROUP: tl.constexpr,
    D: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    """Process one head of a block of keys of step 0."""
    kv = tl.program_id(1)
    num_kv: tl.constexpr = NUM_QUERY // GROUP
    begin = tl.program_id(0) * KEYS
    key = begin + tl.arange(0, KEYS)
    is_key = key < num
    own, k, v, seen = _load_keys(k_ptr, v_ptr, seen_ptr, num, key, kv, num_kv, D)
    end = tl.max(tl.load(end_ptr + key, mask=is_key, other=0), axis=0)
    k_slope = tl.zeros([KEYS, D], tl.float32)
    v_slope = tl.zeros([KEYS, D], tl.float32)
    for member in range(GROUP):
        head = kv * GROUP + member
        for start in range(begin, end, ROWS):
            position = start + tl.arange(0, ROWS)
            row, has, first, at, q = _load_rows(
                q_ptr, place_ptr, begin_ptr, num, position, head, NUM_QUERY, D
            )
            slope = tl.load(slope_ptr + at, mask=has[:, None], other=0.0)
            norm = tl.load(norm_ptr + row * NUM_QUERY + head, mask=has, other=0.0)
            pull = tl.load(pull_ptr + row * NUM_QUERY + head, mask=has, other=0.0)
            visible = _visible(position, first, key, seen)
            scores = tl.dot(q, tl.trans(k)) * scale
            weights = tl.where(visible, tl.exp(tl.where(visible, scores - norm[:, None], 0.0)), 0.0)
            v_slope += tl.dot(tl.trans(weights.to(q.dtype)), slope)
            pulls = weights * (tl.dot(slope, tl.trans(v)) - pull[:, None])
            k_slope += tl.dot(tl.trans(pulls.to(q.dtype)), q)
    dtype = k_slope_ptr.dtype.element_ty
    tl.store(k_slope_ptr + own, (k_slope * scale).to(dtype), mask=is_key[:, None])
    tl.store(v_slope_ptr + own, v_slope.to(dtype), mask=is_key[:, None])


@triton.jit(do_not_specialize=["num_rows"])
def _own_slopes(
    q_ptr, own_k_ptr, own_v_ptr, norm_ptr, slope_ptr, pull_ptr, k_slope_ptr, v_slope_ptr,
    num_rows, scale, NUM_QUERY: tl.constexpr, GROUP: tl.constexpr,
    D: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Process one head of some chains' own keys of one step."""
    kv, step = tl.program_id(1), tl.program_id(2)
    num_kv: tl.constexpr = NUM_QUERY // GROUP
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    has = row < num_rows
    dim = tl.arange(0, D)
    own = ((step.to(tl.int64) * num_rows + row[:, None]) * num_kv + kv) * D + dim[None, :]
    k = tl.load(own_k_ptr + own, mask=has[:, None], other=0.0).to(tl.float32)
    v = tl.load(own_v_ptr + own, mask=has[:, None], other=0.0).to(tl.float32)
    k_slope = tl.zeros([ROWS, D], tl.float32)
    v_slope = tl.zeros([ROWS, D], tl.float32)
    for member in range(GROUP):
        head = kv * GROUP + member
        at = (row[:, None] * NUM_QUERY + head) * D + dim[None, :]
        q = tl.load(q_ptr + at, mask=has[:, None], other=0.0).to(tl.float32)
        slope = tl.load(slope_ptr + at, mask=has[:, None], other=0.0).to(tl.float32)
        norm = tl.load(norm_ptr + row * NUM_QUERY + head, mask=has, other=0.0)
        pull = tl.load(pull_ptr + row * NUM_QUERY + head, mask=has, other=0.0)
        weight = tl.exp(tl.sum(q * k, axis=1) * scale - norm)
        k_slope += (weight * (tl.sum(slope * v, axis=1) - pull))[:, None] * q
        v_slope += weight[:, None] * slope
    dtype = k_slope_ptr.dtype.element_ty
    tl.store(k_slope_ptr + own, (k_slope * scale).to(dtype), mask=has[:, None])
    tl.store(v_slope_ptr + own, v_slope.to(dtype), mask=has[:, None])


class _AttendChains(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, anchors: Anchors, *own: Tensor
    ) -> Tensor:
        q, k, v = q.contiguous(), k.contiguous(), v.contiguous()
        num_own = len(own) // 2
        own_k, own_v = (torch.stack(x) if x else q for x in (own[:num_own], own[num_own:]))
        seen_T = anchors.seen_T.view(torch.uint8)
        num_rows, num_query, dim = q.shape
        out = torch.zeros_like(q)
        norm = torch.zeros((num_rows, num_query), dtype=torch.float32, device=q.device)
        shape = _shape(q, k)
        if len(k) and num_rows:
            _attend[triton.cdiv(len(k), _ROWS), num_query](
                q, k, v, own_k, own_v, anchors.place_T, anchors.begin_T, seen_T, out, norm,
                len(k), num_rows, dim**-0.5, num_own, ROWS=_ROWS, KEYS=_KEYS, **shape,
            )  # fmt: skip
        ctx.save_for_backward(q, k, v, own_k, own_v, out, norm)
        ctx.anchors, ctx.num_own = anchors, num_own
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, slope: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, own_k, own_v, out, norm = ctx.saved_tensors
        anchors, num_own = ctx.anchors, ctx.num_own
        slope, seen_T = slope.contiguous(), anchors.seen_T.view(torch.uint8)
        num_rows, num_query, dim = q.shape
        num_kv, scale, shape = k.shape[1], dim**-0.5, _shape(q, k)
        q_slope, k_slope, v_slope = torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v)
        own_slopes = [torch.zeros_like(x) if num_own else x for x in (own_k, own_v)]
        if len(k) and num_rows:
            pull = torch.zeros_like(norm)
            _query_slopes[triton.cdiv(len(k), _ROWS), num_query](
                q, k, v, own_k, own_v, anchors.place_T, anchors.begin_T, seen_T, out, norm,
                slope, pull, q_slope,
                len(k), num_rows, scale, num_own, ROWS=_ROWS, KEYS=_KEYS, **shape,
            )  # fmt: skip
            _key_slopes[triton.cdiv(len(k), _KEYS), num_kv](
                q, k, v, anchors.place_T, anchors.begin_T, anchors.end_T, seen_T, norm,
                slope, pull, k_slope, v_slope, len(k), scale, ROWS=_ROWS, KEYS=_KEYS, **shape,
            )  # fmt: skip
            if num_own:
                _own_slopes[triton.cdiv(num_rows, _OWN_ROWS), num_kv, num_own](
                    q, own_k, own_v, norm, slope, pull, *own_slopes,
                    num_rows, scale, ROWS=_OWN_ROWS, **shape,
                )  # fmt: skip
        own = [x for stacked in own_slopes for x in stacked.unbind()] if num_own else []
        return (q_slope, k_slope, v_slope, None, *own)


def attend_chains(
    q: Tensor, k: Tensor, v: Tensor, own_k: list[Tensor], own_v: list[Tensor], anchors: Anchors
) -> Tensor:
    """See ``specops.chain_attention.attend_chains``."""
    mixed: Tensor = _AttendChains.apply(  # type: ignore[no-untyped-call]
        q, k, v, anchors, *own_k, *own_v
    )
    return mixed


def can_attend(head_dim: int) -> bool:
    """The kernels take heads of this size."""
    return 16 <= head_dim <= 128 and head_dim & (head_dim - 1) == 0


def _shape(q: Tensor, k: Tensor) -> dict[str, int]:
    num_query, dim = q.shape[1:]
    group = num_query // k.shape[1]
    return {"NUM_QUERY": num_query, "GROUP": group, "D": dim, "num_warps": 4, "num_stages": 2}
