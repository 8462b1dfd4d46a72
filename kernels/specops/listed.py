"""Passes on a CPU: slots and masks are listed once for all layers of a model.

The integers of a few rows are computed in numpy, whose calls take a quarter of the time of torch's.

Shapes as in ``specops.attention``.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from specops.attention import DecodePass, Group, PagedPass, Places

Ints = NDArray[np.int64]


def places_of(decode: DecodePass, num_query: int, *, by_step: bool = False) -> Places:
    """See ``specops.attention.places_of``."""
    rows = HostRows.of(decode, num_query)
    first_RQ = decode.first_R.numpy()[:, None] + np.arange(num_query, dtype=np.int32)
    found = (np.maximum(rows.positions_RQ, 0), rows.slots_RQ, first_RQ)
    return Places(*(contiguous(ints.T if by_step else ints) for ints in found))


def listed_pass(decode: DecodePass, num_query: int, heads_per_key: int = 0) -> PagedPass:
    """The same pass as lists of slots and masks, no longer than its longest request.

    Values are read. Consecutive blocks of one request become one group, which gathers its keys
    once.

    Args:
        heads_per_key: query heads of a key head, for ``Group.bias``; 0: none is prepared.

    Raises:
        ValueError: the rows are a tree.
    """
    if decode.ancestors_RQ is not None or decode.counts_R is not None:
        raise ValueError("only chains without padding can be listed")
    rows = HostRows.of(decode, num_query)
    slots_T = contiguous(rows.slots_RQ.reshape(-1))
    starts = _starts_of_runs(rows.pages_RP, decode.first_R.numpy(), num_query, decode.is_block)
    num_requests = len(rows.positions_RQ)
    if len(starts) == num_requests:
        whole = _group(decode, rows.pages_RP, rows.positions_RQ, 0, heads_per_key)
        return PagedPass(slots_T, (whole,))
    groups = []
    for start, end in zip(starts, [*starts[1:], num_requests], strict=True):
        positions = rows.positions_RQ[start:end].reshape(1, -1)
        pages, first = rows.pages_RP[start : start + 1], start * num_query
        groups.append(_group(decode, pages, positions, first, heads_per_key))
    return PagedPass(slots_T, tuple(groups))


def listed_steps(decode: DecodePass, num_steps: int, heads_per_key: int = 0) -> list[PagedPass]:
    """``listed_pass`` of single rows at consecutive positions, one pass for each step.

    Slots and masks of all steps are computed at once.
    """
    rows = HostRows.of(decode, num_steps)
    slots_KR = contiguous(rows.slots_RQ.T)
    whole = _group(decode, rows.pages_RP, rows.positions_RQ, 0, heads_per_key)
    passes = []
    for step in range(num_steps):
        one = slice(step, step + 1)
        group = replace(
            whole,
            num_query=1,
            positions_RQ=whole.positions_RQ[:, one],
            mask_RQS=whole.mask_RQS[:, :, one],
            bias=_bias_of(whole.bias, step, heads_per_key),
        )
        passes.append(PagedPass(slots_KR[step], (group,)))
    return passes


@dataclass(frozen=True, slots=True)
class HostRows:
    """The rows of a pass, in the memory of the host."""

    pages_RP: Ints
    positions_RQ: Ints
    """-1 for padding."""
    slots_RQ: Ints
    """0 for padding and beyond the page table."""

    @classmethod
    def of(cls, decode: DecodePass, num_query: int) -> HostRows:
        """The rows of a pass whose tensors are on a CPU."""
        counts_R = None if decode.counts_R is None else decode.counts_R.numpy()
        pages_RP, first_R = decode.pages_RP.numpy(), decode.first_R.numpy()
        return cls.at(pages_RP, first_R, num_query, decode.page_size, counts_R)

    @classmethod
    def at(
        cls,
        pages_RP: NDArray[np.int32],
        first_R: NDArray[np.integer[Any]],
        num_query: int,
        page_size: int,
        counts_R: NDArray[np.int32] | None = None,
    ) -> HostRows:
        """See ``DecodePass`` for the arguments."""
        row = np.arange(num_query)
        positions = first_R[:, None] + row
        if counts_R is not None:
            positions = np.where(row < counts_R[:, None], positions, -1)
        positions = np.maximum(positions, -1)
        page, offset = np.divmod(positions, page_size)
        is_held = (page >= 0) & (page < pages_RP.shape[1])
        request = np.arange(len(positions))[:, None]
        wide = pages_RP.astype(np.int64)
        held = wide[request, np.where(is_held, page, 0)]
        return cls(wide, positions, np.where(is_held, held * page_size + offset, 0))


def contiguous(array: NDArray[Any]) -> torch.Tensor:
    """A contiguous tensor of the same values."""
    return torch.from_numpy(np.ascontiguousarray(array))


def _starts_of_runs(
    pages_RP: Ints, first_R: NDArray[np.int32], num_query: int, is_block: bool
) -> list[int]:
    """Indices of requests that do not continue the pages and positions of the request before."""
    if num_query == 1 or len(first_R) == 1 or is_block:
        return list(range(len(first_R)))
    has_same_pages = (pages_RP[1:] == pages_RP[:-1]).all(axis=1)
    is_next = first_R[1:] == first_R[:-1] + num_query
    return [0, *(np.flatnonzero(~(has_same_pages & is_next)) + 1).tolist()]


def _bias_of(bias: torch.Tensor | None, step: int, heads_per_key: int) -> torch.Tensor | None:
    """The rows of one step."""
    if bias is None:
        return None
    return bias[:, :, step * heads_per_key : (step + 1) * heads_per_key]


def _group(
    decode: DecodePass, pages_RP: Ints, positions_RQ: Ints, start: int, heads_per_key: int
) -> Group:
    """A group with its mask; positions before ``decode.first_key`` are invisible."""
    num_pages = max(-(-(int(positions_RQ.max()) + 1) // decode.page_size), 1)
    offset = np.arange(decode.page_size)
    pages = pages_RP[:, :num_pages]
    slots = (pages[..., None] * decode.page_size + offset).reshape(len(pages), -1)
    keys = np.arange(slots.shape[1])
    last_RQ = positions_RQ
    if decode.is_block:
        last_RQ = np.broadcast_to(positions_RQ.max(axis=1, keepdims=True), positions_RQ.shape)
    mask = keys <= last_RQ[..., None]
    if decode.first_key:
        mask &= keys >= decode.first_key
    bias = None
    if heads_per_key:
        rows = np.where(mask, np.float32(0), np.float32("-inf"))
        bias = contiguous(np.repeat(rows, heads_per_key, axis=1)[:, None])
    return Group(
        start,
        positions_RQ.shape[1],
        contiguous(slots),
        contiguous(positions_RQ),
        contiguous(mask[:, None]),
        contiguous(pages),
        bias,
    )
