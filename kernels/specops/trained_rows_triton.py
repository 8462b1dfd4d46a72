"""Kernels for ``specops.trained_rows``, which has the definitions. All sums are float32.

Shapes: N rows, H hidden, I inner size, D head dimension.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

_WIDEST = 16_384
"""Columns of a row that one program holds."""
_PROGRAMS = 1024
"""Programs of a norm's backward pass: each sums the weight's gradient over its rows, about eight on
every multiprocessor of an H200."""
_COLUMNS = 1024


# ---- RMSNorm -------------------------------------------------------------------------------------


@triton.jit
def _norm(x_ptr, weight_ptr, out_ptr, scale_ptr, width, eps, WIDTH: tl.constexpr):
    """Process one row; ``scale`` is the reciprocal of its root mean square."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, WIDTH)
    is_column = column < width
    x = tl.load(x_ptr + row * width + column, mask=is_column, other=0.0).to(tl.float32)
    weight = tl.load(weight_ptr + column, mask=is_column, other=0.0).to(tl.float32)
    scale = tl.rsqrt(tl.sum(x * x, axis=0) / width + eps)
    out = (x * scale * weight).to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + row * width + column, out, mask=is_column)
    tl.store(scale_ptr + row, scale)


@triton.jit(do_not_specialize=["num_rows"])
def _norm_slopes(
    x_ptr, weight_ptr, scale_ptr, slope_ptr, x_slope_ptr, weight_slope_ptr, num_rows, width,
    WIDTH: tl.constexpr, WANTS_X: tl.constexpr,
):  # fmt: skip
    """Process every ``num_programs``-th row; the weight's gradient is a partial sum of them."""
    column = tl.arange(0, WIDTH)
    is_column = column < width
    weight = tl.load(weight_ptr + column, mask=is_column, other=0.0).to(tl.float32)
    total = tl.zeros([WIDTH], tl.float32)
    stride = tl.zeros([WIDTH], tl.int64) + width
    for row in range(tl.program_id(0), num_rows, tl.num_programs(0)):
        at = stride * row + column
        x = tl.load(x_ptr + at, mask=is_column, other=0.0).to(tl.float32)
        slope = tl.load(slope_ptr + at, mask=is_column, other=0.0).to(tl.float32)
        scale = tl.load(scale_ptr + row)
        unit = x * scale
        total += slope * unit
        if WANTS_X:
            pulled = slope * weight
            mean = tl.sum(pulled * unit, axis=0) / width
            found = (scale * (pulled - unit * mean)).to(x_slope_ptr.dtype.element_ty)
            tl.store(x_slope_ptr + at, found, mask=is_column)
    place = tl.program_id(0).to(tl.int64) * width + column
    tl.store(weight_slope_ptr + place, total, mask=is_column)


class _RmsNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        x = x.contiguous()
        width = x.shape[-1]
        num_rows = x.numel() // width
        out = torch.empty_like(x)
        scale = torch.empty(num_rows, dtype=torch.float32, device=x.device)
        if num_rows:
            _norm[(num_rows,)](x, weight, out, scale, width, eps, **_held_row(width))
        ctx.save_for_backward(x, weight, scale)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, slope: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, scale = ctx.saved_tensors
        slope, width = slope.contiguous(), x.shape[-1]
        wants_x, num_rows = ctx.needs_input_grad[0], len(scale)
        x_slope = torch.empty_like(x) if wants_x else None
        programs = min(num_rows, _PROGRAMS)
        partial = torch.empty((programs, width), dtype=torch.float32, device=x.device)
        if num_rows:
            _norm_slopes[(programs,)](
                x, weight, scale, slope, x if x_slope is None else x_slope, partial,
                num_rows, width, WANTS_X=wants_x, **_held_row(width),
            )  # fmt: skip
        return x_slope, partial.sum(0).to(weight.dtype), None


def rms_norm(x: Tensor, weight_H: Tensor, eps: float) -> Tensor:
    """See ``specops.trained_rows.rms_norm``."""
    out: Tensor = _RmsNorm.apply(x, weight_H, eps)  # type: ignore[no-untyped-call]
    return out


def can_norm(x: Tensor) -> bool:
    """One program holds a row."""
    return 0 < x.shape[-1] <= _WIDEST


def _held_row(width: int) -> dict[str, int]:
    wide = triton.next_power_of_2(width)
    return {"WIDTH": wide, "num_warps": min(max(wide // 512, 1), 16)}


# ---- the gate of an MLP --------------------------------------------------------------------------


@triton.jit
def _gate(gate_up_ptr, out_ptr, width, BLOCK: tl.constexpr):
    """Process some columns of one row."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    is_column = column < width
    own_ptr = gate_up_ptr + row * 2 * width + column
    gate = tl.load(own_ptr, mask=is_column, other=0.0).to(tl.float32)
    up = tl.load(own_ptr + width, mask=is_column, other=0.0).to(tl.float32)
    out = (gate * tl.sigmoid(gate) * up).to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + row * width + column, out, mask=is_column)


@triton.jit
def _gate_slopes(gate_up_ptr, slope_ptr, found_ptr, width, BLOCK: tl.constexpr):
    """Process some columns of one row."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    is_column = column < width
    at = row * 2 * width + column
    gate = tl.load(gate_up_ptr + at, mask=is_column, other=0.0).to(tl.float32)
    up = tl.load(gate_up_ptr + at + width, mask=is_column, other=0.0).to(tl.float32)
    slope = tl.load(slope_ptr + row * width + column, mask=is_column, other=0.0).to(tl.float32)
    sigmoid = tl.sigmoid(gate)
    of_gate = slope * up * sigmoid * (1 + gate * (1 - sigmoid))
    dtype = found_ptr.dtype.element_ty
    tl.store(found_ptr + at, of_gate.to(dtype), mask=is_column)
    tl.store(found_ptr + at + width, (slope * gate * sigmoid).to(dtype), mask=is_column)


class _SiluGate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate_up: Tensor) -> Tensor:
        gate_up = gate_up.contiguous()
        width = gate_up.shape[-1] // 2
        out = gate_up.new_empty((*gate_up.shape[:-1], width))
        if out.numel():
            _gate[_grid(out)](gate_up, out, width, BLOCK=_COLUMNS)
        ctx.save_for_backward(gate_up)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, slope: Tensor) -> Tensor:
        (gate_up,) = ctx.saved_tensors
        slope, found = slope.contiguous(), torch.empty_like(gate_up)
        if slope.numel():
            width = slope.shape[-1]
            _gate_slopes[_grid(slope)](gate_up, slope, found, width, BLOCK=_COLUMNS)
        return found


def silu_gate(gate_up: Tensor) -> Tensor:
    """See ``specops.trained_rows.silu_gate``."""
    out: Tensor = _SiluGate.apply(gate_up)  # type: ignore[no-untyped-call]
    return out


def _grid(rows: Tensor) -> tuple[int, int]:
    width = rows.shape[-1]
    return rows.numel() // width, triton.cdiv(width, _COLUMNS)


# ---- rotary embedding ----------------------------------------------------------------------------


@triton.jit
def _rotate(
    x_ptr, cos_ptr, sin_ptr, out_ptr, num_heads, row_stride,
    D: tl.constexpr, HEADS: tl.constexpr, SLOPES: tl.constexpr,
):  # fmt: skip
    """Process one row, or with ``SLOPES`` its gradient. Heads of a row are adjacent."""
    row = tl.program_id(0).to(tl.int64)
    head = tl.arange(0, HEADS)[:, None]
    half = tl.arange(0, D // 2)[None, :]
    is_head = head < num_heads
    at = head * D + half
    own_ptr = x_ptr + row * row_stride + at
    first = tl.load(own_ptr, mask=is_head, other=0.0).to(tl.float32)
    second = tl.load(own_ptr + D // 2, mask=is_head, other=0.0).to(tl.float32)
    angle = row * D + half
    cos_1 = tl.load(cos_ptr + angle).to(tl.float32)
    cos_2 = tl.load(cos_ptr + angle + D // 2).to(tl.float32)
    sin_1 = tl.load(sin_ptr + angle).to(tl.float32)
    sin_2 = tl.load(sin_ptr + angle + D // 2).to(tl.float32)
    if SLOPES:
        one = first * cos_1 + second * sin_2
        two = second * cos_2 - first * sin_1
    else:
        one = first * cos_1 - second * sin_1
        two = second * cos_2 + first * sin_2
    dtype = out_ptr.dtype.element_ty
    into_ptr = out_ptr + row * num_heads * D + at
    tl.store(into_ptr, one.to(dtype), mask=is_head)
    tl.store(into_ptr + D // 2, two.to(dtype), mask=is_head)


def _rotated(x_NhD: Tensor, cos_ND: Tensor, sin_ND: Tensor, slopes: bool) -> Tensor:
    num_rows, num_heads, dim = x_NhD.shape
    if x_NhD.stride(2) != 1 or x_NhD.stride(1) != dim:
        x_NhD = x_NhD.contiguous()
    out = torch.empty((num_rows, num_heads, dim), dtype=x_NhD.dtype, device=x_NhD.device)
    if out.numel():
        _rotate[(num_rows,)](
            x_NhD, cos_ND, sin_ND, out, num_heads, x_NhD.stride(0),
            D=dim, HEADS=triton.next_power_of_2(num_heads), SLOPES=slopes,
        )  # fmt: skip
    return out


class _Rotate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _rotated(x, cos, sin, slopes=False)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, slope: Tensor) -> tuple[Tensor | None, ...]:
        cos, sin = ctx.saved_tensors
        return _rotated(slope, cos, sin, slopes=True), None, None


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """See ``specops.trained_rows.rotate``; x is [N, heads, D], cos and sin get no gradient."""
    angles = (angle.expand(len(x), 1, -1)[:, 0].contiguous() for angle in (cos, sin))
    out: Tensor = _Rotate.apply(x, *angles)  # type: ignore[no-untyped-call]
    return out


def can_rotate(x: Tensor, cos: Tensor) -> bool:
    """The kernel takes rows of this form."""
    dim = x.shape[-1]
    is_row = x.dim() == 3 and cos.dim() == 3 and cos.shape[-1] == dim
    return is_row and dim >= 4 and dim & (dim - 1) == 0 and x.shape[1] * dim <= _WIDEST
