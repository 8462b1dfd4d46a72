"""A made-up engine: known acceptance and step times, so that the best arm is known too."""

from __future__ import annotations

import random
from dataclasses import dataclass, replace

from policies.cost import CostSample
from policies.interface import Decision, Outcome, RowOutcome, StepObs


@dataclass(frozen=True)
class World:
    """What a policy is up against."""

    batch: int = 1
    eagle: tuple[float, ...] = (0.8,) * 8
    """Conditional acceptance of position 1, 2, ..."""
    suffix: float = 0.8
    """The same for a matching row of the index, at every position."""
    match_share: float = 0.0
    """Rows whose suffix matches (by 6 tokens) in a step."""
    plain_s: float = 0.010
    verify_per_token_s: float = 0.0003
    """For each draft token and row."""
    draft_s: float = 0.001
    """For each draft token, whatever the batch."""
    look_s: float = 0.0
    """What it costs to look at the batch; yardsticks decode without looking."""
    cold_s: float = 0.0
    """What catching up costs a neural drafter after a step without it; no profile knows of it."""
    slowdown: float = 1.0
    noise: float = 0.03
    max_draft: int = 8

    def seconds(self, drafter, k):
        """(step, draft) without noise."""
        draft = {"eagle3": self.draft_s * k, "suffix": 0.00002 * k, "none": 0.0}[drafter]
        step = self.plain_s + self.verify_per_token_s * k * self.batch + draft
        return self.slowdown * step, self.slowdown * draft

    def profile(self):
        """What a server measures at start-up."""
        arms = [("none", 0)] + [(d, k) for d in ("eagle3", "suffix") for k in (1, 2, 4, 8)]
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
    """Decode for some steps; expected tokens and noiseless seconds of what the policy chose, so
    that two runs compare closely. The policy itself sees drawn tokens and noisy times."""
    rng = random.Random(seed)
    totals = Totals()
    last_drafter = "none"
    for step in range(start, start + steps):
        matches = tuple(6 * (rng.random() < world.match_share) for _ in range(world.batch))
        decision, look_s = policy.rest(), 0.0
        if decision is None:
            look_s = world.look_s
            decision = policy.plan(
                StepObs(
                    step=step,
                    batch=world.batch,
                    caps=(world.max_draft,) * world.batch,
                    suffix_matches=matches,
                    drafters=("eagle3", "suffix"),
                    max_draft=world.max_draft,
                    version=0,
                )
            )
        rows = tuple(draw(decision, match, world, rng) for match in matches)
        step_s, draft_s = world.seconds(decision.drafter, decision.draft_k)
        step_s += look_s
        if decision.drafter == "eagle3" != last_drafter:
            step_s += world.cold_s
        last_drafter = decision.drafter
        noise = rng.lognormvariate(0, world.noise) * (20 if rng.random() < 0.002 else 1)
        policy.observe(
            Outcome(
                decision,
                world.batch,
                rows,
                step_s * noise,
                (draft_s + look_s) * noise,
                False,
                0,
                plan_s=look_s * noise,
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
        hazard = world.suffix if decision.drafter == "suffix" else world.eagle[accepted]
        if rng.random() >= hazard:
            break
        accepted += 1
    return RowOutcome(k, accepted, match)


def expected_tokens(decision: Decision, match: int, world: World) -> float:
    k = decision.draft_k if decision.drafter != "suffix" or match else 0
    expected = survival = 1.0
    for j in range(k):
        survival *= world.suffix if decision.drafter == "suffix" else world.eagle[j]
        expected += survival
    return expected


def fixed_speed(world, drafter, k):
    """Exact tokens per second of a fixed arm."""
    expected, survival = 1.0, 1.0
    for j in range(k):
        survival *= world.suffix if drafter == "suffix" else world.eagle[j]
        expected += survival * (world.match_share if drafter == "suffix" else 1.0)
    return world.batch * expected / world.seconds(drafter, k)[0]


def best_fixed_speed(world):
    """Of the best arm in hindsight, plain decoding included."""
    arms = [("none", 0)] + [
        (d, k) for d in ("eagle3", "suffix") for k in range(1, world.max_draft + 1)
    ]
    return max(fixed_speed(world, drafter, k) for drafter, k in arms)
