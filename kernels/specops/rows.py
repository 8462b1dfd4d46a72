"""Row operations of a decoder between two products. The torch definitions.

Shapes: M rows, H hidden, N outputs, V vocabulary. ``rms_norm`` and ``silu_gate`` are in
``specops.linear``.
"""

from __future__ import annotations

import torch
from torch import Tensor

from specops.linear import Norm, rms_norm


def embed(ids_M: Tensor, table_VH: Tensor, out: Tensor) -> Tensor:
    """Look up rows of an embedding and write them to ``out``.

    Args:
        ids_M: [M] int64, each in 0..V-1 (not checked).
        out: [M, H]; rows need not be adjacent.

    Returns:
        [M, 1] float32, the sum of each row's squares, for ``rms_norm``.
    """
    out.copy_(torch.nn.functional.embedding(ids_M, table_VH))
    return out.float().pow(2).sum(dim=-1, keepdim=True)


def norm_pair(
    ids_M: Tensor,
    table_VH: Tensor,
    hidden_MH: Tensor,
    embed_norm: Norm,
    hidden_norm: Norm,
    *,
    hidden_first: bool = False,
) -> Tensor:
    """``(embed_norm(table[id]), hidden_norm(hidden))``, the input of a drafter's layer.

    Args:
        ids_M: [M] int64, each in 0..V-1 (not checked).
        hidden_MH: [M, H] in the table's dtype; rows need not be adjacent.
        hidden_first: the halves change places.

    Returns:
        [M, 2H] contiguous, rounded as by ``rms_norm``.
    """
    embeds = torch.nn.functional.embedding(ids_M, table_VH)
    halves = rms_norm(embeds, embed_norm), rms_norm(hidden_MH, hidden_norm)
    return torch.cat(halves[::-1] if hidden_first else halves, dim=-1)


def add_norm(
    residual_MH: Tensor, update_MH: Tensor | None, norm: Norm, out: Tensor | None
) -> Tensor:
    """``norm(residual + update)``; writes the sum to ``out``.

    Args:
        residual_MH: [M, H]; rows need not be adjacent.
        update_MH: [M, H] contiguous; ``None``: nothing to add.
        out: [M, H]; may be the residual itself. ``None`` if and only if there is no update.

    Returns:
        [M, H] contiguous.
    """
    if update_MH is not None:
        assert out is not None
        residual_MH = out.copy_(residual_MH + update_MH)
    return rms_norm(residual_MH, norm)


def linear_add_norm(
    x_MK: Tensor, weight_NK: Tensor, residual_MN: Tensor, norm: Norm, out: Tensor
) -> Tensor:
    """``norm(residual + x @ weight.T)``; writes the sum to ``out``.

    Args:
        residual_MN: [M, N]; rows need not be adjacent.
        out: [M, N]; may be the residual itself.

    Returns:
        [M, N] contiguous.
    """
    return add_norm(residual_MN, torch.nn.functional.linear(x_MK, weight_NK), norm, out)
