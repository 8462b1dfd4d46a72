"""A policy under guard drafts only while that is faster than plain decoding."""

from __future__ import annotations

import random
from collections import Counter

import pytest

from configs.schema import PolicySettings
from policies.catalog import build_policy
from policies.fixed import PLAIN
from policies.goodput import GoodputPolicy
from policies.guard import Guard
from policies.interface import Decision, Outcome, PolicyContext, RowOutcomes
from tests.policies.logs import DRAFTER, MAX_DRAFT, drawn, expected_tokens, profile, step_s
from tests.policies.simulated import NEURAL
from tests.policies.test_lengths import obs

GOOD, BAD = (0.8,) * MAX_DRAFT, (0.05,) * MAX_DRAFT


class Always:
    """Drafts K tokens in every step, whatever comes of it."""

    kind = "always"
    wants_profile = False

    def __init__(self, k):
        self._k = k
        self.observed, self.swaps = [], []

    def calibrate(self, samples):
        pass

    def rest(self):
        return None

    def wants_matches(self):
        return False

    def plan(self, obs):
        return Decision(DRAFTER, self._k, 0.5, False, "always", "always")

    def observe(self, outcome):
        self.observed.append(outcome.decision)

    def on_swap(self, drafter, version, calibration):
        self.swaps.append(version)

    def figures(self):
        return {"kind": "always"}


def guarded(k=4, seed=0, measured=True):
    guard = Guard(Always(k), PolicyContext({DRAFTER: NEURAL}, MAX_DRAFT, seed), DRAFTER)
    guard.calibrate(profile() if measured else [])
    return guard


def decode(guard, num_steps, hazards, batch=1, seed=0, slowdown=1.0):
    rng, decisions = random.Random(seed), []
    for _ in range(num_steps):
        decision = guard.plan(obs(batch))
        k = decision.draft_k
        rows = [drawn(rng, k, hazards) for _ in range(batch)]
        seconds = step_s(k, batch) * rng.lognormvariate(0, 0.05) * (slowdown if k else 1)
        outcome = Outcome(
            decision, batch,
            RowOutcomes([r.num_verified for r in rows], [r.num_accepted for r in rows]),
            seconds, 0.0, False, 0,
        )  # fmt: skip
        guard.observe(outcome)
        decisions.append(decision)
    return decisions


def over_plain(decisions, hazards, batch=1):
    tokens = sum(expected_tokens(d.draft_k, hazards) for d in decisions)
    return tokens * step_s(0, batch) / sum(step_s(d.draft_k, batch) for d in decisions)


@pytest.mark.parametrize("batch", [1, 8, 32])
@pytest.mark.parametrize("measured", [True, False])
def test_a_drafter_that_never_pays_costs_hardly_anything(batch, measured):
    """0.985 of plain decoding is asked after 200 steps, the first ones included here."""
    guard = guarded(measured=measured)
    first = decode(guard, 200, BAD, batch)
    after = decode(guard, 4000, BAD, batch, seed=1)

    assert sum(d.draft_k > 0 for d in first[40:]) < 30
    assert over_plain(after, BAD, batch) > 0.985


@pytest.mark.parametrize("batch", [1, 8])
def test_a_drafter_that_pays_is_used(batch):
    guard = guarded()
    decode(guard, 200, GOOD, batch)
    after = decode(guard, 4000, GOOD, batch, seed=1)

    assert sum(d.draft_k > 0 for d in after) / 4000 > 0.98
    always = expected_tokens(4, GOOD) * step_s(0, batch) / step_s(4, batch)
    assert over_plain(after, GOOD, batch) > 0.98 * always


@pytest.mark.parametrize("seed", range(3))
def test_a_drafter_that_gains_a_third_is_used_too(seed):
    """GOOD gains so much that a token less in every step would not show."""
    fair = (0.35,) * MAX_DRAFT
    always = expected_tokens(2, fair) * step_s(0, 1) / step_s(2, 1)
    assert 1.2 < always < 1.4
    guard = guarded(k=2, seed=seed)
    decode(guard, 400, fair, seed=seed)
    after = decode(guard, 4000, fair, seed=seed + 10)

    assert over_plain(after, fair) > 0.95 * always


@pytest.mark.parametrize("batch", [1, 4])
@pytest.mark.parametrize("seed", range(4))
def test_a_drafter_that_ceases_to_pay_is_silenced_within_50_steps(seed, batch):
    """Off, and off it stays but for trials, each of which ends after a few steps."""
    guard = guarded(seed=seed)
    decode(guard, 1500, GOOD, batch, seed=seed)
    assert guard.figures()["guard"]["is_on"]

    drafts = [d.draft_k > 0 for d in decode(guard, 270, BAD, batch, seed=seed + 10)]

    silent = next(at for at in range(250) if not any(drafts[at : at + 20]))
    assert silent <= 50
    assert not guard.figures()["guard"]["is_on"]
    assert sum(drafts[50:]) <= 25, "of 220 steps; it had 50 to find out"


def test_the_off_state_is_left_when_drafting_pays_again():
    guard = guarded()
    decode(guard, 3000, BAD, 4)
    assert not guard.figures()["guard"]["is_on"]

    decode(guard, 12_000, GOOD, 4, seed=1)

    assert guard.figures()["guard"]["is_on"]


def test_times_are_as_good_a_reason_as_acceptance():
    """Drafted steps take three times as long as the profile says."""
    guard = guarded()
    found = decode(guard, 3000, (0.5,) * MAX_DRAFT, 1, slowdown=3.0)

    assert sum(d.draft_k > 0 for d in found[100:]) < 200


def test_a_swap_is_followed_by_a_trial():
    guard = guarded()
    decode(guard, 1000, BAD, 4)

    guard.on_swap(DRAFTER, 1, {})
    found = decode(guard, 100, GOOD, 4, seed=1)

    assert guard.inner.swaps == [1]
    assert sum(d.draft_k > 0 for d in found) > 90


def test_the_policy_hears_of_its_own_decisions_only_and_as_it_made_them():
    guard = guarded()
    found = decode(guard, 600, GOOD)

    assert len(guard.inner.observed) == sum(d.draft_k > 0 for d in found)
    assert {d.propensity for d in guard.inner.observed} == {0.5}


def test_propensities_are_those_of_guard_and_policy_together():
    guard = guarded()
    found = decode(guard, 20_000, GOOD)
    on = found[100:]

    claims = Counter((d.draft_k, d.reason, round(d.propensity, 4)) for d in on)
    [(drafted, count)] = [(c, n) for c, n in claims.items() if c[0]]
    assert drafted[2] == round(0.5 * (1 - 1 / 512), 4)
    begun = [(c, n) for c, n in claims.items() if c[1] == "guard" and c[2] < 1]
    assert sum(n for _, n in begun) / (count + sum(n for _, n in begun)) == pytest.approx(
        1 / 512, rel=0.5
    )
    assert all(d.policy == "always" for d in on)


def test_every_kind_but_those_with_a_floor_of_their_own_is_guarded():
    def build(kind, **settings):
        return build_policy(PolicySettings(kind=kind, **settings), {DRAFTER: NEURAL}, 0, MAX_DRAFT)

    assert isinstance(build("ucb"), Guard)
    assert not isinstance(build("ucb", guard=False), Guard)
    assert isinstance(build("goodput"), GoodputPolicy)
    assert not isinstance(build("fixed"), Guard)


def test_plain_decisions_are_plain():
    guard = guarded(measured=False)
    decision = guard.plan(obs())
    assert (decision.drafter, decision.draft_k) == (PLAIN.drafter, PLAIN.draft_k)
