"""Drafts of the default policy that end early, on a simulated engine that can end them."""

from __future__ import annotations

import random
from dataclasses import dataclass

import pytest

from configs.schema import PolicySettings
from policies.catalog import build_policy
from policies.ending import Course
from policies.interface import CostSample, Decision, Outcome, RowOutcomes, StepObs
from tests.policies.simulated import NEURAL, Noise

DRAFTER = "eagle3"
MAX_DRAFT = 8
TOPS = (0.15, 0.55, 0.95)
"""Confidence in a position: it stays as it is for a while."""
STAYS = 0.7


@dataclass
class Machine:
    """Seconds, and what confidence says of acceptance."""

    hazards: tuple[float, ...] = (0.15, 0.55, 0.95)
    """By confidence."""
    plain_s: float = 0.010
    pass_s: float = 0.0012
    row_s: float = 0.0005
    tell_s: float = 0.0001

    def seconds(self, num_seen: int, num_verified: int) -> float:
        base = 0.0006 if num_seen else 0.0
        return self.plain_s + base + self.pass_s * num_seen + self.row_s * num_verified

    def profile(self) -> list[CostSample]:
        return [
            CostSample(DRAFTER if k else "none", k, batch, self.seconds(k, k), self.pass_s * k)
            for batch in (1, 2)
            for k in range(MAX_DRAFT + 1)
        ]


@dataclass
class Played:
    tokens: int = 0
    seconds: float = 0.0
    num_ended: int = 0

    @property
    def rate(self) -> float:
        return self.tokens / self.seconds


def policy_for(machine, *, ends, seed=0):
    policy = build_policy(
        PolicySettings(), {DRAFTER: NEURAL}, seed, MAX_DRAFT, ending=(DRAFTER,) if ends else ()
    )
    policy.calibrate(machine.profile())
    return policy


def play(policy, machine, num_steps, seed=0, batch=1, decisions=None):
    """Decode one request; returns what the second half brought."""
    rng, noise, played = random.Random(seed), Noise(), Played()
    for step in range(num_steps):
        decision = policy.rest()
        if decision is None:
            obs = StepObs(step, batch, (MAX_DRAFT,) * batch, None, (DRAFTER,), MAX_DRAFT, 0)
            decision = policy.plan(obs)
        if decisions is not None:
            decisions.append(decision)
        k, num_seen, num_verified = decision.draft_k, decision.draft_k, decision.draft_k
        tops = [rng.choice(TOPS)]
        while len(tops) < MAX_DRAFT:
            tops.append(tops[-1] if rng.random() < STAYS else rng.choice(TOPS))
        tell_s = 0.0
        if decision.ending is not None:
            course, num_seen = Course(decision.ending, k), 0
            while course.wants_more:
                course.sees(tops[num_seen])
                num_seen += 1
            num_verified, tell_s = course.length, machine.tell_s * num_seen
        kept = 0
        lucks = [rng.random() for _ in range(MAX_DRAFT)]
        while kept < num_verified and lucks[kept] < machine.hazards[TOPS.index(tops[kept])]:
            kept += 1
        seconds = noise.draw(machine.seconds(num_seen, num_verified) + tell_s, rng)
        told = [tops[:num_seen]] if decision.ending is not None else None
        rows = RowOutcomes([num_verified] * batch, [kept] * batch, tops=told, tops_s=tell_s)
        policy.observe(Outcome(decision, batch, rows, seconds, machine.pass_s * num_seen, False, 0))
        if step >= num_steps // 2:
            played.tokens += 1 + kept
            played.seconds += seconds
            played.num_ended += decision.ending is not None and decision.ending.may_end
    return played


def both(machine, num_steps=3000, seed=0):
    """Speed with early ends relative to without, and the share of steps that could end."""
    ends, today = (
        play(policy_for(machine, ends=ends, seed=seed), machine, num_steps, seed)
        for ends in (True, False)
    )
    return ends.rate / today.rate, ends.num_ended / (num_steps // 2)


def test_ending_pays_where_confidence_tells_what_is_kept():
    gain, share = both(Machine())

    assert gain > 1.05
    assert share > 0.8


@pytest.mark.parametrize(
    "machine",
    [
        Machine(hazards=(0.55, 0.55, 0.55)),
        Machine(hazards=(0.05, 0.1, 0.2)),
        Machine(tell_s=0.002),
    ],
    ids=["confidence says nothing", "drafting does not pay", "looking is dear"],
)
def test_where_it_does_not_pay_it_is_off_and_costs_nothing(machine):
    gain, share = both(machine)

    assert share < 0.02
    assert gain > 0.985


def test_it_ends_when_confidence_has_become_misleading():
    machine = Machine()
    policy = policy_for(machine, ends=True)
    assert play(policy, machine, 2000).num_ended > 700
    machine.hazards = (0.6, 0.6, 0.6)

    gain = play(policy, machine, 4000, seed=1).rate
    today = play(policy_for(machine, ends=False), machine, 4000, seed=1).rate

    assert gain / today > 0.985


def test_what_is_left_out_does_not_flatter_what_deep_positions_keep():
    """Only confident drafts get there; without an end, all do."""
    machine = Machine()
    ends, today = (policy_for(machine, ends=ends) for ends in (True, False))
    for policy in (ends, today):
        play(policy, machine, 4000)

    told, whole = (
        policy.figures()["acceptance"][f"{DRAFTER}/all"]["usual"][:3] for policy in (ends, today)
    )
    for j, (one, other) in enumerate(zip(told, whole, strict=True)):
        assert one == pytest.approx(other, abs=0.06), f"position {j + 1}"


def test_decisions_say_how_likely_their_sort_was():
    decisions: list[Decision] = []
    play(policy_for(Machine(), ends=True), Machine(), 4000, decisions=decisions)

    late = [one for one in decisions[2000:] if one.drafter == DRAFTER and not one.explore]
    sorts = [
        [one for one in late if one.ending is None],
        [one for one in late if one.ending is not None and one.ending.grace],
        [one for one in late if one.ending is not None and not one.ending.grace],
    ]
    shares = [own[-1].propensity / own[-1].note.decision.propensity for own in sorts]
    for own, share in zip(sorts, shares, strict=True):
        assert len(own) / len(late) == pytest.approx(share, abs=0.03)
    assert sum(shares) == pytest.approx(1)


def test_several_requests_and_drafters_that_cannot_are_left_alone():
    decisions: list[Decision] = []
    play(policy_for(Machine(), ends=True), Machine(), 600, batch=2, decisions=decisions)
    play(policy_for(Machine(), ends=False), Machine(), 600, decisions=decisions)

    assert all(one.ending is None for one in decisions)


def test_other_weights_begin_without_what_ending_was_worth():
    machine = Machine()
    policy = policy_for(machine, ends=True)
    play(policy, machine, 2000)
    before = policy.figures()["ending"][DRAFTER]
    assert before["is_on"] and before["rounds"] > 1000

    policy.on_swap(DRAFTER, 1, {})

    after = policy.figures()["ending"][DRAFTER]
    assert after["rounds"] == 0 and after["worth"] == 0
