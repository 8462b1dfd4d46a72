"""The operations of a decoder layer, in few launches: torch definitions, or kernels that equal
them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from specops import linear, rope, rows


@dataclass(frozen=True, slots=True)
class Operations:
    """Every operation has the arguments of the definition of the same name."""

    embed: Callable[..., Tensor]
    norm_pair: Callable[..., Tensor]
    few_row_linear: Callable[..., Tensor]
    few_row_residual: Callable[..., tuple[Tensor, Tensor]]
    rope_and_write: Callable[..., Tensor]
    add_norm: Callable[..., Tensor]
    silu_gate: Callable[..., Tensor]
    gelu_gate: Callable[..., Tensor]


DEFINITIONS = Operations(
    rows.embed,
    rows.norm_pair,
    linear.few_row_linear,
    linear.few_row_residual,
    rope.rope_and_write,
    rows.add_norm,
    linear.silu_gate,
    linear.gelu_gate,
)


def few_rows_of(dtype: torch.dtype) -> int:
    """Maximum number of rows for which a product fused with its neighbours beats the library.

    Tensor cores do not multiply float32 exactly, so in float32 the library is faster for a few rows
    (5 rows of the bundled target: 1.2 ms a step instead of 2.9).
    """
    return 1 if dtype == torch.float32 else 16


def pick_operations(
    products: Sequence[tuple[Tensor, bool]],
    use_kernels: bool | None,
    overlap: bool | None,
    pinned: bool = False,
) -> Operations:
    """The operations of one decoder, which launches them on a single stream.

    Args:
        products: (weight, is gated) of every few-row product; one dtype, one device.
        use_kernels: Triton kernels, or torch definitions; ``None``: kernels on a GPU.
        overlap: a kernel starts while the previous one still runs; ``None``: if the GPU can.
        pinned: a row's result is bitwise independent of the other rows.

    Raises:
        ValueError: ``pinned`` without kernels.
    """
    like = products[0][0]
    if not (like.is_cuda if use_kernels is None else use_kernels):
        if pinned:
            raise ValueError("pinned numerics need the kernels: the definitions call the library")
        return DEFINITIONS
    from specops import linear_triton, overlap_triton, rope_triton, rows_triton

    if overlap is None:
        overlap = overlap_triton.can_overlap(like.device)
    product: dict[str, Any] = {"overlap": overlap, "pinned": pinned}
    if not pinned:  # pinned products are not split
        shapes = [(len(w) // (1 + gated), w.shape[1], gated) for w, gated in products]
        product["scratch"] = linear_triton.make_scratch(shapes, like.dtype, like.device)
    return Operations(
        rows_triton.embed,
        partial(rows_triton.norm_pair, overlap=overlap),
        partial(linear_triton.few_row_linear, **product),
        partial(linear_triton.few_row_residual, **product),
        partial(rope_triton.rope_and_write, overlap=overlap),
        partial(rows_triton.add_norm, overlap=overlap),
        partial(rows_triton.silu_gate, overlap=overlap),
        partial(rows_triton.gelu_gate, overlap=overlap),
    )
