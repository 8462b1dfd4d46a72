"""Kernels for ``specops.distill`` on a block of logits; the definitions are its ``target_of``,
``judge_`` and ``judge_labels``.

One program processes one row. ``_judge`` makes three passes: the student's softmax, the sums of the
loss, and the gradient, which it writes over the student's logits. All sums are float32.

Shapes as in ``specops.distill``.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from specops.distill import (
    ETA,
    MIN_MASS,
    MIN_PROB,
    Blocks,
    LabelFigures,
    LossKind,
    RowFigures,
    Rows,
)

_BLOCK = 2048
_NUM_WARPS = 8  # 8 logits per thread fit 64 registers, so four rows per multiprocessor
_LOWEST = tl.constexpr(-1.0e38)
_KINDS: dict[LossKind, int] = {"forward_kl": 0, "total_variation": 1, "lk": 2, "reverse_kl": 3}
_LOG_MIN_PROB = tl.constexpr(math.log(MIN_PROB))


@triton.jit
def _log_norm(
    row_ptr, num_cols, softcap, temperature,
    HAS_SOFTCAP: tl.constexpr, HAS_TEMPERATURE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """(logsumexp, maximum) of one row. Every lane keeps its own pair until the end."""
    top = tl.full([BLOCK], _LOWEST, tl.float32)
    total = tl.zeros([BLOCK], tl.float32)
    for start in range(0, num_cols, BLOCK):
        col = start + tl.arange(0, BLOCK)
        is_col = col < num_cols
        x = tl.load(row_ptr + col, mask=is_col, other=0.0).to(tl.float32)
        x = _transformed(x, softcap, temperature, HAS_SOFTCAP, HAS_TEMPERATURE)
        x = tl.where(is_col, x, float("-inf"))
        higher = tl.maximum(top, x)
        total = total * tl.exp(top - higher) + tl.exp(x - higher)
        top = higher
    highest = tl.max(top, axis=0)
    return highest + tl.log(tl.sum(total * tl.exp(top - highest), axis=0)), highest


@triton.jit
def _transformed(x, softcap, temperature, HAS_SOFTCAP: tl.constexpr, HAS_TEMPERATURE: tl.constexpr):
    if HAS_SOFTCAP:
        x = softcap * (2 * tl.sigmoid(2 * x / softcap) - 1)
    if HAS_TEMPERATURE:
        x = x / temperature
    return x


@triton.jit
def _log_norms(
    logits_ptr, temperature_ptr, log_norm_ptr, ids_ptr, picked_ptr, num_cols, num_picked, stride,
    softcap, HAS_IDS: tl.constexpr, HAS_SOFTCAP: tl.constexpr, HAS_TEMPERATURE: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Process one teacher row; with ``HAS_IDS``, also write its logits at these ids, which several
    student rows read twice each."""
    row = tl.program_id(0).to(tl.int64)
    temperature = 1.0
    if HAS_TEMPERATURE:
        temperature = tl.load(temperature_ptr + row)
    log_norm, _ = _log_norm(
        logits_ptr + row * stride, num_cols, softcap, temperature,
        HAS_SOFTCAP, HAS_TEMPERATURE, BLOCK,
    )  # fmt: skip
    tl.store(log_norm_ptr + row, log_norm)
    if HAS_IDS:
        for start in range(0, num_picked, BLOCK):
            place = start + tl.arange(0, BLOCK)
            ids = tl.load(ids_ptr + place, mask=place < num_picked, other=0)
            x = tl.load(logits_ptr + row * stride + ids, mask=place < num_picked, other=0.0)
            tl.store(picked_ptr + row * num_picked + place, x, mask=place < num_picked)


@triton.jit
def _labels(
    scores_ptr, label_ptr, known_ptr, prob_ptr, agrees_ptr, num_cols, stride, BLOCK: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    own_ptr = scores_ptr + row * stride
    log_norm, highest = _log_norm(own_ptr, num_cols, 0.0, 1.0, False, False, BLOCK)
    known = tl.load(known_ptr + row) != 0
    at_label = tl.load(own_ptr + tl.load(label_ptr + row)).to(tl.float32)
    tl.store(prob_ptr + row, tl.where(known, tl.exp(at_label - log_norm), 0.0))
    # Maxima leave NaN out on a GPU, sums do not.
    agrees = known & (at_label >= highest) & (log_norm == log_norm)
    tl.store(agrees_ptr + row, agrees.to(tl.uint8))


@triton.jit
def _both(
    own_ptr, seen_ptr, start, num_cols, own_norm, seen_norm, softcap, temperature,
    HAS_SOFTCAP: tl.constexpr, HAS_TEMPERATURE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Logits and probabilities of the student, then of the teacher; 0 past the end."""
    col = start + tl.arange(0, BLOCK)
    is_col = col < num_cols
    s = tl.load(own_ptr + col, mask=is_col, other=0.0).to(tl.float32)
    t = tl.load(seen_ptr + col, mask=is_col, other=0.0).to(tl.float32)
    t = _transformed(t, softcap, temperature, HAS_SOFTCAP, HAS_TEMPERATURE)
    q = tl.where(is_col, tl.exp(s - own_norm), 0.0)
    p = tl.where(is_col, tl.exp(t - seen_norm), 0.0)
    return s, q, t, p


@triton.jit
def _judge(
    scores_ptr, teacher_ptr, teacher_norm_ptr, teacher_row_ptr, temperature_ptr,
    label_ptr, known_ptr, weight_ptr, loss_ptr, alpha_ptr, prob_ptr, agrees_ptr,
    num_cols, stride, teacher_stride, softcap, eta, min_mass,
    HAS_ROW: tl.constexpr, HAS_SOFTCAP: tl.constexpr, HAS_TEMPERATURE: tl.constexpr,
    SLOPES: tl.constexpr, KIND: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Process one student row. ``KIND``: see ``_KINDS``. Only ``SLOPES`` overwrites the logits."""
    row = tl.program_id(0).to(tl.int64)
    seen = row
    if HAS_ROW:
        seen = tl.load(teacher_row_ptr + row)
    own_ptr = scores_ptr + row * stride
    seen_ptr = teacher_ptr + seen * teacher_stride
    temperature = 1.0
    if HAS_TEMPERATURE:
        temperature = tl.load(temperature_ptr + seen)
    seen_norm = tl.load(teacher_norm_ptr + seen)
    own_norm, highest = _log_norm(own_ptr, num_cols, 0.0, 1.0, False, False, BLOCK)

    known = tl.load(known_ptr + row) != 0
    at_label = tl.load(own_ptr + tl.load(label_ptr + row)).to(tl.float32)
    tl.store(prob_ptr + row, tl.where(known, tl.exp(at_label - own_norm), 0.0))
    # Maxima leave NaN out on a GPU, sums do not.
    agrees = known & (at_label >= highest) & (own_norm == own_norm)
    tl.store(agrees_ptr + row, agrees.to(tl.uint8))

    masses = tl.zeros([BLOCK], tl.float32)
    crosses = tl.zeros([BLOCK], tl.float32)
    overlaps = tl.zeros([BLOCK], tl.float32)
    belows = tl.zeros([BLOCK], tl.float32)
    if KIND == 3:
        reverses = tl.zeros([BLOCK], tl.float32)
    for start in range(0, num_cols, BLOCK):
        s, q, t, p = _both(
            own_ptr, seen_ptr, start, num_cols, own_norm, seen_norm, softcap, temperature,
            HAS_SOFTCAP, HAS_TEMPERATURE, BLOCK,
        )  # fmt: skip
        masses += p
        crosses += tl.where(p > 0, p * (t - s), 0.0)
        # Not tl.minimum: on a GPU that is p where q is NaN, so broken logits would overlap fully.
        overlaps += tl.where(p < q, p, q)
        belows += tl.where(q < p, q, 0.0)
        if KIND == 3:
            reverses += q * (s - tl.maximum(t, seen_norm + _LOG_MIN_PROB))
    mass = tl.maximum(tl.sum(masses, axis=0), min_mass)
    alpha = tl.sum(overlaps, axis=0)
    below = tl.sum(belows, axis=0)
    # sum p' (log p' - log q) with log p' = t - seen_norm - log(mass) and log q = s - own_norm
    kl = tl.sum(crosses, axis=0) / mass - seen_norm - tl.log(mass) + own_norm
    share = 1.0
    if KIND == 1:
        share = 0.0
    if KIND == 2:
        share = tl.exp(-eta * alpha)
    rest = 1.0 - share
    if KIND == 3:
        # sum q (log q - log p') with log q = s - own_norm; q sums to 1
        shift = seen_norm + tl.log(mass) - own_norm
        reverse = tl.sum(reverses, axis=0) + shift
        tl.store(loss_ptr + row, reverse)
    else:
        tl.store(loss_ptr + row, share * kl + rest * (1.0 - alpha))
    tl.store(alpha_ptr + row, alpha)

    if SLOPES:
        weight = tl.load(weight_ptr + row)
        pull = share + rest * below
        for start in range(0, num_cols, BLOCK):
            s, q, t, p = _both(
                own_ptr, seen_ptr, start, num_cols, own_norm, seen_norm, softcap, temperature,
                HAS_SOFTCAP, HAS_TEMPERATURE, BLOCK,
            )  # fmt: skip
            if KIND == 3:
                ratio = s - tl.maximum(t, seen_norm + _LOG_MIN_PROB) + shift
                slope = weight * q * (ratio - reverse)
            else:
                slope = weight * (q * (pull - tl.where(q < p, rest, 0.0)) - (share / mass) * p)
            col = start + tl.arange(0, BLOCK)
            tl.store(own_ptr + col, slope.to(own_ptr.dtype.element_ty), mask=col < num_cols)


class _TeacherBlock(NamedTuple):
    """The teacher's raw logits over the student's vocabulary, and what turns them into
    probabilities."""

    logits_RD: Tensor
    log_norm_R: Tensor
    softcap: float | None
    temperature_R: Tensor | None


def target_of(
    logits_RV: Tensor, ids_D: Tensor | None, softcap: float | None, temperature_R: Tensor | None
) -> _TeacherBlock:
    """See ``specops.distill.target_of``; the probabilities are computed where they are used."""
    num_rows, num_cols = logits_RV.shape
    heat = None if temperature_R is None else temperature_R.float().contiguous()
    log_norm = torch.empty(num_rows, dtype=torch.float32, device=logits_RV.device)
    num_picked = num_cols if ids_D is None else len(ids_D)
    picked = logits_RV if ids_D is None else logits_RV.new_empty((num_rows, num_picked))
    if num_rows:
        _log_norms[(num_rows,)](
            logits_RV, log_norm if heat is None else heat, log_norm,
            log_norm if ids_D is None else ids_D.contiguous(), picked,
            num_cols, num_picked, logits_RV.stride(0), softcap or 1.0,
            HAS_IDS=ids_D is not None, HAS_SOFTCAP=softcap is not None,
            HAS_TEMPERATURE=heat is not None, **_tile(num_cols),
        )  # fmt: skip
    return _TeacherBlock(picked, log_norm, softcap, heat)


def judge_(
    scores_ND: Tensor,
    target: _TeacherBlock,
    rows: Rows,
    weights_N: Tensor | None,
    kind: LossKind,
) -> RowFigures:
    """See ``specops.distill.judge_``; rows of both blocks of logits must be contiguous."""
    num_rows, num_cols = scores_ND.shape
    loss, alpha, prob = torch.empty((3, num_rows), dtype=torch.float32, device=scores_ND.device)
    agrees = torch.empty(num_rows, dtype=torch.uint8, device=scores_ND.device)
    unused = target.log_norm_R  # placeholder for pointers that are not read
    if num_rows:
        _judge[(num_rows,)](
            scores_ND, target.logits_RD, target.log_norm_R,
            unused if rows.teacher_row_N is None else rows.teacher_row_N.contiguous(),
            unused if target.temperature_R is None else target.temperature_R,
            rows.label_ids_N.contiguous(), rows.label_known_N.contiguous().view(torch.uint8),
            unused if weights_N is None else weights_N.contiguous(), loss, alpha, prob, agrees,
            num_cols, scores_ND.stride(0), target.logits_RD.stride(0), target.softcap or 1.0,
            ETA, MIN_MASS,
            HAS_ROW=rows.teacher_row_N is not None, HAS_SOFTCAP=target.softcap is not None,
            HAS_TEMPERATURE=target.temperature_R is not None,
            SLOPES=weights_N is not None, KIND=_KINDS[kind], **_tile(num_cols),
        )  # fmt: skip
    return RowFigures(loss, alpha, prob, agrees.view(torch.bool))


def judge_labels(scores_ND: Tensor, rows: Rows) -> LabelFigures:
    """See ``specops.distill.judge_labels``."""
    num_rows, num_cols = scores_ND.shape
    prob = torch.empty(num_rows, dtype=torch.float32, device=scores_ND.device)
    agrees = torch.empty(num_rows, dtype=torch.uint8, device=scores_ND.device)
    if num_rows:
        _labels[(num_rows,)](
            scores_ND, rows.label_ids_N.contiguous(),
            rows.label_known_N.contiguous().view(torch.uint8), prob, agrees,
            num_cols, scores_ND.stride(0), **_tile(num_cols),
        )  # fmt: skip
    return LabelFigures(prob, agrees.view(torch.bool))


def _tile(num_cols: int) -> dict[str, int]:
    block = min(_BLOCK, max(128, triton.next_power_of_2(num_cols)))
    return {"BLOCK": block, "num_warps": max(1, _NUM_WARPS * block // _BLOCK)}


BLOCKS = Blocks(target_of, judge_, judge_labels)
"""The kernels, as an argument of ``specops.distill.distill``."""
