"""The fixed policy is fixed, and settings choose between the two."""

from __future__ import annotations

from configs.schema import PolicySettings
from policies.build import build_policy
from policies.fixed import FixedPolicy
from policies.goodput import GoodputPolicy
from policies.interface import StepObs


def obs(caps=(8, 2), drafters=("eagle3",), max_draft=8):
    return StepObs(0, len(caps), caps, None, drafters, max_draft, 0)


def test_a_fixed_policy_always_says_the_same():
    decision = FixedPolicy("eagle3", 4).plan(obs())
    assert (decision.drafter, decision.draft_k, decision.propensity) == ("eagle3", 4, 1.0)


def test_a_fixed_policy_never_exceeds_what_may_be_drafted():
    assert FixedPolicy("eagle3", 4).plan(obs(max_draft=3)).draft_k == 3
    assert FixedPolicy("eagle3", 4).plan(obs(caps=(2, 1))).draft_k == 2
    for seen in (obs(caps=(0,)), obs(drafters=("suffix",)), obs(max_draft=0)):
        assert FixedPolicy("eagle3", 4).plan(seen).drafter == "none"


def test_settings_choose_the_policy():
    assert isinstance(build_policy(PolicySettings(), ("eagle3",), 0), GoodputPolicy)
    fixed = build_policy(PolicySettings(kind="fixed", draft_k=3), ("eagle3",), 0)
    assert fixed.plan(obs()).draft_k == 3
    plain = build_policy(PolicySettings(), (), 0)
    assert plain.plan(obs()).draft_k == 0
