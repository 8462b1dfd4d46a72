"""The operations of a decoder layer in few launches: the definitions, or the kernels that equal
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
    """Each is called as its definition of that name."""

    embed: Callable[..., Tensor]
    norm_pair: Callable[..., Tensor]
    few_row_linear: Callable[..., Tensor]
    few_row_residual: Callable[..., tuple[Tensor, Tensor]]
    rope_and_write: Callable[..., Tensor]
    add_norm: Callable[..., Tensor]
    silu_gate: Callable[..., Tensor]


DEFINITIONS = Operations(
    rows.embed,
    rows.norm_pair,
    linear.few_row_linear,
    linear.few_row_residual,
    rope.rope_and_write,
    rows.add_norm,
    linear.silu_gate,
)


def few_rows_of(dtype: torch.dtype) -> int:
    """Rows up to which a product is best one kernel with all around it.

    Tensor cores multiply no exact float32: there the library's products of a few rows are faster
    (5 rows of the bundled target: 1.2 against 2.9 ms a step).
    """
    return 1 if dtype == torch.float32 else 16


def pick_operations(
    products: Sequence[tuple[Tensor, bool]],
    use_kernels: bool | None,
    overlap: bool | None,
    pinned: bool = False,
) -> Operations:
    """The operations for one decoder, whose launches follow each other on a stream.

    Args:
        products: weights of few-row products, each with whether it is gated; of one dtype and
            device.
        use_kernels: Triton kernels or torch definitions; ``None`` decides by the device.
        overlap: kernels start while the one before still runs; ``None``: where the card can.
        pinned: what is computed for a row does not depend on the rows beside it, in no bit.

    Raises:
        ValueError: pinned without kernels.
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
    if not pinned:  # pinned products split no columns
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
    )
