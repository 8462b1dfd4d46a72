"""What cuts on the device take: scores and lengths of a batch of drafts, noted for traces
(``specops.device.cut_drafts``), the figures of each position before it (``confidence``), and the
rows of a verification with a budget behind it (``pack_rows``).

On a GPU the operators are timed as they run in service, captured in a graph, between two CUDA
events, with other data in the cache, and so are their definitions in torch; on a CPU by wall time,
one call after another. Figures come from every pass of the drafter in a round that is cut; their
time is none of the cut's.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any, get_args

import torch
from torch import Tensor

from benchmarks.ops.timing import graphed_ms
from policies.confidence_head import HIDDEN, NAMES
from specops import allocation, device
from specops.allocation import NUM_FIGURES, CutValues, HeadWeights, Score

BATCH, DRAFT_K = 256, 8
CUMULATIVE: tuple[Score, ...] = ("head",)
PASSES = {"cuda": ((256, 32_000), (32, 32_000), (8, 151_936)), "cpu": ((8, 4_096),)}
"""Rows and vocabulary of passes whose figures are timed."""
CALLS = 200

Times = dict[str, float]
"""Microseconds; the median of many calls."""


def allocate_times(place: str, by: Any = device) -> Times:
    """One step's cut by each score, of ``BATCH`` requests with ``DRAFT_K`` draft tokens.

    Args:
        place: ``cpu`` or ``cuda``.
        by: what has ``cut_drafts``: ``specops.device`` or the definition.
    """
    numbers = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(BATCH * DRAFT_K, 1024, generator=numbers)
    figures = allocation.confidence(logits).view(BATCH, DRAFT_K, NUM_FIGURES).to(place)
    offered = torch.randint(0, DRAFT_K + 1, (BATCH,), generator=numbers).to(place)
    # As in service, where they are fields of a matrix, and the table has room for longer drafts.
    values = CutValues(*torch.tensor([0.3, BATCH * DRAFT_K / 2, 0.2], device=place).unbind())
    warmth = torch.full((BATCH,), 0.7, device=place)
    noted = torch.zeros(BATCH, 1 + NUM_FIGURES * 2 * DRAFT_K, device=place)
    head = _head(numbers, place)
    cut = partial(by.cut_drafts, figures, offered, warmth, values, head, noted)
    return {
        score: _us(place, partial(cut, score=score, cumulative=score in CUMULATIVE))
        for score in get_args(Score)
    }


def confidence_times(place: str, by: Any = device) -> Times:
    """The figures of one pass, by "rows x vocabulary"; logits are bfloat16."""
    found = {}
    for num_rows, vocab in PASSES[place]:
        logits = torch.randn(num_rows, vocab, device=place).bfloat16()
        found[f"{num_rows} x {vocab:,}"] = _us(place, partial(by.confidence, logits))
    return found


def packing_times(place: str, by: Any = device) -> Times:
    """Rows of a verification of ``BATCH`` requests with room for half of their draft tokens."""
    lens = torch.arange(BATCH, device=place) % (DRAFT_K // 2 + 1)
    work = partial(by.pack_rows, lens, DRAFT_K, BATCH * DRAFT_K // 2)
    return {f"{BATCH} requests": _us(place, work)}


def _us(place: str, work: Callable[[], object]) -> float:
    return 1000 * graphed_ms(work) if place == "cuda" else _wall_us(work)


def _head(numbers: torch.Generator, place: str) -> HeadWeights:
    num = len(NAMES)
    shapes = ((num,), (num,), (HIDDEN, num), (HIDDEN,), (HIDDEN,), ())
    return HeadWeights(*(_drawn(numbers, shape).to(place) for shape in shapes))


def _drawn(numbers: torch.Generator, shape: tuple[int, ...]) -> Tensor:
    return torch.randn(shape, generator=numbers)


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
