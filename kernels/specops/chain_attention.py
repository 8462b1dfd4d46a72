"""Attention of draft chains in training, with gradients: the torch definition.

A chain begins at an anchor, a position of a text, and has a row in each step. A row attends to the
keys of step 0 that its anchor sees, which are those of the anchor's piece up to itself, and to its
own chain's keys of the later steps so far.

Shapes: T positions, A rows, Hq/Hkv query/key heads, D head dimension, s own keys of a chain.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Anchors:
    """Which keys of step 0 the rows see."""

    place_T: Tensor
    """int32 row whose anchor is this position; -1: none."""
    begin_T: Tensor
    """int32 first position of the piece that this position is in."""
    end_T: Tensor
    """int32 position behind the last one of it."""
    seen_T: Tensor
    """bool: others than the position itself see its key."""


def anchors_of(segment_T: Tensor, seen_T: Tensor, anchor_A: Tensor) -> Anchors:
    """Nothing waits for the device.

    Args:
        segment_T: the piece of each position; below 0: padding, which sees itself alone.
        anchor_A: int64 index into T, no two of them equal.
    """
    num, device = len(segment_T), segment_T.device
    own_T = torch.arange(num, dtype=torch.int32, device=device)
    starts_T = torch.ones(num, dtype=torch.bool, device=device)
    starts_T[1:] = (segment_T[1:] != segment_T[:-1]) | (segment_T[1:] < 0)
    begin_T = torch.where(starts_T, own_T, 0).cummax(0).values
    # The next start behind each position: a minimum from the end.
    after_T = torch.full((num,), num, dtype=torch.int32, device=device)
    after_T[:-1] = torch.where(starts_T[1:], own_T[1:], num)
    end_T = after_T.flip(0).cummin(0).values.flip(0)
    rows = torch.arange(len(anchor_A), dtype=torch.int32, device=device)
    place_T = torch.full((num,), -1, dtype=torch.int32, device=device)
    return Anchors(place_T.index_copy_(0, anchor_A, rows), begin_T, end_T.contiguous(), seen_T)


def attend_chains(
    q: Tensor, k: Tensor, v: Tensor, own_k: list[Tensor], own_v: list[Tensor], anchors: Anchors
) -> Tensor:
    """Softmax attention, scaled by ``1 / sqrt(D)``.

    Args:
        q: [A, Hq, D].
        k, v: [T, Hkv, D] of step 0.
        own_k, own_v: [A, Hkv, D] each.

    Returns:
        [A, Hq, D].
    """
    num_rows, num_heads, dim = q.shape
    has_row_T = anchors.place_T >= 0
    own_T = torch.arange(len(k), device=q.device)
    anchor_A = own_T.new_zeros(num_rows)
    anchor_A[anchors.place_T[has_row_T].long()] = own_T[has_row_T]
    before = (own_T >= anchors.begin_T[anchor_A, None]) & (own_T <= anchor_A[:, None])
    visible_AT = (before & anchors.seen_T) | (own_T == anchor_A[:, None])
    share = num_heads // k.shape[1]
    keys, values = (x.repeat_interleave(share, dim=1) for x in (k, v))
    scores = torch.einsum("ahd,thd->aht", q, keys) * dim**-0.5
    scores = scores.masked_fill(~visible_AT[:, None], -torch.inf)
    own = [(q * x.repeat_interleave(share, dim=1)).sum(-1) * dim**-0.5 for x in own_k]
    weights = torch.cat((scores, *(x[..., None] for x in own)), dim=-1).softmax(dim=-1)
    mixed = torch.einsum("aht,thd->ahd", weights[..., : len(k)], values)
    for step, x in enumerate(own_v):
        mixed = mixed + weights[..., len(k) + step, None] * x.repeat_interleave(share, dim=1)
    return mixed
