"""A simulated engine with known acceptance and step times, so that the best arm is known too."""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from policies.interface import CostSample, Decision, Outcome, PolicyContext, RowOutcome, StepObs


@dataclass(frozen=True)
class Traits:
    """Satisfies ``DrafterTraits``."""

    is_neural: bool
    needs_match: bool
    prior_acceptance: tuple[float, ...]
    prior_draft_cost: float


NEURAL = Traits(True, False, (0.6,), 0.08)
INDEX = Traits(False, True, (0.0, 0.35, 0.45, 0.55, 0.7, 0.8), 0.005)
DRAFTERS = {"eagle3": NEURAL, "suffix": INDEX}


def context(drafters=DRAFTERS, max_draft=8, seed=0):
    return PolicyContext(drafters=drafters, max_draft=max_draft, seed=seed)


@dataclass(frozen=True)
class World:
    """The traffic and the machine that a policy faces."""

    batch: int = 1
    eagle: tuple[float, ...] = (0.8,) * 8
    """Conditional acceptance of the neural drafter at position 1, 2, ..."""
    suffix: float = 0.8
    """Acceptance of the index at every position of a row with a match."""
    others: Mapping[str, tuple[float, ...]] = field(default_factory=dict)
    """Conditional acceptance of further neural drafters, by kind."""
    match_share: float = 0.0
    """Share of rows that have a match (of 6 tokens) in a step."""
    plain_s: float = 0.010
    verify_per_token_s: float = 0.0003
    """Seconds for each draft token and row."""
    draft_s: float = 0.001
    """Seconds of a neural drafter for each draft token, at any batch."""
    plan_s: float = 0.0
    """Seconds to inspect the batch; the fixed arms of comparisons do without."""
    cold_s: float = 0.0
    """Seconds a neural drafter needs to catch up after a step without it; not in the profile."""
    slowdown: float = 1.0
    noise: float = 0.03
    max_draft: int = 8

    @property
    def drafters(self):
        return ("eagle3", "suffix", *self.others)

    def hazard(self, drafter, position):
        """Acceptance of a draft token whose predecessors were accepted; positions count from 0."""
        if drafter == "suffix":
            return self.suffix
        return {"eagle3": self.eagle, **self.others}[drafter][position]

    def seconds(self, drafter, k):
        """(step, draft) without noise."""
        draft = {"suffix": 0.00002 * k, "none": 0.0}.get(drafter, self.draft_s * k)
        step = self.plain_s + self.verify_per_token_s * k * self.batch + draft
        return self.slowdown * step, self.slowdown * draft

    def profile(self):
        """The samples that a server takes at start-up."""
        arms = [("none", 0)] + [(d, k) for d in self.drafters for k in (1, 2, 4, 8)]
        return [
            CostSample(d, k, batch, *replace(self, batch=batch, slowdown=1.0).seconds(d, k))
            for d, k in arms
            for batch in (1, 4, 16, 64)
        ]


@dataclass
class Totals:
    tokens: float = 0.0
    seconds: float = 0.0

    @property
    def speed(self):
        return self.tokens / self.seconds


def run(policy, world, *, steps, seed, start=0, on_step=None):
    """Decode ``steps`` steps; returns expected tokens and noiseless seconds of the chosen arms, so
    that runs compare closely. The policy itself sees drawn tokens and noisy times."""
    rng = random.Random(seed)
    totals = Totals()
    last_drafter = "none"
    for step in range(start, start + steps):
        matches = tuple(6 * (rng.random() < world.match_share) for _ in range(world.batch))
        decision, plan_s = policy.rest(), 0.0
        if decision is None:
            plan_s = world.plan_s
            decision = policy.plan(
                StepObs(
                    step=step,
                    batch=world.batch,
                    caps=(world.max_draft,) * world.batch,
                    matches=matches,
                    drafters=world.drafters,
                    max_draft=world.max_draft,
                    version=0,
                )
            )
        rows = tuple(draw(decision, match, world, rng) for match in matches)
        step_s, draft_s = world.seconds(decision.drafter, decision.draft_k)
        step_s += plan_s
        if decision.drafter not in ("none", "suffix", last_drafter):
            step_s += world.cold_s
        last_drafter = decision.drafter
        noise = rng.lognormvariate(0, world.noise) * (20 if rng.random() < 0.002 else 1)
        policy.observe(
            Outcome(
                decision,
                world.batch,
                rows,
                step_s * noise,
                (draft_s + plan_s) * noise,
                False,
                0,
                plan_s=plan_s * noise,
            )
        )
        totals.tokens += sum(expected_tokens(decision, match, world) for match in matches)
        totals.seconds += step_s
        if on_step:
            on_step(decision, rows)
    return totals


def draw(decision: Decision, match: int, world: World, rng: random.Random) -> RowOutcome:
    k = decision.draft_k if decision.drafter != "suffix" or match else 0
    accepted = 0
    while accepted < k:
        if rng.random() >= world.hazard(decision.drafter, accepted):
            break
        accepted += 1
    return RowOutcome(k, accepted, match)


def expected_tokens(decision: Decision, match: int, world: World) -> float:
    k = decision.draft_k if decision.drafter != "suffix" or match else 0
    expected = survival = 1.0
    for j in range(k):
        survival *= world.hazard(decision.drafter, j)
        expected += survival
    return expected


def fixed_speed(world, drafter, k):
    """Exact tokens per second of a fixed arm."""
    expected, survival = 1.0, 1.0
    for j in range(k):
        survival *= world.hazard(drafter, j)
        expected += survival * (world.match_share if drafter == "suffix" else 1.0)
    return world.batch * expected / world.seconds(drafter, k)[0]


def best_fixed_speed(world):
    """Exact tokens per second of the best fixed arm, plain decoding included."""
    arms = [("none", 0)] + [(d, k) for d in world.drafters for k in range(1, world.max_draft + 1)]
    return max(fixed_speed(world, drafter, k) for drafter, k in arms)
