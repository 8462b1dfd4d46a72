"""What a plan weighs is the sum over its requests, whatever of it was computed ahead.

The definition is spelled out here, request by request. The policy counts requests that are alike,
computes what they do not change while the device works, and must come to the same choice.
"""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import replace

import pytest

from policies.goodput import GoodputPolicy
from policies.interface import StepObs
from tests.policies.decided import SMALL, Capped
from tests.policies.simulated import DRAFTERS, INDEX, NEURAL, Rows, Simulation, World, context

ALL = {"eagle3": NEURAL, "other": NEURAL, "suffix": INDEX}
MOST = 8
CLOSE = 1e-9
"""Tokens by which sums that are added up in another order may differ."""


def taught(rng: random.Random) -> GoodputPolicy:
    """A policy that has seen drafts of all drafters, a base that may be any of them."""
    made = GoodputPolicy(context(ALL), explore=0.05, half_life_rounds=200, margin=1.01)
    made.calibrate(World(batch=rng.choice([1, 8, 64])).profile())
    acceptance = made._acceptance
    for _ in range(rng.randrange(40)):
        acceptance.tick(rng.randint(1, 64))
        kind, verified = rng.choice(list(ALL)), rng.randint(1, MOST)
        outcomes = Counter({(verified, rng.randint(0, verified)): rng.randint(1, 9)})
        bucket = rng.randrange(1, 6) if kind == "suffix" else rng.choice([None, 0, 3])
        acceptance.observe(kind, {bucket: outcomes}, 8)
        made._times.observe(kind, verified, rng.randint(1, 64), rng.uniform(0.005, 0.03))
    made._chooser.base = rng.choice(["none", "eagle3", "other"])
    made._steps.drafter = rng.choice(["none", *ALL])
    return made


def seen(rng: random.Random) -> StepObs:
    """Any batch."""
    batch = rng.choice([1, 2, 7, 64, 256])
    looked = rng.random() < 0.6
    caps = [MOST if rng.random() < 0.7 else rng.randint(0, MOST) for _ in range(batch)]
    caps[0] = max(caps[0], 1)
    matches = tuple(rng.choice([0, 0, 1, 3, 5]) for _ in caps) if looked else None
    if looked and rng.random() < 0.2:
        matches = (0,) * batch
    kinds = tuple(ALL) if looked else ("eagle3", "other")
    pending = {"eagle3": rng.randrange(40), "other": rng.randrange(40)}
    return StepObs(
        0, batch, bytes(caps), None if matches is None else bytes(matches), kinds, MOST, 0, pending
    )


def tokens_of(made: GoodputPolicy, obs: StepObs, kind: str, k: int) -> float:
    """Expected tokens of an arm, one request after the other."""
    table, mix = made._acceptance.expected_tokens(kind), made._forecaster._mix
    total = 0.0
    for r, cap in enumerate(obs.caps):
        if obs.matches is not None:
            total += table[obs.matches[r], min(k, cap)]
        elif cap >= max(obs.caps):
            total += sum(share * table[bucket, k] for bucket, share in enumerate(mix))
        else:
            total += table[0, min(k, cap)]
    return float(total)


@pytest.mark.parametrize("seed", range(40))
def test_every_arm_is_worth_the_tokens_of_its_requests_less_its_time(seed):
    rng = random.Random(seed)
    made, obs = taught(rng), seen(rng)
    basis = made._based(obs, obs.longest(MOST))
    weighed = made._weigh(obs, basis)
    values, footing, charges = weighed.choice.values, basis.footing, weighed.choice.charges_s
    can = [kind for kind in obs.drafters if kind != "suffix" or (obs.matches and any(obs.matches))]
    assert list(values) == ["none", *can]

    speed, least = footing.speed, footing.speed * (1.01 if footing.base == "none" else 1.0)
    plain_s = made._times.plain_s(obs.batch)
    wanted = {("none", 0): obs.batch - (plain_s + charges["none"]) * speed}
    for kind in can:
        times = made._times.arm_times(kind, obs.batch)
        for k in range(1, basis.max_k + 1):
            tokens = tokens_of(made, obs, kind, k)
            wanted[kind, k] = tokens - (times[k - 1] + charges[kind]) * least
            if obs.matches is not None or footing.base != "none":
                assert values[kind][k] == pytest.approx(wanted[kind, k], abs=CLOSE * obs.batch)
    if obs.matches is not None and footing.alone >= footing.plain:
        best = max(wanted.values())
        assert wanted[weighed.choice.arm] >= best - CLOSE * obs.batch, "but for ties"


@pytest.mark.parametrize("has_index", [False, True])
@pytest.mark.parametrize("seed", range(2))
def test_what_was_computed_ahead_changes_no_decision(seed, has_index):
    drafters = DRAFTERS if has_index else {"eagle3": NEURAL}
    world = World(
        batch=6, eagle=(0.6,) * 8, request_tokens=25, has_index=has_index,
        rows={1: Rows(0.25, 0.15), 3: Rows(0.1, 0.45, 0.5), 5: Rows(0.1, 0.8, 1.0)},
    )  # fmt: skip

    def decided(*, forgets: bool) -> list[tuple[str, int, float, str]]:
        made = GoodputPolicy(
            context(drafters), explore=0.05, half_life_rounds=200, margin=1.01, probe_share=0.05
        )
        made.calibrate(world.profile())
        plan, found, ahead = made.plan, [], Counter()

        def plan_anew(obs):
            ahead[made._basis is not None] += 1
            if forgets:
                made._basis = made._ahead = None
            return plan(obs)

        made.plan = plan_anew
        server = Capped(made, seed)
        for phase in (world, replace(world, batch=3, rows={})):
            server.run(
                phase, 150,
                lambda one, _: found.append(
                    (one.drafter, one.draft_k, one.propensity, one.reason)
                ),
            )  # fmt: skip
        assert ahead[True] > 50, "most plans find what was computed for them"
        return found

    assert decided(forgets=False) == decided(forgets=True)


@pytest.mark.parametrize("world", [SMALL, replace(SMALL, eagle=(0.1,) * 8)], ids=["good", "poor"])
def test_when_what_was_planned_is_noted_changes_no_decision(world):
    """Most of what a plan has chosen is noted when its outcome comes, and always before the next
    question: one comes right after each plan here, or none."""

    def decided(*, asks: bool) -> list[object]:
        made = GoodputPolicy(context(DRAFTERS), explore=0.05, half_life_rounds=200, margin=1.01)
        made.calibrate(world.profile())
        found, plan = [], made.plan

        def plan_and_ask(obs):
            decision = plan(obs)
            if asks:
                made.wants_matches()
            return decision

        made.plan = plan_and_ask
        Simulation(made, 1).run(world, 500, lambda one, _: found.append((one, one.note)))
        return found

    assert decided(asks=False) == decided(asks=True)


def test_computing_ahead_without_a_look_lets_nothing_fade_that_is_known_of_an_index():
    """What is known of an idle drafter fades when somebody asks for it, so that asking for what
    cannot propose would alter later decisions."""
    made = GoodputPolicy(context(DRAFTERS), explore=0.05, half_life_rounds=200, margin=1.01)
    made.calibrate(SMALL.profile())
    observe, index = made.observe, made._acceptance._drafters["suffix"]
    found = Counter()

    def observe_and_compare(outcome):
        learns = {outcome.decision.drafter, made._rest.gathered.drafter}
        before, plans_alike = index._faded_at, False in made._steps.obs
        observe(outcome)
        if plans_alike and "suffix" not in learns and not made._rest.wants_look():
            found[outcome.rows.matches is not None, index._faded_at == before] += 1

    made.observe = observe_and_compare
    Simulation(made, 8).run(SMALL, 700)
    assert found[True, True] > 5, "after looks"
    assert not found[True, False] and not found[False, False]
