"""Settings choose the policy by its kind, and the fixed policy never varies."""

from __future__ import annotations

import pkgutil

import pytest

from configs.schema import PolicySettings
from policies.catalog import CATALOG, build_policy
from policies.fixed import FixedPolicy
from policies.goodput import GoodputPolicy
from policies.guard import Guard
from policies.interface import DraftPolicy, StepObs
from tests.policies.simulated import DRAFTERS


def obs(caps=(8, 2), drafters=("eagle3",), max_draft=8):
    return StepObs(0, len(caps), bytes(caps), None, drafters, max_draft, 0)


def build(drafters=DRAFTERS, max_draft=8, **settings):
    return build_policy(PolicySettings(**settings), drafters, 0, max_draft)


def test_a_fixed_policy_always_decides_the_same():
    policy = FixedPolicy("eagle3", 4)
    before = policy.plan(obs())
    policy.calibrate([])
    policy.on_swap("eagle3", 1, {"acceptance": [0.9]})
    assert policy.plan(obs()) == before
    assert (before.drafter, before.draft_k, before.propensity) == ("eagle3", 4, 1.0)


def test_a_fixed_policy_never_exceeds_what_may_be_drafted():
    assert FixedPolicy("eagle3", 4).plan(obs(max_draft=3)).draft_k == 3
    assert FixedPolicy("eagle3", 4).plan(obs(caps=(2, 1))).draft_k == 2
    for seen in (obs(caps=(0,)), obs(drafters=("suffix",)), obs(max_draft=0)):
        assert FixedPolicy("eagle3", 4).plan(seen).drafter == "none"


def test_settings_choose_the_policy():
    assert isinstance(build(), GoodputPolicy)
    fixed = build(kind="fixed", drafter="suffix", draft_k=3)
    decision = fixed.plan(obs(drafters=("eagle3", "suffix")))
    assert (decision.drafter, decision.draft_k) == ("suffix", 3)


@pytest.mark.parametrize("kind", CATALOG)
@pytest.mark.parametrize("nothing", [{"drafters": {}}, {"max_draft": 0}])
def test_where_nothing_can_be_drafted_every_kind_decodes_plainly(nothing, kind):
    policy = build(kind=kind, **nothing)
    assert (policy.plan(obs()).drafter, policy.plan(obs()).draft_k) == ("none", 0)


@pytest.mark.parametrize("kind", CATALOG)
def test_every_kind_implements_the_whole_protocol(kind):
    policy = build(kind=kind)
    own = policy.inner if isinstance(policy, Guard) else policy
    assert isinstance(own, pkgutil.resolve_name(CATALOG[kind]))
    members = {name for name in vars(DraftPolicy) if not name.startswith("_")}
    verbs = members - {"wants_profile"}
    assert {"calibrate", "rest", "wants_matches", "plan", "observe", "on_swap", "figures"} == verbs
    assert isinstance(policy.wants_profile, bool)
    assert [verb for verb in verbs if not callable(getattr(policy, verb, None))] == []
    assert policy.figures()["kind"] == kind


@pytest.mark.parametrize("drafters", [DRAFTERS, {}])
def test_an_unknown_kind_names_the_known_ones_and_the_nearest(drafters):
    settings = PolicySettings.model_construct(kind="godput")
    known = ", ".join(sorted(CATALOG))
    with pytest.raises(ValueError, match=f"known: {known}; did you mean 'goodput'"):
        build_policy(settings, drafters, 0, 8)
