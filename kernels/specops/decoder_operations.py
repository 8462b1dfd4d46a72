"""The operations of a decoder layer, in few launches: torch definitions, or kernels that equal
them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from specops import cpu_operations, linear, rope, rows
from specops.rope import RopeTable


@dataclass(frozen=True, slots=True)
class Operations:
    """Every operation has the arguments of the definition of the same name."""

    embed: Callable[..., Tensor]
    norm_pair: Callable[..., Tensor]
    few_row_linear: Callable[..., Tensor]
    few_row_residual: Callable[..., tuple[Tensor, Tensor]]
    rope_rows: Callable[..., Any]
    """(table, positions) -> what ``rope_and_write`` of the same rows takes as its table."""
    rope_and_write: Callable[..., Tensor]
    add_norm: Callable[..., Tensor]
    linear: Callable[..., Tensor]
    """The product of many rows, (x [M, K], weight [N, K]) -> [M, N]."""
    linear_add_norm: Callable[..., Tensor]
    silu_gate: Callable[..., Tensor]
    gelu_gate: Callable[..., Tensor]


def _whole_table(table: RopeTable, _positions_T: Tensor) -> RopeTable:
    return table


DEFINITIONS = Operations(
    rows.embed,
    rows.norm_pair,
    linear.few_row_linear,
    linear.few_row_residual,
    _whole_table,
    rope.rope_and_write,
    rows.add_norm,
    torch.nn.functional.linear,
    rows.linear_add_norm,
    linear.silu_gate,
    linear.gelu_gate,
)
IN_FLOAT32 = replace(
    DEFINITIONS,
    rope_rows=cpu_operations.rope_rows,
    rope_and_write=cpu_operations.rope_and_write,
    linear_add_norm=cpu_operations.linear_add_norm,
    silu_gate=cpu_operations.silu_gate,
)
"""For a CPU."""
PACKED = replace(
    IN_FLOAT32,
    linear=cpu_operations.packed_linear,
    linear_add_norm=cpu_operations.packed_linear_add_norm,
)
"""For a CPU, with weights from ``cpu_operations.packed``."""


def has_kernels(operations: Operations) -> bool:
    """Whether they are kernels, not definitions."""
    return operations not in (DEFINITIONS, IN_FLOAT32, PACKED)


def few_rows_of(like: Tensor, use_kernels: bool | None = None) -> int:
    """Maximum number of rows for which a product fused with its neighbours beats the library, which
    computes it anyway if there are no kernels.

    Tensor cores do not multiply float32 exactly, so in float32 the library is faster for a few rows
    (5 rows of the bundled target: 1.2 ms a step instead of 2.9).

    Args:
        like: a weight.
        use_kernels: see ``pick_operations``.
    """
    if not (like.is_cuda if use_kernels is None else use_kernels):
        return 0
    return 1 if like.dtype == torch.float32 else 16


def _linear_add_norm(
    add_norm: Callable[..., Tensor],
    x_MK: Tensor,
    weight_NK: Tensor,
    residual_MN: Tensor,
    norm: linear.Norm,
    out: Tensor,
) -> Tensor:
    """``rows.linear_add_norm`` with a kernel for what follows the library's product."""
    return add_norm(residual_MN, torch.nn.functional.linear(x_MK, weight_NK), norm, out)


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
        is_wide = like.dtype == torch.float32 and like.device.type == "cpu"
        return IN_FLOAT32 if is_wide else DEFINITIONS
    from specops import linear_triton, overlap_triton, rope_triton, rows_triton

    if overlap is None:
        overlap = overlap_triton.can_overlap(like.device)
    product: dict[str, Any] = {"overlap": overlap, "pinned": pinned}
    if not pinned:  # pinned products are not split
        shapes = [(len(w) // (1 + gated), w.shape[1], gated) for w, gated in products]
        product["scratch"] = linear_triton.make_scratch(shapes, like.dtype, like.device)
    add_norm = partial(rows_triton.add_norm, overlap=overlap)
    return Operations(
        rows_triton.embed,
        partial(rows_triton.norm_pair, overlap=overlap),
        partial(linear_triton.few_row_linear, **product),
        partial(linear_triton.few_row_residual, **product),
        _whole_table,
        partial(rope_triton.rope_and_write, overlap=overlap),
        add_norm,
        torch.nn.functional.linear,
        partial(_linear_add_norm, add_norm),
        partial(rows_triton.silu_gate, overlap=overlap),
        partial(rows_triton.gelu_gate, overlap=overlap),
    )
