"""Products of a few rows with a large weight, fused with their neighbours in a decoder layer.

The torch definitions. A decode step of few rows is bound by reading the weights, so a kernel that
equals these reads each weight once and computes everything else alongside.

Shapes: M rows, K inputs, N outputs, P partial sums of a row's squares.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Norm:
    """An RMSNorm (Zhang & Sennrich 2019) without a bias, as in Llama and Qwen3, or in Gemma."""

    weight_K: Tensor
    """In the dtype of the rows: they are rounded before they are multiplied (Llama). In float32:
    only after (Gemma)."""
    eps: float


def rms_norm(x_MK: Tensor, norm: Norm, squares_MP: Tensor | None = None) -> Tensor:
    """``weight * x / rms(x)``, rounded as in Hugging Face: computed in float32, rounded to the
    dtype of x, then multiplied by the weight; with a float32 weight, rounded at the end alone.

    Args:
        x_MK: [..., K] floating.
        squares_MP: [..., P] float32 partial sums of each row's squares; ``None``: computed here.
    """
    if x_MK.dtype == torch.float32 and not x_MK.is_cuda:  # nothing is rounded between operations
        return (x_MK * norm.weight_K).div_(root_mean_square(x_MK, norm.eps))
    wide = x_MK.float()
    if squares_MP is None:
        squares_MP = wide.pow(2)
    mean = squares_MP.sum(dim=-1, keepdim=True) / x_MK.shape[-1]
    scaled = wide * torch.rsqrt(mean + norm.eps)
    if norm.weight_K.dtype == torch.float32:
        return (norm.weight_K * scaled).to(x_MK.dtype)
    return norm.weight_K * scaled.to(x_MK.dtype)


def root_mean_square(x_MK: Tensor, eps: float) -> Tensor:
    """``sqrt(mean(x ** 2) + eps)``, [..., 1]. Three small operations on a CPU, where torch's own
    RMSNorm is seven."""
    norm = torch.linalg.vector_norm(x_MK, dim=-1, keepdim=True)
    return torch.hypot(norm * x_MK.shape[-1] ** -0.5, _root(eps))


@cache
def _root(eps: float) -> Tensor:
    with torch.inference_mode(False):  # it is used with gradients, too
        return torch.tensor(math.sqrt(eps))


def gelu_gate(gate_up_M2N: Tensor) -> Tensor:
    """``gelu(gate) * up`` with the approximation by tanh (Gemma); otherwise as ``silu_gate``."""
    gate, up = gate_up_M2N.chunk(2, dim=-1)
    return torch.nn.functional.gelu(gate, approximate="tanh") * up


def silu_gate(gate_up_M2N: Tensor) -> Tensor:
    """``silu(gate) * up``; the first half of each row is the gate. [M, 2N] -> [M, N]."""
    gate, up = gate_up_M2N.chunk(2, dim=-1)
    return torch.nn.functional.silu(gate) * up


def few_row_linear(
    x_MK: Tensor,
    weight_NK: Tensor,
    norm: Norm | None = None,
    squares_MP: Tensor | None = None,
    *,
    gated: bool = False,
    out: Tensor | None = None,
) -> Tensor:
    """``norm(x) @ weight.T``, followed by ``silu_gate`` if ``gated``.

    Args:
        x_MK: [M, K]; rows need not be adjacent.
        weight_NK: [N, K] of the same dtype, or [2N, K] if ``gated``: gate rows, then up rows.
        norm: applied to x first.
        squares_MP: see ``rms_norm``.
        out: [M, N], written and returned; float32 holds the rounded product exactly.

    Returns:
        [M, N], in x's dtype if ``out`` is not given.
    """
    x = x_MK if norm is None else rms_norm(x_MK, norm, squares_MP)
    product = torch.nn.functional.linear(x, weight_NK)
    if gated:
        product = silu_gate(product)
    return product if out is None else out.copy_(product)


def few_row_residual(
    x_MK: Tensor, weight_NK: Tensor, residual_MN: Tensor, out: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """``residual + x @ weight.T``, and its squares for the next norm.

    Args:
        residual_MN: [M, N]; rows need not be adjacent.
        out: [M, N], written and returned; may be the residual itself.

    Returns:
        The sum, [M, N] in x's dtype, and its squares, [M, P] float32, for ``rms_norm``.
    """
    total = residual_MN + torch.nn.functional.linear(x_MK, weight_NK)
    squares = total.float().pow(2).sum(dim=-1, keepdim=True)
    return total if out is None else out.copy_(total), squares
