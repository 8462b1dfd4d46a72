"""Greedy decoding's choice, the id of each row's largest logit: the torch definitions.

Shapes: N rows, M rows of a product, P parts of a row, V vocabulary, D draft vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from specops.draft_sampling import Instead
from specops.verify_logits import UNSOUND


def best_ids(logits: Tensor, d2t_D: Tensor | None = None, *, is_target: bool = False) -> Tensor:
    """The id of each row's largest logit. The lowest id wins ties; NaN ranks above everything.

    Args:
        logits: [..., V] of any float dtype.
        d2t_D: [D] int64, target id minus draft id; for logits over a reduced draft vocabulary.
        is_target: ``UNSOUND`` instead of the id of a NaN or an infinite logit.

    Returns:
        [...] int64 target ids.
    """
    ids = logits.argmax(dim=-1)
    if is_target:
        top = logits.gather(-1, ids[..., None])[..., 0]
        ids = torch.where(top.isfinite(), ids, UNSOUND)
    return ids if d2t_D is None else ids + d2t_D[ids]


@dataclass(frozen=True, slots=True)
class BestParts:
    """The largest logit of each part of a row."""

    tops_MP: Tensor
    """[M, P] float32."""
    ids_MP: Tensor
    """[M, P] int32, its lowest id in the draft vocabulary."""


def join_best(
    parts: BestParts, d2t_D: Tensor | None = None, instead: Instead | None = None
) -> Tensor:
    """The id of each row's largest logit, as ``best_ids`` finds it in the whole row.

    Args:
        d2t_D: see ``best_ids``.

    Returns:
        [M] int64 target ids.
    """
    tops = parts.tops_MP
    best = tops.gather(1, tops.argmax(dim=1, keepdim=True))
    is_best = (tops == best) | (tops.isnan() & best.isnan())
    ids = parts.ids_MP.long().masked_fill(~is_best, torch.iinfo(torch.int64).max).amin(dim=1)
    ids = ids if d2t_D is None else ids + d2t_D[ids]
    return ids if instead is None else torch.where(instead.is_taken_M, instead.tokens_M, ids)
