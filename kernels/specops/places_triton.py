"""Where the rows of a pass stand and write, in one launch; the definition is ``specops.places``.

Shapes: R requests, Q rows of each, P pages of a request.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from specops.attention import DecodePass
from specops.places import Places

_BLOCK = 128


@triton.jit(do_not_specialize=["num_requests", "num_query", "num_pages"])
def _places(
    first_ptr, counts_ptr, pages_ptr, positions_ptr, slots_ptr, starts_ptr,
    num_requests, num_query, num_pages,
    PAGE: tl.constexpr, BY_STEP: tl.constexpr, HAS_COUNTS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """BLOCK rows of any requests, in the order of the result."""
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    is_row = row < num_requests * num_query
    if BY_STEP:
        request, query = row % num_requests, row // num_requests
    else:
        request, query = row // num_query, row % num_query
    position = tl.load(first_ptr + request, mask=is_row, other=0) + query
    is_real = is_row & (position >= 0)
    if HAS_COUNTS:
        is_real = is_real & (query < tl.load(counts_ptr + request, mask=is_row, other=0))
    is_held = is_real & (position < num_pages * PAGE)
    entry = request.to(tl.int64) * num_pages + position // PAGE
    page = tl.load(pages_ptr + entry, mask=is_held, other=0)
    slot = tl.where(is_held, page.to(tl.int64) * PAGE + position % PAGE, 0)
    tl.store(positions_ptr + row, tl.where(is_real, position, 0).to(tl.int64), mask=is_row)
    tl.store(slots_ptr + row, slot, mask=is_row)
    tl.store(starts_ptr + row, position, mask=is_row)


def places_of(decode: DecodePass, num_query: int, *, by_step: bool = False) -> Places:
    """See ``specops.places.places_of``.

    Raises:
        ValueError: a tensor of the pass is not contiguous.
    """
    first, counts, pages = decode.first_R, decode.counts_R, decode.pages_RP
    if not all(t is None or t.is_contiguous() for t in (first, counts, pages)):
        raise ValueError("the tensors of a DecodePass must be contiguous")
    num_requests = len(first)
    shape = (num_query, num_requests) if by_step else (num_requests, num_query)
    positions = torch.empty(shape, dtype=torch.int64, device=first.device)
    slots, starts = torch.empty_like(positions), torch.empty_like(positions, dtype=torch.int32)
    _places[(triton.cdiv(num_requests * num_query, _BLOCK),)](
        first, first if counts is None else counts, pages, positions, slots, starts,
        num_requests, num_query, pages.shape[1],
        PAGE=decode.page_size, BY_STEP=by_step, HAS_COUNTS=counts is not None, BLOCK=_BLOCK,
        num_warps=4,
    )  # fmt: skip
    return Places(positions, slots, starts)
