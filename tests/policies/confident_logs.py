"""Logs of a policy whose drafts the device may cut, in text that is easy at some positions and hard
at others, which the drafter's confidence tells."""

from __future__ import annotations

import random

from buffer.records import Consideration
from policies.interface import CostSample
from policies.logged import LoggedRow, LoggedStep
from tests.policies.logs import DRAFTER

MAX_DRAFT = 5
EASY, HARD = 0.95, 0.2


def considered(rng: random.Random, hazards: list[float], *, may_cut: bool) -> Consideration:
    """Figures whose top probability is the hazard, give or take, or nothing to go by."""
    figures: list[float] = []
    for hazard in hazards:
        top = min(max(hazard + rng.uniform(-0.1, 0.1), 0.01), 0.99)
        figures += (top, 2 * (1 - top), max(top - (1 - top) / 2, 0.0))
    return Consideration(may_cut, tuple(figures))


def row(rng: random.Random, threshold: float, *, telling: bool = True) -> LoggedRow:
    hazards = [rng.choice((EASY, HARD)) for _ in range(MAX_DRAFT)]
    said = hazards if telling else [rng.choice((EASY, HARD)) for _ in range(MAX_DRAFT)]
    seen = considered(rng, said, may_cut=threshold > 0)
    tops = seen.confidence[::3]
    length = next((k for k, top in enumerate(tops) if top < threshold), MAX_DRAFT)
    kept = 0
    while kept < length and rng.random() < hazards[kept]:
        kept += 1
    return LoggedRow(length, kept, seen, 0.7)


def confident_log(
    num_steps: int, batch: int = 8, threshold: float = 0.6, share: float = 0.3,
    telling: bool = True, seed: int = 0,
) -> list[LoggedStep]:  # fmt: skip
    """Steps in which drafts were cut at a threshold, or, in a share of them, not at all."""
    rng, steps = random.Random(seed), []
    for _ in range(num_steps):
        is_open = rng.random() < share
        own = 0.0 if is_open else threshold
        rows = tuple(row(rng, own, telling=telling) for _ in range(batch))
        steps.append(
            LoggedStep(
                DRAFTER, MAX_DRAFT, batch, share if is_open else 1 - share, "confidence", 0,
                step_s(MAX_DRAFT, batch), rows, not is_open,
            )
        )  # fmt: skip
    return steps


def step_s(k: int, batch: int) -> float:
    """A batch at which every verified token costs."""
    return 0.01 * (1 + 0.01 * k + 0.05 * k * batch)


def profile() -> list[CostSample]:
    return [
        CostSample(DRAFTER if k else "none", k, batch, step_s(k, batch), 0.01 * 0.01 * k)
        for batch in (1, 4, 8, 16)
        for k in range(MAX_DRAFT + 1)
    ]
