"""Greedy decoding's choice, the id of each row's largest logit: the torch definition.

Shapes: N rows, V vocabulary, D draft vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor

from specops.draft_sampling import Instead
from specops.verify_logits import UNSOUND


def best_ids(
    logits: Tensor,
    d2t_D: Tensor | None = None,
    *,
    is_target: bool = False,
    instead: Instead | None = None,
) -> Tensor:
    """The id of each row's largest logit. The lowest id wins ties; NaN ranks above everything.

    Args:
        logits: [..., V] of any float dtype.
        d2t_D: [D] int64, target id minus draft id; for logits over a reduced draft vocabulary.
        is_target: ``UNSOUND`` instead of the id of a NaN or an infinite logit.
        instead: target ids that are returned in place of the best ones; for logits [M, V].

    Returns:
        [...] int64 target ids.
    """
    ids = logits.argmax(dim=-1)
    if is_target:
        top = logits.gather(-1, ids[..., None])[..., 0]
        ids = torch.where(top.isfinite(), ids, UNSOUND)
    ids = ids if d2t_D is None else ids + d2t_D[ids]
    return ids if instead is None else torch.where(instead.is_taken_M, instead.tokens_M, ids)
