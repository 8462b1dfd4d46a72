"""Biases and penalties by lane: one kernel that adjusts logits, one that counts tokens. The
definitions are in ``specops.lane_penalties``.

For a request without biases or penalties, programs read two numbers and exit. Otherwise a program
processes one part of the vocabulary in all rows of its request: it reads the counts once and adds
the draft tokens row by row.

Shapes: R requests, K draft tokens, Q = K + 1, V vocabulary, B maximum number of biases.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from specops.lane_penalties import LaneRequests, LaneTables

_PART = 2048
"""Tokens per program."""
_MOST_QUERIES = 32
"""Tokens counted at once: one kernel serves all draft lengths up to this."""
_PER_REQUEST = ("num_biased_ptr", "penalizes_ptr")
"""Fields of one matrix, so their alignment depends on the batch size."""


@triton.jit
def _divided(x, y):
    """IEEE division: the plain float32 operator may be off by 2 units in the last place."""
    if x.dtype == tl.float32:
        return tl.div_rn(x, y)
    else:
        return x / y


@triton.jit(do_not_specialize=["lanes_stride", "K"], do_not_specialize_on_alignment=_PER_REQUEST)
def _adjust_part(
    logits_ptr, request_stride, row_stride, draft_ptr, lanes_ptr, lanes_stride,
    num_biased_ptr, penalizes_ptr, biased_ptr, bias_ptr, penalties_ptr, counts_ptr, vocab, K,
    BIASES: tl.constexpr, BIASES_UP: tl.constexpr, PART: tl.constexpr,
):  # fmt: skip
    """Adjust one part of all rows of one request."""
    request, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    num_biased = tl.load(num_biased_ptr + request)
    penalizes = tl.load(penalizes_ptr + request)
    if num_biased + penalizes == 0:
        return
    lane = tl.load(lanes_ptr + request * lanes_stride)
    rows_ptr = logits_ptr + request * request_stride
    dtype = logits_ptr.dtype.element_ty
    if num_biased > 0:
        place = tl.arange(0, BIASES_UP)
        is_listed = place < num_biased
        token = tl.load(biased_ptr + lane * BIASES + place, mask=is_listed, other=0)
        is_own = is_listed & (token // PART == part)
        bias = tl.load(bias_ptr + lane * BIASES + place, mask=is_own, other=0.0).to(dtype)
        for row in range(K + 1):
            at = rows_ptr + row * row_stride + token
            x = tl.load(at, mask=is_own, other=0.0)
            tl.store(at, x + bias, mask=is_own)
        # In the next loop, other threads read what these have written.
        tl.debug_barrier()
    if penalizes != 0:
        ids = part * PART + tl.arange(0, PART)
        is_token = ids < vocab
        presence = tl.load(penalties_ptr + lane * 3).to(dtype)
        frequency = tl.load(penalties_ptr + lane * 3 + 1).to(dtype)
        repetition = tl.load(penalties_ptr + lane * 3 + 2).to(dtype)
        counts = tl.load(counts_ptr + lane * vocab + ids, mask=is_token, other=0)
        for row in range(K + 1):
            at = rows_ptr + row * row_stride + ids
            x = tl.load(at, mask=is_token, other=0.0)
            scaled = tl.where(x > 0, _divided(x, tl.zeros_like(x) + repetition), x * repetition)
            x = tl.where(counts > 0, scaled, x)
            generated = counts >> 1
            x = x - frequency * generated.to(dtype)
            x = x - tl.where(generated > 0, presence, tl.zeros_like(x))
            tl.store(at, x, mask=is_token)
            drafted = tl.load(draft_ptr + request * K + row, mask=row < K, other=-1)
            counts += tl.where(ids == drafted, 2, 0)


@triton.jit(
    do_not_specialize=["lanes_stride", "num_query"], do_not_specialize_on_alignment=_PER_REQUEST
)
def _count_tokens(
    emitted_ptr, count_ptr, lanes_ptr, lanes_stride, penalizes_ptr, counts_ptr, vocab, num_query,
    QUERY_UP: tl.constexpr,
):  # fmt: skip
    """Count the emitted tokens of one request."""
    request = tl.program_id(0).to(tl.int64)
    if tl.load(penalizes_ptr + request) == 0:
        return
    lane = tl.load(lanes_ptr + request * lanes_stride)
    place = tl.arange(0, QUERY_UP)
    is_counted = (place < num_query) & (place < tl.load(count_ptr + request))
    token = tl.load(emitted_ptr + request * num_query + place, mask=is_counted, other=0)
    twice = tl.full((QUERY_UP,), 2, tl.int32)
    tl.atomic_add(counts_ptr + lane * vocab + token, twice, mask=is_counted)


def adjust_rows(
    logits_RQV: Tensor, draft_RK: Tensor, requests: LaneRequests, tables: LaneTables
) -> None:
    """See ``specops.lane_penalties.adjust_rows``, which has the same arguments; bitwise equal,
    never waits. Can be captured in a CUDA graph: biases and penalties are read at each replay.

    Raises:
        ValueError: the logits are neither float32 nor float64, shapes do not match, or a row of
            logits or another tensor is not contiguous.
    """
    num_requests, num_query, vocab_size = logits_RQV.shape
    if logits_RQV.dtype not in (torch.float32, torch.float64):
        raise ValueError(f"logits must be float32 or float64, got {logits_RQV.dtype}")
    if draft_RK.shape != (num_requests, num_query - 1):
        raise ValueError(
            f"draft must be [{num_requests}, {num_query - 1}] for logits "
            f"{tuple(logits_RQV.shape)}, got {tuple(draft_RK.shape)}"
        )
    if logits_RQV.stride(2) != 1 or not draft_RK.is_contiguous():
        raise ValueError("each row of logits, and the draft, must be contiguous")
    _check(num_requests, vocab_size, requests, tables)
    most_biases = tables.biased_LB.shape[1]
    if not num_requests:
        return
    _adjust_part[(num_requests, triton.cdiv(vocab_size, _PART))](
        logits_RQV, logits_RQV.stride(0), logits_RQV.stride(1), draft_RK,
        requests.lanes_R, requests.lanes_R.stride(0), requests.num_biased_R, requests.penalizes_R,
        tables.biased_LB, tables.bias_LB, tables.penalties_L3, tables.counts_LV,
        vocab_size, num_query - 1,
        BIASES=most_biases, BIASES_UP=triton.next_power_of_2(most_biases), PART=_PART,
        # No fused multiply-add: it would round once instead of twice.
        num_warps=4, enable_fp_fusion=False,
    )  # fmt: skip


def count_tokens(
    emitted_RQ: Tensor, count_R: Tensor, requests: LaneRequests, tables: LaneTables
) -> None:
    """See ``specops.lane_penalties.count_tokens``, which has the same arguments; one launch.

    Raises:
        ValueError: shapes do not match, or a tensor is not contiguous.
    """
    num_requests, num_query = emitted_RQ.shape
    if count_R.shape != (num_requests,):
        raise ValueError(f"count must be [{num_requests}], got {tuple(count_R.shape)}")
    if not (emitted_RQ.is_contiguous() and count_R.is_contiguous()):
        raise ValueError("emitted tokens and their count must be contiguous")
    vocab_size = tables.counts_LV.shape[1]
    _check(num_requests, vocab_size, requests, tables)
    if not num_requests:
        return
    _count_tokens[(num_requests,)](
        emitted_RQ, count_R, requests.lanes_R, requests.lanes_R.stride(0), requests.penalizes_R,
        tables.counts_LV, vocab_size, num_query,
        QUERY_UP=max(_MOST_QUERIES, triton.next_power_of_2(num_query)), num_warps=1,
    )  # fmt: skip


def _check(num_requests: int, vocab_size: int, requests: LaneRequests, tables: LaneTables) -> None:
    for name, per_request in (
        ("lanes", requests.lanes_R),
        ("num_biased", requests.num_biased_R),
        ("penalizes", requests.penalizes_R),
    ):
        if per_request.shape != (num_requests,) or per_request.dtype != torch.int64:
            raise ValueError(
                f"{name} must be [{num_requests}] int64, "
                f"got {tuple(per_request.shape)} {per_request.dtype}"
            )
    if not (requests.num_biased_R.is_contiguous() and requests.penalizes_R.is_contiguous()):
        raise ValueError("num_biased and penalizes must be contiguous")
    if tables.counts_LV.shape[1] != vocab_size:
        raise ValueError(
            f"counts cover {tables.counts_LV.shape[1]} tokens, the logits {vocab_size}"
        )
