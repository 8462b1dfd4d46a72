"""Row operations of a decoder layer between two products, with gradients: the torch definitions.

In an update these are bound by memory. torch computes an RMSNorm whose weight is float32 and whose
rows are bfloat16 in a dozen passes, six of them over float32 copies; each of the kernels in
``trained_rows_triton`` reads its inputs and writes its output once, and its backward pass likewise.

Shapes: rows of any leading dimensions, H hidden, I inner size, D head dimension.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional


def rms_norm(x: Tensor, weight_H: Tensor, eps: float) -> Tensor:
    """``weight * x / sqrt(mean(x ** 2) + eps)``, in the dtype of x and rounded once.

    Args:
        x: [..., H].
        weight_H: of any dtype.
    """
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    scale = torch.rsqrt(wide.square().mean(dim=-1, keepdim=True) + eps)
    return (wide * scale * weight_H).to(x.dtype)


def silu_gate(gate_up: Tensor) -> Tensor:
    """``silu(gate) * up`` [..., I] of both behind each other [..., 2 I]."""
    gate, up = gate_up.chunk(2, dim=-1)
    return functional.silu(gate) * up


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding, half-split layout.

    Args:
        x: [..., heads, D].
        cos, sin: [..., 1, D].
    """
    half = x.shape[-1] // 2
    swapped = torch.cat((-x[..., half:], x[..., :half]), dim=-1)
    return x * cos + swapped * sin
