"""Sampling draft tokens from logits in two small kernels; see ``specops.draft_sampling``.

Shapes: R requests, D draft vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor

from specops.draft_sampling import Drafted, Instead, VocabMap
from specops.laws_triton import TILES, DraftTokens, Tiles, join_rows
from specops.rng import Numbering, Stream
from specops.sampling import SamplingRows


def sample_draft(
    logits_RD: Tensor,
    sampling: SamplingRows,
    numbering: Numbering,
    greedy_R: Tensor | None = None,
    vocab: VocabMap | None = None,
    tiles: Tiles = TILES,
    *,
    instead: Instead | None = None,
    overlap: bool = False,
) -> Drafted:
    """See ``specops.draft_sampling.sample_draft``, which has the same arguments and result. Can be
    captured in a CUDA graph, which fixes ``sampling.truncates``.

    Args:
        overlap: start while the previous kernel still runs (``specops.overlap_triton``).

    Raises:
        ValueError: the logits' last dimension is not contiguous.
    """
    num_requests = len(logits_RD)
    tokens = torch.empty(num_requests, dtype=torch.int64, device=logits_RD.device)
    logq = torch.empty(num_requests, dtype=torch.float32, device=logits_RD.device)
    drafts = DraftTokens(tokens, logq, None if vocab is None else vocab.d2t_D, instead)
    joined = join_rows(
        logits_RD[:, None], sampling, greedy_R, None, None, numbering, Stream.DRAFT, 0, False,
        tiles, drafts, overlap,
    )  # fmt: skip
    return Drafted(tokens, logq, joined.laws)
