"""Row operations of a decoder between two products, one kernel each; the definitions are in
``specops.rows`` and ``specops.linear``.

Shapes: M rows, H hidden (at most 16,384: one program holds a row), N outputs, V vocabulary.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from specops.linear import Norm
from specops.overlap_triton import let_next_start, wait_for_previous

_COLUMNS = 1024


@triton.jit(do_not_specialize_on_alignment=["ids_ptr"])
def _embed(ids_ptr, table_ptr, out_ptr, squares_ptr, width, out_stride, WIDTH: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, WIDTH)
    token = tl.load(ids_ptr + row)
    x = tl.load(table_ptr + token * width + column, mask=column < width, other=0.0)
    tl.store(out_ptr + row * out_stride + column, x, mask=column < width)
    wide = x.to(tl.float32)
    tl.store(squares_ptr + row, tl.sum(wide * wide, axis=0))


@triton.jit
def _normed(x, weight, width, eps):
    """``rms_norm`` of one row, in the dtype of x; columns past the end of the row hold 0."""
    wide = x.to(tl.float32)
    scale = tl.rsqrt(tl.sum(wide * wide, axis=0) / width + eps)
    scaled = wide * scale
    if weight.dtype != tl.float32:
        scaled = scaled.to(x.dtype).to(tl.float32)
    return (weight.to(tl.float32) * scaled).to(x.dtype)


@triton.jit(do_not_specialize_on_alignment=["ids_ptr"])
def _norm_pair(
    ids_ptr, table_ptr, hidden_ptr, embed_norm_ptr, hidden_norm_ptr, out_ptr,
    width, hidden_stride, embed_eps, hidden_eps,
    WIDTH: tl.constexpr, HIDDEN_FIRST: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """Compute one half of one row."""
    if OVERLAP:  # in this order: the next kernel may fetch weights, which a swap may have written
        wait_for_previous()
        let_next_start()
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, WIDTH)
    is_column = column < width
    if tl.program_id(1) == 0:
        token = tl.load(ids_ptr + row)
        x = tl.load(table_ptr + token * width + column, mask=is_column, other=0.0)
        weight = tl.load(embed_norm_ptr + column, mask=is_column, other=0.0)
        normed = _normed(x, weight, width, embed_eps)
        half = width if HIDDEN_FIRST else 0
        tl.store(out_ptr + row * 2 * width + half + column, normed, mask=is_column)
    else:
        x = tl.load(hidden_ptr + row * hidden_stride + column, mask=is_column, other=0.0)
        weight = tl.load(hidden_norm_ptr + column, mask=is_column, other=0.0)
        normed = _normed(x, weight, width, hidden_eps)
        half = 0 if HIDDEN_FIRST else width
        tl.store(out_ptr + row * 2 * width + half + column, normed, mask=is_column)


@triton.jit
def _add_norm(
    residual_ptr, update_ptr, norm_ptr, out_ptr, normed_ptr, width, residual_stride, out_stride,
    eps, WIDTH: tl.constexpr, ADD: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """Process one row."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, WIDTH)
    is_column = column < width
    if OVERLAP:
        let_next_start()
    weight = tl.load(norm_ptr + column, mask=is_column, other=0.0)
    if OVERLAP:
        wait_for_previous()
    x = tl.load(residual_ptr + row * residual_stride + column, mask=is_column, other=0.0)
    if ADD:
        update = tl.load(update_ptr + row * width + column, mask=is_column, other=0.0)
        x = (x.to(tl.float32) + update.to(tl.float32)).to(x.dtype)
        tl.store(out_ptr + row * out_stride + column, x, mask=is_column)
    normed = _normed(x, weight, width, eps)
    tl.store(normed_ptr + row * width + column, normed, mask=is_column)


@triton.jit
def _gate(
    gate_up_ptr, out_ptr, width,
    COLUMNS: tl.constexpr, GELU: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    if OVERLAP:
        let_next_start()
        wait_for_previous()
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    is_column = column < width
    place = gate_up_ptr + row * 2 * width + column
    gate = tl.load(place, mask=is_column, other=0.0)
    up = tl.load(place + width, mask=is_column, other=0.0)
    wide = gate.to(tl.float32)
    inner = wide
    if GELU:  # 0.5 (1 + tanh(u)) is the sigmoid of 2 u
        inner = 1.5957691216057308 * (wide + 0.044715 * wide * wide * wide)
        inner = tl.maximum(inner, -80.0)  # whose exponential is still finite
    value = (wide / (1.0 + tl.exp(-inner))).to(gate.dtype).to(tl.float32)
    tl.store(out_ptr + row * width + column, (value * up.to(tl.float32)).to(gate.dtype), is_column)


def _check(name: str, tensor: Tensor, shape: tuple[int, int]) -> None:
    if tensor.shape != shape or tensor.stride(1) != 1:
        raise ValueError(
            f"{name} must be {list(shape)} with adjacent columns, "
            f"got {list(tensor.shape)} with strides {tensor.stride()}"
        )


def _warps(width: int) -> int:
    return 4 if width <= 2048 else 8


def embed(ids_M: Tensor, table_VH: Tensor, out: Tensor) -> Tensor:
    """See ``specops.rows.embed``. Raises ValueError for a wrong shape or memory layout.

    Never overlaps: work before a step, such as a weight swap, has ended when this starts.
    """
    width = table_VH.shape[1]
    _check("out", out, (len(ids_M), width))
    if not (table_VH.is_contiguous() and ids_M.is_contiguous()):
        raise ValueError("ids and table must be contiguous")
    squares = torch.empty(len(ids_M), 1, dtype=torch.float32, device=out.device)
    _embed[(len(ids_M),)](
        ids_M, table_VH, out, squares, width, out.stride(0),
        WIDTH=triton.next_power_of_2(width), num_warps=_warps(width),
    )  # fmt: skip
    return squares


def norm_pair(
    ids_M: Tensor,
    table_VH: Tensor,
    hidden_MH: Tensor,
    embed_norm: Norm,
    hidden_norm: Norm,
    *,
    hidden_first: bool = False,
    overlap: bool = False,
) -> Tensor:
    """See ``specops.rows.norm_pair``. Raises ValueError for a wrong shape, dtype or memory layout.

    Args:
        overlap: the next kernel may start early (``specops.overlap_triton``).
    """
    width = table_VH.shape[1]
    _check("hidden", hidden_MH, (len(ids_M), width))
    if not (table_VH.is_contiguous() and ids_M.is_contiguous()):
        raise ValueError("ids and table must be contiguous")
    if hidden_MH.dtype != table_VH.dtype:
        raise ValueError(f"hidden is {hidden_MH.dtype}, the table {table_VH.dtype}")
    pair = hidden_MH.new_empty(len(ids_M), 2 * width)
    _norm_pair[(len(ids_M), 2)](
        ids_M, table_VH, hidden_MH, embed_norm.weight_K, hidden_norm.weight_K, pair,
        width, hidden_MH.stride(0), embed_norm.eps, hidden_norm.eps,
        WIDTH=triton.next_power_of_2(width), HIDDEN_FIRST=hidden_first, OVERLAP=overlap,
        num_warps=_warps(width), launch_pdl=overlap,
    )  # fmt: skip
    return pair


def add_norm(
    residual_MH: Tensor,
    update_MH: Tensor | None,
    norm: Norm,
    out: Tensor | None,
    *,
    overlap: bool = False,
) -> Tensor:
    """See ``specops.rows.add_norm``. Raises ValueError for a wrong shape or memory layout.

    Args:
        overlap: start while the previous kernel still runs (``specops.overlap_triton``).
    """
    num_rows, width = residual_MH.shape
    _check("residual", residual_MH, (num_rows, width))
    if (update_MH is None) != (out is None):
        raise ValueError("out must be given if and only if there is an update")
    if update_MH is not None and out is not None:
        _check("out", out, (num_rows, width))
        if update_MH.shape != residual_MH.shape or not update_MH.is_contiguous():
            raise ValueError(f"update must be contiguous {[num_rows, width]}")
    normed = residual_MH.new_empty(num_rows, width)
    _add_norm[(num_rows,)](
        residual_MH,
        residual_MH if update_MH is None else update_MH,
        norm.weight_K,
        residual_MH if out is None else out,
        normed, width, residual_MH.stride(0), 0 if out is None else out.stride(0), norm.eps,
        WIDTH=triton.next_power_of_2(width), ADD=update_MH is not None, OVERLAP=overlap,
        num_warps=_warps(width), launch_pdl=overlap,
    )  # fmt: skip
    return normed


def silu_gate(gate_up_M2N: Tensor, *, overlap: bool = False) -> Tensor:
    """See ``specops.linear.silu_gate``. Raises ValueError unless contiguous."""
    return _gated(gate_up_M2N, False, overlap)


def gelu_gate(gate_up_M2N: Tensor, *, overlap: bool = False) -> Tensor:
    """See ``specops.linear.gelu_gate``. Raises ValueError unless contiguous."""
    return _gated(gate_up_M2N, True, overlap)


def _gated(gate_up_M2N: Tensor, is_gelu: bool, overlap: bool) -> Tensor:
    num_rows, width = gate_up_M2N.shape[0], gate_up_M2N.shape[1] // 2
    if not gate_up_M2N.is_contiguous():
        raise ValueError("gate and up must be contiguous")
    out = gate_up_M2N.new_empty(num_rows, width)
    _gate[(num_rows, triton.cdiv(width, _COLUMNS))](
        gate_up_M2N, out, width,
        COLUMNS=_COLUMNS, GELU=is_gelu, OVERLAP=overlap, num_warps=4, launch_pdl=overlap,
    )  # fmt: skip
    return out
