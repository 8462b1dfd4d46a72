"""Sampling draft tokens from logits in three small kernels; see ``specops.draft_sampling``.

Shapes: R requests, D draft vocabulary.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from specops.draft_sampling import Drafted, VocabMap
from specops.laws_triton import PER_REQUEST, TILES, Tiles, join_rows
from specops.rng import Numbering, Stream
from specops.sampling import SamplingRows


@triton.jit(
    do_not_specialize=["num_rows"],
    do_not_specialize_on_alignment=PER_REQUEST,
)
def _finish(
    logits_ptr, row_stride, temperature_ptr, greedy_ptr, own_ptr, law_ptr, d2t_ptr, token_ptr,
    logq_ptr, num_rows, HAS_GREEDY: tl.constexpr, HAS_MAP: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Compute log q of the drawn ids and map them to the target's vocabulary."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    is_row = row < num_rows
    own = tl.load(own_ptr + row, mask=is_row, other=0).to(tl.int64)
    has_law = own >= 0
    own = tl.maximum(own, 0)
    temperature = tl.load(temperature_ptr + row, mask=is_row, other=1).to(tl.float32)
    is_greedy = temperature == 0
    if HAS_GREEDY:
        is_greedy = is_greedy | (tl.load(greedy_ptr + row, mask=is_row, other=0) != 0)
    x = tl.load(logits_ptr + row * row_stride + own, mask=is_row, other=0).to(tl.float32)
    top = tl.load(law_ptr + row * 3, mask=is_row & has_law, other=0.0)
    mass = tl.load(law_ptr + row * 3 + 2, mask=is_row, other=1.0)
    logq = (x - top) / tl.where(is_greedy, 1.0, temperature) - tl.log(mass)
    if HAS_MAP:
        own += tl.load(d2t_ptr + own, mask=is_row, other=0)
    tl.store(token_ptr + row, own, mask=is_row)
    tl.store(logq_ptr + row, tl.where(has_law, logq, 0.0), mask=is_row)


def sample_draft(
    logits_RD: Tensor,
    sampling: SamplingRows,
    numbering: Numbering,
    greedy_R: Tensor | None = None,
    vocab: VocabMap | None = None,
    tiles: Tiles = TILES,
) -> Drafted:
    """See ``specops.draft_sampling.sample_draft``, which has the same arguments and result. Can be
    captured in a CUDA graph, which fixes ``sampling.truncates``.

    Raises:
        ValueError: the logits' last dimension is not contiguous.
    """
    num_requests = len(logits_RD)
    joined = join_rows(
        logits_RD[:, None], sampling, greedy_R, None, None, numbering, Stream.DRAFT, 0, False, tiles
    )
    tokens = torch.empty(num_requests, dtype=torch.int64, device=logits_RD.device)
    logq = torch.empty(num_requests, dtype=torch.float32, device=logits_RD.device)
    if num_requests:
        _finish[(triton.cdiv(num_requests, 32),)](
            logits_RD, logits_RD.stride(0), sampling.temperature_R, greedy_R, joined.own_N,
            joined.laws.tops_cuts_masses, vocab.d2t_D if vocab else None, tokens, logq,
            num_requests, HAS_GREEDY=greedy_R is not None, HAS_MAP=vocab is not None, ROWS=32,
            num_warps=1,
        )  # fmt: skip
    return Drafted(tokens, logq, joined.laws)
