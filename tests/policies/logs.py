"""Logs of steps whose law is known, as a server would have written them."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence

from policies.interface import CostSample
from policies.logged import LoggedRow, LoggedStep

DRAFTER = "eagle3"
HAZARDS = (0.8, 0.7, 0.6, 0.55, 0.5, 0.5, 0.45, 0.4)
MAX_DRAFT = len(HAZARDS)


def step_s(k: int, batch: int) -> float:
    """Seconds of a step: verification of every token costs more the larger the batch is."""
    return 0.01 * (1 + 0.05 * k + 0.004 * k * batch + (0.02 if k else 0.0))


def profile(batches: Sequence[int] = (1, 2, 4, 8, 16, 32, 64)) -> list[CostSample]:
    return [
        CostSample(DRAFTER if k else "none", k, batch, step_s(k, batch), 0.0)
        for batch in batches
        for k in range(MAX_DRAFT + 1)
    ]


def expected_tokens(k: int, hazards: Sequence[float] = HAZARDS) -> float:
    """Of one row."""
    total = survival = 1.0
    for hazard in hazards[:k]:
        survival *= hazard
        total += survival
    return total


def drawn(rng: random.Random, k: int, hazards: Sequence[float]) -> LoggedRow:
    kept = 0
    while kept < k and rng.random() < hazards[kept]:
        kept += 1
    return LoggedRow(k, kept)


def log(
    num_steps: int,
    choose: Callable[[random.Random, int], tuple[int, float]],
    batches: Sequence[int] = (1, 8, 32),
    hazards: Callable[[int], Sequence[float]] = lambda at: HAZARDS,
    seed: int = 0,
    noise: float = 0.05,
) -> list[LoggedStep]:
    """Steps whose K a behaviour policy chose.

    Args:
        choose: (random numbers, batch) -> K and its probability.
        hazards: number of the step -> acceptance by position.
    """
    rng = random.Random(seed)
    steps = []
    for at in range(num_steps):
        batch = batches[at * len(batches) // num_steps]
        k, propensity = choose(rng, batch)
        steps.append(
            LoggedStep(
                drafter=DRAFTER if k else "none",
                draft_k=k,
                batch=batch,
                propensity=propensity,
                policy="test",
                version=0,
                step_s=step_s(k, batch) * rng.lognormvariate(0, noise),
                rows=tuple(drawn(rng, k, hazards(at)) for _ in range(batch)),
            )
        )
    return steps


def any_k(rng: random.Random, batch: int) -> tuple[int, float]:
    """All K as likely."""
    return rng.randint(0, MAX_DRAFT), 1 / (MAX_DRAFT + 1)


def always(k: int) -> Callable[[random.Random, int], tuple[int, float]]:
    return lambda rng, batch: (k, 1.0)
