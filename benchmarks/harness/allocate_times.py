"""What the device's cut takes: scores and lengths of a batch of drafts, by ``specops.allocation``.

On a GPU the operators are timed as they run in service, captured in a graph, between two CUDA
events, with other data in the cache; on a CPU by wall time, one call after another. The three
figures of each position come from the drafter's pass and are not among it.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks.ops.timing import graphed_ms
from policies.confidence_head import HIDDEN, NAMES
from specops.allocation import HeadWeights, allocate, confidence, entropy_scores, head_scores

BATCH, DRAFT_K, VOCAB = 256, 8, 1024
CALLS = 200


def allocate_times(device: str) -> dict[str, float]:
    """Microseconds of one step's cut by each score: the median of many calls.

    Args:
        device: ``cpu`` or ``cuda``.
    """
    numbers = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(BATCH * DRAFT_K, VOCAB, generator=numbers)
    figures = confidence(logits).view(BATCH, DRAFT_K, -1).to(device)
    offered = torch.randint(0, DRAFT_K + 1, (BATCH,), generator=numbers).to(device)
    threshold = torch.tensor(0.3, device=device)
    budget = torch.tensor(BATCH * DRAFT_K / 2, device=device)
    warmth, gamma = torch.full((BATCH,), 0.7, device=device), torch.tensor(0.2, device=device)
    head = _head(numbers, device)
    scores: dict[str, tuple[Callable[[], Tensor], bool]] = {
        "top": (lambda: figures[..., 0], False),
        "entropy": (lambda: entropy_scores(figures, gamma), False),
        "head": (lambda: head_scores(figures, warmth, head), True),
    }
    found = {}
    for name, (score, cumulative) in scores.items():

        def cut(score: Callable[[], Tensor] = score, cumulative: bool = cumulative) -> Tensor:
            return allocate(score(), offered, threshold, budget, cumulative=cumulative)

        found[name] = 1000 * graphed_ms(cut) if device == "cuda" else _wall_us(cut)
    return found


def _head(numbers: torch.Generator, device: str) -> HeadWeights:
    num = len(NAMES)
    shapes = ((num,), (num,), (HIDDEN, num), (HIDDEN,), (HIDDEN,), ())
    return HeadWeights(*(torch.randn(shape, generator=numbers).to(device) for shape in shapes))


def _wall_us(work: Callable[[], object]) -> float:
    with torch.inference_mode():
        for _ in range(CALLS // 10):
            work()
        times = []
        for _ in range(CALLS):
            started = time.perf_counter()
            work()
            times.append(time.perf_counter() - started)
    return 1e6 * statistics.median(times)
