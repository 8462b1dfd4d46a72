"""Products of a few rows together with what precedes and follows them: the torch definitions.

Where a model is small, a launch takes as long as the work in it. What stands between two products
is then part of one of their kernels, see ``specops.linear_triton``:

- the norms of a drafter's pair of inputs (``specops.rows.Pair``) and the joining of attention's
  parts (``specops.attention.AttendedParts``), which a product reads instead of rows;
- rotary embedding and the write to the pages (``few_row_heads``), and the choice of the largest
  logit (``few_row_best``), which it leaves instead of its rows.

Shapes: M rows, K inputs, N outputs, C = (Hq + 2 Hkv) * D, P partial sums of a row's squares.
"""

from __future__ import annotations

from torch import Tensor

from specops import cpu_operations, linear, rope
from specops.attention import AttendedParts, attended_rows
from specops.best_ids import BestParts, best_ids
from specops.linear import Norm
from specops.rope import HeadPlaces
from specops.rows import Pair


def rows_of(x: Tensor | Pair | AttendedParts) -> Tensor:
    """[M, K] what a product multiplies."""
    if isinstance(x, Pair):
        return x.normed()
    return attended_rows(x) if isinstance(x, AttendedParts) else x


def few_row_linear(
    x: Tensor | Pair,
    weight_NK: Tensor,
    norm: Norm | None = None,
    squares_MP: Tensor | None = None,
    *,
    gated: bool = False,
    out: Tensor | None = None,
) -> Tensor:
    """See ``specops.linear.few_row_linear``. A pair has norms of its own, and no other."""
    return linear.few_row_linear(rows_of(x), weight_NK, norm, squares_MP, gated=gated, out=out)


def few_row_residual(
    x: Tensor | AttendedParts, weight_NK: Tensor, residual_MN: Tensor, out: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """See ``specops.linear.few_row_residual``."""
    return linear.few_row_residual(rows_of(x), weight_NK, residual_MN, out)


def few_row_heads(
    x: Tensor | Pair,
    weight_CK: Tensor,
    to: HeadPlaces,
    norm: Norm | None = None,
    squares_MP: Tensor | None = None,
) -> Tensor:
    """``specops.rope.rope_and_write`` behind ``few_row_linear``.

    Returns:
        Queries, [M, Hq, D].
    """
    product = few_row_linear(x, weight_CK, norm, squares_MP)
    is_ours = isinstance(to.table, cpu_operations.RopeRows)
    write = cpu_operations.rope_and_write if is_ours else rope.rope_and_write
    return write(product, to.heads, to.table, to.positions_T, to.slots_T, to.keys, to.values)


def few_row_best(
    x_MK: Tensor,
    weight_NK: Tensor,
    norm: Norm | None = None,
    squares_MP: Tensor | None = None,
) -> BestParts:
    """The largest logits of ``few_row_linear``, for ``specops.best_ids.join_best``; the logits
    themselves are not written.

    Returns:
        Parts of each row, as many as the kernel likes: here one.
    """
    logits = few_row_linear(x_MK, weight_NK, norm, squares_MP)
    ids = best_ids(logits)[:, None]
    return BestParts(logits.gather(1, ids).float(), ids.int())
