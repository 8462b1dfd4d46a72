"""Logs of a policy that chooses K and a share of the draft tokens to verify, with known
probabilities, in text whose positions the drafter's confidence tells apart."""

from __future__ import annotations

import random
from collections.abc import Callable

import numpy as np

from policies.budgets import NOTED, allocation_of
from policies.interface import CostSample
from policies.logged import LoggedRow, LoggedStep
from tests.policies.confident_logs import EASY, HARD, considered
from tests.policies.logs import DRAFTER

MAX_DRAFT, NUM_SHARES = 4, 4


def step_s(k: int, batch: int, budget: float) -> float:
    """Drafting, and the verification of some draft tokens."""
    return 0.01 * (1 + 0.05 * k + 0.03 * budget) if k else 0.01


def profile(packed: float = 1.0) -> list[CostSample]:
    """Of whole rounds; packed rows take as long as the table expects."""
    return [
        CostSample(DRAFTER if k else "none", k, batch, step_s(k, batch, k * batch), 0.01 * 0.05 * k)
        for batch in (1, 4, 8)
        for k in range(MAX_DRAFT + 1)
    ]


def any_pair(rng: random.Random) -> tuple[int, int, float]:
    """K and share, all as likely, and the probability of both."""
    return rng.randint(0, MAX_DRAFT), rng.randrange(NUM_SHARES), 1 / (MAX_DRAFT + 1) / NUM_SHARES


def always(k: int, share: int) -> Callable[[random.Random], tuple[int, int, float]]:
    return lambda rng: (k, share, 1.0)


def budget_log(
    num_steps: int,
    choose: Callable[[random.Random], tuple[int, int, float]],
    batch: int = 4,
    seed: int = 0,
    slower: float = 1.0,
) -> list[LoggedStep]:
    """
    Args:
        slower: time of steps whose drafts were cut, relative to what the profile expects.
    """
    rng, steps = random.Random(seed), []
    for _ in range(num_steps):
        k, share, propensity = choose(rng)
        if not k:
            rows = (LoggedRow(0, 0),) * batch
            propensity *= NUM_SHARES if propensity < 1 else 1
            steps.append(_step("none", 0, batch, propensity, step_s(0, batch, 0), rows))
            continue
        hazards = [[rng.choice((EASY, HARD)) for _ in range(k)] for _ in range(batch)]
        allocation = allocation_of(share, NUM_SHARES, batch, k)
        seen = [considered(rng, one, may_cut=allocation.may_cut) for one in hazards]
        figures = np.array([one.confidence for one in seen]).reshape(batch, k, 3)
        lengths = allocation.lengths(figures, [k] * batch, np.ones(batch), batch).tolist()
        rows = []
        for own, told, length in zip(hazards, seen, lengths, strict=True):
            kept = 0
            while kept < length and rng.random() < own[kept]:
                kept += 1
            rows.append(LoggedRow(length, kept, told, 0.7))
        budget = allocation.budget(batch, k)
        seconds = step_s(k, batch, budget) * (slower if allocation.may_cut else 1.0)
        notes = ((f"ltd.{NOTED}", float(np.float32(budget / batch))),)
        steps.append(
            _step(
                DRAFTER, k, batch, propensity, seconds, tuple(rows), allocation.may_cut,
                notes if allocation.may_cut else (),
            )
        )  # fmt: skip
    return steps


def _step(drafter, k, batch, propensity, seconds, rows, may_cut=False, notes=()):
    return LoggedStep(
        drafter, k, batch, propensity, "ltd", 0, seconds, rows, may_cut, notes=notes
    )  # fmt: skip
