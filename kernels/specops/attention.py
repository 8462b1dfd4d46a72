"""Attention of a few new tokens of each request over its paged keys and values.

These are the torch definitions, on any device; fused kernels must equal them. A pass has one of two
forms: a ``PagedPass`` lists slots and masks of groups assembled by the host (``specops.listed``); a
``DecodePass`` holds only page tables and lengths, so its shapes stay fixed while lengths change and
a CUDA graph can replay it.

Shapes: T packed rows (tokens) of one pass, R requests of a group, Q query rows each, S keys, P
pages, Hq/Hkv heads, G = Hq / Hkv, D head dimension. A slot is page * page_size + offset.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Group:
    """Requests of one pass with the same number of query rows."""

    start: int
    """First packed row; the group is rows start .. start + R * Q - 1, request-major."""
    num_query: int
    """Q."""
    slots_RS: Tensor
    """[R, S] int64 slots of positions 0..S-1; padding points at slot 0."""
    positions_RQ: Tensor
    """[R, Q] int64 positions of the query rows."""
    mask_RQS: Tensor
    """[R, 1, Q, S] bool: the key is visible to the query (causal, from the first valid key on)."""
    pages_RP: Tensor | None = None
    """[R, P] int64, if the slots are those of whole pages: pages are copied at once."""
    bias: Tensor | None = None
    """[R, 1, Q * G, S] float32, 0 where ``mask_RQS`` is true and -inf elsewhere, each row for the G
    query heads of a key head, whose rows are then attended to at once; ``None``: not prepared."""


@dataclass(frozen=True, slots=True)
class PagedPass:
    """The slots that the T rows of a forward pass write, and those that they may read."""

    slots_T: Tensor
    """[T] int64 slot of each row's key and value."""
    groups: tuple[Group, ...]
    """Cover all T rows, in order."""


def make_group(
    start: int,
    slots_RS: Tensor,
    positions_RQ: Tensor,
    first_key: int = 0,
    *,
    is_block: bool = False,
) -> Group:
    """A group with its causal mask. Positions before ``first_key`` are invisible.

    Args:
        is_block: a row sees the later rows of its request, too.
    """
    keys = torch.arange(slots_RS.shape[1], device=slots_RS.device)
    last_RQ = positions_RQ
    if is_block:
        last_RQ = positions_RQ.amax(dim=1, keepdim=True).expand_as(positions_RQ)
    mask = keys <= last_RQ[..., None]
    if first_key:
        mask &= keys >= first_key
    return Group(start, positions_RQ.shape[1], slots_RS, positions_RQ, mask[:, None])


def _gather(pool: Tensor, slots: Tensor) -> Tensor:
    """Rows of a pool. ``embedding`` copies whole rows; ``index_select`` is 6x slower on a CPU."""
    rows: Tensor = torch.nn.functional.embedding(slots, pool.flatten(1))
    return rows.view(-1, *pool.shape[1:])


def _rows_of(pool: Tensor, group: Group) -> Tensor:
    """[R, Hkv, S, D] a group's rows of a pool."""
    num_requests, num_keys = group.slots_RS.shape
    shape = (num_requests, num_keys, *pool.shape[1:])
    if group.pages_RP is None:
        return _gather(pool, group.slots_RS.reshape(-1)).view(shape).transpose(1, 2)
    page_size = num_keys // group.pages_RP.shape[1]
    pages = pool.view(-1, page_size * pool.shape[1] * pool.shape[2])
    rows: Tensor = torch.embedding(pages, group.pages_RP)
    return rows.view(shape).transpose(1, 2)


def group_attention(
    q_RQHD: Tensor,
    keys: Tensor,
    values: Tensor,
    group: Group,
    scale: float,
    window: int | None,
    softcap: float | None,
) -> Tensor:
    """Attention of one group's rows over pages that already hold their keys.

    Returns:
        [R, Q, Hq, D].
    """
    mask = group.mask_RQS
    if window is not None:
        at = torch.arange(mask.shape[-1], device=mask.device)
        mask = mask & (at > group.positions_RQ[:, None, :, None] - window)
    k, v = _rows_of(keys, group), _rows_of(values, group)
    q = q_RQHD.transpose(1, 2)
    if group.bias is not None and window is None and softcap is None and q.dtype == torch.float32:
        out = _together(q_RQHD, k, v, group.bias, scale)
        if math.isfinite(float(out.sum())):
            return out
    out = masked_attention(q, k, v, mask, scale, softcap)
    # A masked key weighs 0, and 0 times NaN is NaN. On a GPU the sum is not read: that would wait,
    # and could not be captured.
    if out.is_cuda or not math.isfinite(float(out.sum())):
        is_bad_RS = ~(k.isfinite() & v.isfinite()).all(dim=-1).all(dim=1)
        k, v = (t.masked_fill(is_bad_RS[:, None, :, None], 0) for t in (k, v))
        out = masked_attention(q, k, v, mask, scale, softcap)
        sees_bad = (mask & is_bad_RS[:, None, None]).any(dim=-1, keepdim=True)
        out = out.masked_fill(sees_bad, float("nan"))
    return out.transpose(1, 2)


def _together(q_RQHD: Tensor, k: Tensor, v: Tensor, bias: Tensor, scale: float) -> Tensor:
    """[R, Q, Hq, D] attention in which the query heads of a key head are rows of one product. With
    three rows of four requests it takes 50 us instead of 70."""
    num_requests, num_query, num_heads, head_dim = q_RQHD.shape
    num_kv = k.shape[1]
    per_key = num_heads // num_kv
    rows = (num_requests, num_kv, num_query * per_key, head_dim)
    if num_query > 1:
        q_RQHD = q_RQHD.view(num_requests, num_query, num_kv, per_key, head_dim).transpose(1, 2)
    q = q_RQHD.reshape(rows)
    out = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=scale)
    if num_query > 1:
        out = out.view(num_requests, num_kv, num_query, per_key, head_dim).transpose(1, 2)
    return out.reshape(num_requests, num_query, num_heads, head_dim)


def masked_attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scale: float, softcap: float | None
) -> Tensor:
    """[R, Hq, Q, D]; what the mask hides must be finite."""
    gqa = q.shape[1] != k.shape[1]
    if softcap is None:
        return torch.nn.functional.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, scale=scale, enable_gqa=gqa
        )
    if gqa:
        k = k.repeat_interleave(q.shape[1] // k.shape[1], dim=1)
        v = v.repeat_interleave(q.shape[1] // v.shape[1], dim=1)
    scores = softcap * torch.tanh(q @ k.transpose(-1, -2) * (scale / softcap))
    weights = scores.masked_fill(~mask, float("-inf")).softmax(dim=-1, dtype=torch.float32)
    mixed: Tensor = weights.to(v.dtype) @ v
    return mixed


def attend_listed(
    q_THD: Tensor,
    keys: Tensor,
    values: Tensor,
    paged: PagedPass,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
) -> Tensor:
    """Attention of rows whose own keys and values are in their slots already.

    Args:
        q_THD: [T, Hq, D] after RoPE.
        window: a query sees keys of the last ``window`` positions only.
        softcap: scores become softcap * tanh(scores / softcap).

    Returns:
        [T, Hq, D].
    """
    outs = []
    for group in paged.groups:
        num_requests = group.slots_RS.shape[0]
        end = group.start + num_requests * group.num_query
        q = q_THD[group.start : end].reshape(num_requests, group.num_query, *q_THD.shape[1:])
        out = group_attention(q, keys, values, group, scale, window, softcap)
        outs.append(out.flatten(0, 1))
    return outs[0] if len(outs) == 1 else torch.cat(outs)


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
) -> Tensor:
    """Write the rows' keys and values to their slots, then ``attend_listed``.

    Args:
        k_THD, v_THD: [T, Hkv, D], after RoPE.
        keys, values: [num_slots, Hkv, D], written in place.
    """
    keys.index_copy_(0, paged.slots_T, k_THD)
    values.index_copy_(0, paged.slots_T, v_THD)
    return attend_listed(q_THD, keys, values, paged, scale, window, softcap)


@dataclass(frozen=True, slots=True)
class DecodePass:
    """Q new tokens of each of R requests, packed request-major. The host knows only the shapes.

    Row j of a request is at position ``first + j``. If that is negative or j is not below the
    request's count, the row is padding: it sees nothing, is written to slot 0, and its output is 0.
    Page 0 belongs to no request.

    Raises:
        ValueError: a tensor does not have the dtype or shape documented below.
    """

    pages_RP: Tensor
    """[R, P] int32 pages of positions 0 .. P * page_size - 1; 0 if a request has none."""
    first_R: Tensor
    """[R] int32 position of query row 0."""
    page_size: int
    """Tokens per page."""
    counts_R: Tensor | None = None
    """[R] int32 number of rows that are not padding; ``None``: all. For trees of unequal size."""
    ancestors_RQ: Tensor | None = None
    """[R, Q] int64, Q at most 64, for a tree of drafts: bit i is set if the row sees row i of its
    request, that is, for itself and its ancestors. ``None``: a chain, in which each row sees those
    before it. No drafter proposes trees yet; ``tests/specops/test_decode_attention.py`` covers
    them."""
    first_key: int = 0
    """First valid key."""
    is_block: bool = False
    """Rows of a request see each other whatever their order, for drafts made all at once. A window
    still ends at each row's own position. Not with counts or ancestors."""

    def __post_init__(self) -> None:
        if self.is_block and (self.counts_R is not None or self.ancestors_RQ is not None):
            raise ValueError("rows of a block have neither counts nor ancestors")
        num_requests = self.pages_RP.shape[0]
        for name, tensor, dtype, dims in (
            ("pages", self.pages_RP, torch.int32, 2),
            ("first", self.first_R, torch.int32, 1),
            ("counts", self.counts_R, torch.int32, 1),
            ("ancestors", self.ancestors_RQ, torch.int64, 2),
        ):
            if tensor is None:
                continue
            shape = tuple(tensor.shape)
            if tensor.dtype != dtype or len(shape) != dims or shape[0] != num_requests:
                raise ValueError(
                    f"{name} must be {dtype} of {dims} dimensions for {num_requests} requests, "
                    f"got {tensor.dtype} {shape}"
                )

    def num_query(self, num_rows: int) -> int:
        """Q of a pass with ``num_rows`` packed rows.

        Raises:
            ValueError: the rows do not divide evenly among the requests, or do not match the
                ancestors.
        """
        num_requests = self.pages_RP.shape[0]
        if num_rows % num_requests:
            raise ValueError(f"{num_rows} rows do not divide among {num_requests} requests")
        count = num_rows // num_requests
        if self.ancestors_RQ is not None and (count > 64 or self.ancestors_RQ.shape[1] != count):
            raise ValueError(
                f"ancestors must be [{num_requests}, {count}] with at most 64 rows, "
                f"got {tuple(self.ancestors_RQ.shape)}"
            )
        return count

    def positions(self, num_query: int) -> Tensor:
        """[R, Q] int64 positions of the rows; -1 for padding."""
        row = torch.arange(num_query, device=self.first_R.device)
        positions_RQ = self.first_R[:, None] + row
        is_real = positions_RQ >= 0
        if self.counts_R is not None:
            is_real &= row < self.counts_R[:, None]
        return torch.where(is_real, positions_RQ, -1)


def check_window(decode: DecodePass, num_query: int, window: int | None) -> None:
    """Refuse windows that could end inside a tree, where positions are not path lengths.

    Raises:
        ValueError: there are ancestors, and the window is shorter than the number of query rows.
    """
    if decode.ancestors_RQ is not None and window is not None and window < num_query:
        raise ValueError(f"a window of {window} is shorter than a tree of {num_query} rows")


def decode_slots(decode: DecodePass, num_query: int) -> Tensor:
    """[T] int64 slot of each row's key and value; 0 for padding and beyond the page table."""
    positions_RQ = decode.positions(num_query)
    index = positions_RQ.clamp(min=0)
    page = index // decode.page_size
    is_held = (positions_RQ >= 0) & (page < decode.pages_RP.shape[1])
    page = decode.pages_RP.long().gather(1, page.clamp(max=decode.pages_RP.shape[1] - 1))
    slots = page * decode.page_size + index % decode.page_size
    return torch.where(is_held, slots, 0).flatten()


def write_rows(
    k_THD: Tensor, v_THD: Tensor, keys: Tensor, values: Tensor, decode: DecodePass
) -> None:
    """Write the rows' keys and values [T, Hkv, D] to their slots. The definition."""
    slots_T = decode_slots(decode, decode.num_query(len(k_THD)))
    keys.index_copy_(0, slots_T, k_THD)
    values.index_copy_(0, slots_T, v_THD)


@dataclass(frozen=True, slots=True)
class Places:
    """Positions and slots of all rows, [R, Q], or [Q, R] if ordered by step. Contiguous."""

    positions: Tensor
    """int64; 0 for padding."""
    slots: Tensor
    """int64 slot of each row's key and value; 0 for padding and beyond the page table."""
    first: Tensor
    """int32, ``first_R`` of a pass that begins with the row."""


def places_of(decode: DecodePass, num_query: int, *, by_step: bool = False) -> Places:
    """Positions and slots of ``num_query`` consecutive rows of each request. The definition.

    Args:
        by_step: order by step, then by request, so that the rows of each of several successive
            one-row passes are contiguous.
    """
    positions_RQ = decode.positions(num_query).clamp(min=0).long()
    slots_RQ = decode_slots(decode, num_query).view(positions_RQ.shape)
    row = torch.arange(num_query, dtype=torch.int32, device=slots_RQ.device)
    found = (positions_RQ, slots_RQ, decode.first_R[:, None] + row)
    return Places(*((t.t().contiguous() if by_step else t) for t in found))


def visible_keys(decode: DecodePass, num_query: int, window: int | None) -> Tensor:
    """[R, Q, S] bool mask of the S = P * page_size keys that each row sees.

    The window counts positions along a row's own path, in a tree as in a chain.
    """
    check_window(decode, num_query, window)
    num_keys = decode.pages_RP.shape[1] * decode.page_size
    key_S = torch.arange(num_keys, device=decode.first_R.device)
    positions_RQ = decode.positions(num_query)
    last_RQ = positions_RQ
    if decode.is_block:
        ends_R1 = positions_RQ.amax(dim=1, keepdim=True)
        last_RQ = torch.where(positions_RQ >= 0, ends_R1, -1)
    seen = key_S <= last_RQ[..., None]
    reach_RQ = positions_RQ
    if decode.ancestors_RQ is not None:
        first_R1 = decode.first_R[:, None].long()
        bit_RQB = decode.ancestors_RQ[..., None] >> torch.arange(64, device=key_S.device) & 1
        reach_RQ = first_R1 + bit_RQB.sum(dim=-1) - 1
        own_RS = key_S - first_R1
        index = own_RS.clamp(0, 63)[:, None].expand(-1, num_query, -1)
        is_row_RS = (own_RS >= 0) & (key_S <= positions_RQ.amax(dim=1, keepdim=True))
        on_path = bit_RQB.gather(2, index).bool() & is_row_RS[:, None]
        seen = ((own_RS < 0)[:, None] | on_path) & (positions_RQ >= 0)[..., None]
    if decode.first_key:
        seen = seen & (key_S >= decode.first_key)
    if window is not None:
        seen = seen & (key_S > reach_RQ[..., None] - window)
    return seen


def attend_pages(
    q_THD: Tensor,
    keys: Tensor,
    values: Tensor,
    decode: DecodePass,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
) -> Tensor:
    """Attention of rows whose own keys and values are already in their slots. The definition.

    Gathers all P pages and computes in float32; can be captured in a CUDA graph.

    Returns:
        [T, Hq, D].
    """
    num_requests, num_pages = decode.pages_RP.shape
    num_kv, head_dim = keys.shape[1:]
    num_query = decode.num_query(len(q_THD))
    wide = torch.promote_types(q_THD.dtype, torch.float32)
    seen_RQS = visible_keys(decode, num_query, window)
    offset = torch.arange(decode.page_size, device=keys.device)
    slots = (decode.pages_RP.long()[..., None] * decode.page_size + offset).flatten()
    shape = (num_requests, num_pages * decode.page_size, num_kv, head_dim)
    k = _gather(keys, slots).view(shape).to(wide)
    v = _gather(values, slots).view(shape).to(wide)
    v = v.masked_fill(~seen_RQS.any(dim=1)[..., None, None], 0)  # unwritten slots may hold NaN
    q = q_THD.reshape(num_requests, num_query, num_kv, -1, head_dim).to(wide)
    scores = torch.einsum("rqhgd,rshd->rhgqs", q, k) * scale
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    seen = seen_RQS[:, None, None]
    weights = scores.masked_fill(~seen, float("-inf")).softmax(dim=-1)
    weights = torch.where(seen, weights, 0)  # a row that sees nothing is NaN here
    out = torch.einsum("rhgqs,rshd->rqhgd", weights, v)
    return out.reshape(q_THD.shape).to(q_THD.dtype)


AttendPages = Callable[
    [Tensor, Tensor, Tensor, DecodePass, float, int | None, float | None], Tensor
]
"""``attend_pages``, or a kernel that equals it."""
WriteRows = Callable[[Tensor, Tensor, Tensor, Tensor, DecodePass], None]
"""``write_rows``, or a kernel that equals it."""


def decode_attention(
    q_THD: Tensor,
    k_THD: Tensor | None,
    v_THD: Tensor | None,
    keys: Tensor,
    values: Tensor,
    decode: DecodePass,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    attend: AttendPages = attend_pages,
    write: WriteRows = write_rows,
) -> Tensor:
    """Write the rows' keys and values to their slots, then attend; the host reads nothing.

    Args:
        q_THD: [T, Hq, D] after RoPE.
        k_THD, v_THD: [T, Hkv, D], or ``None`` if an earlier kernel has written them.
        keys, values: [num_slots, Hkv, D], written in place.
        window: a query sees keys of the last ``window`` positions only.
        softcap: scores become softcap * tanh(scores / softcap).

    Returns:
        [T, Hq, D]; 0 in rows that see nothing.
    """
    if k_THD is not None and v_THD is not None:
        write(k_THD, v_THD, keys, values, decode)
    return attend(q_THD, keys, values, decode, scale, window, softcap)
