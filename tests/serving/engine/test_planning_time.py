"""The time of planning is told to the policy with the round that ran meanwhile."""

from __future__ import annotations

import time

import pytest

from oracles.engines import RandomPolicy, make_engine, random_model, request_of, run
from policies.interface import Decision
from serving.engine.loop import Engine

SLOW_PLAN, SLOW_S = 5, 0.05


class Slow(RandomPolicy):
    """Decodes plainly, and takes long for one plan."""

    def __init__(self):
        super().__init__()
        self.planned, self.outcomes = [], []

    def plan(self, obs):
        if len(self.planned) == SLOW_PLAN:
            time.sleep(SLOW_S)
        self.planned.append(Decision("none", 0, 1.0, False, f"plan {len(self.planned)}"))
        return self.planned[-1]

    def observe(self, outcome):
        self.outcomes.append(outcome)


@pytest.mark.parametrize(("overlaps", "charged"), [(False, SLOW_PLAN), (True, SLOW_PLAN - 1)])
def test_a_slow_plan_is_charged_to_the_round_that_ran_meanwhile(overlaps, charged):
    policy = Slow()
    parts = make_engine(random_model("qwen3"), overlaps=overlaps).parts
    run(Engine(parts, policy), [request_of("0", [5, 6, 7, 8], 16)])
    slow = [o for o in policy.outcomes if o.plan_s >= SLOW_S]
    assert [outcome.decision.reason for outcome in slow] == [f"plan {charged}"]
    assert slow[0].step_s >= slow[0].plan_s
    others = [o for o in policy.outcomes if o is not slow[0]]
    assert len(others) >= 8 and all(o.plan_s < SLOW_S / 2 for o in others)
