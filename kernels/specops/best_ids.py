"""Greedy choice: the id of the largest logit of each row. The torch definition.

Shapes: N rows, V vocabulary, D draft vocabulary.
"""

from __future__ import annotations

from torch import Tensor


def best_ids(logits: Tensor, d2t_D: Tensor | None = None) -> Tensor:
    """The id of the largest logit of each row; the lowest one wins ties, NaN is above all.

    Args:
        logits: [..., V] of any float dtype.
        d2t_D: [D] int64, target id minus draft id, where V is a reduced draft vocabulary.

    Returns:
        [...] int64 target ids.
    """
    ids = logits.argmax(dim=-1)
    return ids if d2t_D is None else ids + d2t_D[ids]
