"""The id of each row's largest logit, in two launches; see ``specops.best_ids``.

Several programs share a row. Each keeps 2,048 running maxima over its part, one per lane, and the
second launch combines the parts. Rows are split into just enough parts to fill a large GPU: with
few rows, many programs read each one; with many rows, each program reads a long run.

Shapes: N rows, V vocabulary, D draft vocabulary.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from specops.draft_sampling import Instead
from specops.overlap_triton import let_next_start, wait_for_previous
from specops.verify_logits import UNSOUND

_SPAN = 2048  # logits that a program reads at once
_MOST_PARTS = 128
_PROGRAMS = 1056  # 8 on each of an H200's 132 multiprocessors
_NONE = tl.constexpr(2**31 - 1)
_UNSOUND = tl.constexpr(UNSOUND)


@triton.jit
def _best(tops, ids, axis: tl.constexpr):
    """The largest number and the lowest id that has it; NaN ranks above everything."""
    is_nan = tops != tops
    nan_id = tl.min(tl.where(is_nan, ids, _NONE), axis=axis)
    top = tl.max(tl.where(is_nan, float("-inf"), tops), axis=axis)
    is_top = tops == tl.expand_dims(top, axis)
    best_id = tl.min(tl.where(is_top, ids, _NONE), axis=axis)
    has_nan = nan_id < _NONE
    return tl.where(has_nan, float("nan"), top), tl.where(has_nan, nan_id, best_id)


@triton.jit(do_not_specialize=["num_parts", "num_spans"])
def _best_of_part(
    logits_ptr, row_stride, tops_ptr, ids_ptr, vocab, num_parts, num_spans,
    SPAN: tl.constexpr, WIDE: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """Process one part of a row, ``num_spans`` spans."""
    if OVERLAP:
        let_next_start()
        wait_for_previous()
    row, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    start = part * num_spans * SPAN
    lane = tl.arange(0, SPAN)
    tops = tl.full([SPAN], float("-inf"), WIDE)
    ids = start + lane
    for first in tl.range(start, tl.minimum(start + num_spans * SPAN, vocab), SPAN, num_stages=3):
        id = first + lane
        x = tl.load(logits_ptr + row * row_stride + id, mask=id < vocab, other=float("-inf"))
        x = x.to(WIDE)
        is_better = (x > tops) | ((x != x) & (tops == tops))
        tops = tl.where(is_better, x, tops)
        ids = tl.where(is_better, id, ids)
    top, best_id = _best(tops[None, :], ids[None, :], 1)
    slot = row * num_parts + part + tl.arange(0, 1)
    tl.store(tops_ptr + slot, top)
    tl.store(ids_ptr + slot, best_id)


@triton.jit(
    do_not_specialize=["num_rows", "num_parts", "token_stride", "taken_stride"],
    do_not_specialize_on_alignment=["tokens_ptr", "is_taken_ptr"],
)
def _join_best(
    tops_ptr, part_ids_ptr, d2t_ptr, tokens_ptr, is_taken_ptr, ids_ptr, num_rows, num_parts,
    token_stride, taken_stride,
    ROWS: tl.constexpr, PARTS_UP: tl.constexpr, HAS_MAP: tl.constexpr, IS_TARGET: tl.constexpr,
    HAS_TOKENS: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """Combine the parts of ROWS rows and map the best id to the target's vocabulary."""
    if OVERLAP:
        let_next_start()
        wait_for_previous()
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    part = tl.arange(0, PARTS_UP)
    is_part = (row < num_rows)[:, None] & (part < num_parts)[None, :]
    slot = row[:, None] * num_parts + part[None, :]
    tops = tl.load(tops_ptr + slot, mask=is_part, other=float("-inf"))
    part_ids = tl.load(part_ids_ptr + slot, mask=is_part, other=_NONE)
    top, best_id = _best(tops, part_ids, 1)
    ids = best_id.to(tl.int64)
    if IS_TARGET:
        ids = tl.where(tl.abs(top) < float("inf"), ids, _UNSOUND)
    if HAS_MAP:
        ids += tl.load(d2t_ptr + ids, mask=row < num_rows, other=0)
    if HAS_TOKENS:
        is_taken = tl.load(is_taken_ptr + row * taken_stride, mask=row < num_rows, other=0)
        token = tl.load(tokens_ptr + row * token_stride, mask=row < num_rows, other=0)
        ids = tl.where(is_taken != 0, token, ids)
    tl.store(ids_ptr + row, ids, mask=row < num_rows)


def best_ids(
    logits: Tensor,
    d2t_D: Tensor | None = None,
    *,
    is_target: bool = False,
    instead: Instead | None = None,
    span: int = _SPAN,
    num_programs: int = _PROGRAMS,
    overlap: bool = False,
) -> Tensor:
    """See ``specops.best_ids.best_ids``. Can be captured in a CUDA graph.

    Args:
        span: logits a program reads at once, a power of two.
        num_programs: if there are fewer rows, they are split among about this many programs.
        overlap: start while the previous kernel still runs (``specops.overlap_triton``).

    Raises:
        ValueError: the logits are not contiguous, or rows are empty.
    """
    vocab_size = logits.shape[-1]
    if not logits.is_contiguous() or not vocab_size:
        raise ValueError(
            f"logits must be contiguous rows of at least one logit, "
            f"got {list(logits.shape)} by {logits.stride()}"
        )
    num_rows = logits.numel() // vocab_size
    ids = torch.empty(logits.shape[:-1], dtype=torch.int64, device=logits.device)
    if not num_rows:
        return ids
    spans = triton.cdiv(vocab_size, span)
    wanted = min(_MOST_PARTS, triton.cdiv(num_programs, num_rows))
    num_spans = triton.cdiv(spans, wanted)
    parts = triton.cdiv(spans, num_spans)
    is_double = logits.dtype == torch.float64
    wide = torch.float64 if is_double else torch.float32
    tops = torch.empty((num_rows, parts), dtype=wide, device=logits.device)
    part_ids = torch.empty((num_rows, parts), dtype=torch.int32, device=logits.device)
    _best_of_part[(num_rows, parts)](
        logits, vocab_size, tops, part_ids, vocab_size, parts, num_spans,
        SPAN=span, WIDE=tl.float64 if is_double else tl.float32, OVERLAP=overlap,
        num_warps=4, launch_pdl=overlap,
    )  # fmt: skip
    _join_best[(triton.cdiv(num_rows, 4),)](
        tops, part_ids, d2t_D,
        None if instead is None else instead.tokens_M,
        None if instead is None else instead.is_taken_M.view(torch.uint8),
        ids, num_rows, parts,
        0 if instead is None else instead.tokens_M.stride(0),
        0 if instead is None else instead.is_taken_M.stride(0),
        ROWS=4, PARTS_UP=_MOST_PARTS, HAS_MAP=d2t_D is not None, IS_TARGET=is_target,
        HAS_TOKENS=instead is not None, OVERLAP=overlap,
        num_warps=4, launch_pdl=overlap,
    )  # fmt: skip
    return ids
