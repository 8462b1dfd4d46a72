"""Attention of a few new tokens of each request over its paged keys and values.

The torch definition: gathers each group's keys and calls scaled-dot-product attention. It runs on
any device; it is what a fused kernel must equal.

Shapes: T packed rows (tokens) of one pass, R requests of a group, Q query rows each, S keys,
Hq/Hkv heads, D head dimension. A slot is page * page_size + offset.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Group:
    """Requests of one pass that have equally many query rows."""

    start: int
    """First packed row; the group is rows start .. start + R * Q, request-major."""
    num_query: int
    """Q."""
    slots_RS: Tensor
    """[R, S] int64 slots of positions 0..S-1; padding points at slot 0."""
    positions_RQ: Tensor
    """[R, Q] int64 positions of the query rows."""
    mask_RQS: Tensor
    """[R, 1, Q, S] bool: key visible to query (causal, and not before the first valid key)."""
    first_key: int = 0
    """First valid key; the mask says it too."""


@dataclass(frozen=True, slots=True)
class PagedPass:
    """Where the T rows of one forward pass write, and what they may read."""

    slots_T: Tensor
    """[T] int64 slot that each row's key and value go to."""
    groups: tuple[Group, ...]
    """Cover all T rows, in order."""


def make_group(start: int, slots_RS: Tensor, positions_RQ: Tensor, first_key: int = 0) -> Group:
    """Group with its causal mask. Positions before ``first_key`` are invisible."""
    keys = torch.arange(slots_RS.shape[1], device=slots_RS.device)
    mask = keys <= positions_RQ[..., None]
    if first_key:
        mask &= keys >= first_key
    return Group(start, positions_RQ.shape[1], slots_RS, positions_RQ, mask[:, None], first_key)


def _gather(pool: Tensor, slots: Tensor) -> Tensor:
    """Rows of a pool. ``embedding`` copies whole rows; ``index_select`` was 6x slower on a CPU."""
    rows: Tensor = torch.nn.functional.embedding(slots, pool.flatten(1))
    return rows.view(-1, *pool.shape[1:])


def group_attention(
    q_RQHD: Tensor,
    keys: Tensor,
    values: Tensor,
    group: Group,
    scale: float,
    window: int | None,
    softcap: float | None,
) -> Tensor:
    """The definition: attention of one group's rows over pages that hold their keys already.

    Returns:
        [R, Q, Hq, D].
    """
    mask = group.mask_RQS
    if window is not None:
        at = torch.arange(mask.shape[-1], device=mask.device)
        mask = mask & (at > group.positions_RQ[:, None, :, None] - window)
    num_requests, num_keys = group.slots_RS.shape
    flat = group.slots_RS.reshape(-1)
    k = _gather(keys, flat).view(num_requests, num_keys, *keys.shape[1:]).transpose(1, 2)
    v = _gather(values, flat).view(num_requests, num_keys, *values.shape[1:]).transpose(1, 2)
    q = q_RQHD.transpose(1, 2)
    gqa = q.shape[1] != k.shape[1]
    if softcap is None:
        out: Tensor = torch.nn.functional.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, scale=scale, enable_gqa=gqa
        )
        return out.transpose(1, 2)
    if gqa:
        k = k.repeat_interleave(q.shape[1] // k.shape[1], dim=1)
        v = v.repeat_interleave(q.shape[1] // v.shape[1], dim=1)
    scores = softcap * torch.tanh(q @ k.transpose(-1, -2) * (scale / softcap))
    weights = scores.masked_fill(~mask, float("-inf")).softmax(dim=-1, dtype=torch.float32)
    mixed: Tensor = (weights.to(v.dtype) @ v).transpose(1, 2)
    return mixed


GroupAttention = Callable[[Tensor, Tensor, Tensor, Group, float, int | None, float | None], Tensor]
"""``group_attention``, or a kernel that equals it."""


def paged_attention(
    q_THD: Tensor,
    k_THD: Tensor,
    v_THD: Tensor,
    keys: Tensor,
    values: Tensor,
    paged: PagedPass,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    attend: GroupAttention = group_attention,
) -> Tensor:
    """Write the rows' keys and values to their slots, then attend.

    Args:
        q_THD: [T, Hq, D]; k_THD, v_THD: [T, Hkv, D], after RoPE.
        keys, values: [num_slots, Hkv, D], written in place.
        window: a query sees keys of the last ``window`` positions only.
        softcap: scores become softcap * tanh(scores / softcap).
        attend: computes each group.

    Returns:
        [T, Hq, D].
    """
    keys.index_copy_(0, paged.slots_T, k_THD)
    values.index_copy_(0, paged.slots_T, v_THD)
    outs = []
    for group in paged.groups:
        num_requests = group.slots_RS.shape[0]
        end = group.start + num_requests * group.num_query
        q = q_THD[group.start : end].reshape(num_requests, group.num_query, *q_THD.shape[1:])
        out = attend(q, keys, values, group, scale, window, softcap)
        outs.append(out.flatten(0, 1))
    return outs[0] if len(outs) == 1 else torch.cat(outs)


@dataclass(frozen=True, slots=True)
class DecodePass:
    """Rows of R requests with equally many query rows each, as CUDA graphs need them: what is
    launched depends on shapes alone."""

    pages_RP: Tensor
    """[R, P] integer page ids; slot = page * page_size + offset. Page 0 is for padding."""
    first_R: Tensor
    """[R] integer position of each request's first query row; row j is at first + j."""
    num_query: int
    """Q; the pass has R * Q packed rows, request-major."""
    page_size: int
    first_key: int = 0
    """First valid key."""

    def positions_RQ(self) -> Tensor:
        """[R, Q] int64."""
        ahead = torch.arange(self.num_query, device=self.first_R.device)
        return self.first_R[:, None].long() + ahead

    def slots_T(self) -> Tensor:
        """[T] int64 slot of every row; rows at negative positions go to slot 0."""
        return self.slots_of(self.positions_RQ())

    def slots_of(self, positions: Tensor) -> Tensor:
        """[R * N] int64 slots of [R, N] positions of the requests; 0 for negative ones."""
        at = positions.clamp(min=0)
        pages = self.pages_RP.gather(1, at // self.page_size).long()
        slots = pages * self.page_size + at % self.page_size
        return torch.where(positions < 0, 0, slots).reshape(-1)


def decode_attention(
    q_THD: Tensor,
    k_THD: Tensor,
    v_THD: Tensor,
    keys: Tensor,
    values: Tensor,
    decode: DecodePass,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
) -> Tensor:
    """``paged_attention`` of a ``DecodePass``: the definition, without a look at any value."""
    num_requests = len(decode.pages_RP)
    offsets = torch.arange(decode.page_size, device=q_THD.device)
    slots = decode.pages_RP.long()[:, :, None] * decode.page_size + offsets
    group = make_group(0, slots.view(num_requests, -1), decode.positions_RQ(), decode.first_key)
    paged = PagedPass(decode.slots_T(), (group,))
    out = paged_attention(q_THD, k_THD, v_THD, keys, values, paged, scale, window, softcap)
    sees_nothing = decode.positions_RQ().reshape(-1) < decode.first_key
    return torch.where(sees_nothing[:, None, None], 0, out)
