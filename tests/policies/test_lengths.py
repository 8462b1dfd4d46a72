"""Policies that decide on K alone: what they choose, what they learn, and what they say of it."""

from __future__ import annotations

import base64
import dataclasses
import math
import random
from collections import Counter

import numpy as np
import pytest

from configs.choices import SettingsError
from configs.policies import LtdSettings
from configs.schema import PolicySettings
from policies.catalog import build_policy, check_policy
from policies.features import NUM_FEATURES
from policies.interface import Outcome, RowOutcomes, StepObs
from policies.network import Network
from policies.weight_file import text_of
from tests.policies.logs import DRAFTER, HAZARDS, MAX_DRAFT, drawn, expected_tokens, profile, step_s
from tests.policies.simulated import NEURAL

LENGTHS = ("table", "ema_tiers", "ucb", "thompson", "exp3s", "ltd")
LEARNING = ("ucb", "thompson", "exp3s")


def build(kind, **settings):
    policy = build_policy(
        PolicySettings(kind=kind, guard=False, **settings), {DRAFTER: NEURAL}, 0, MAX_DRAFT
    )
    policy.calibrate(profile())
    return policy


def obs(batch=1, most=MAX_DRAFT):
    return StepObs(0, batch, bytes((most,)) * batch, None, (DRAFTER,), most, 0)


def decode(policy, num_steps, batch=1, hazards=HAZARDS, seed=0, most=MAX_DRAFT):
    """Decisions of some steps; speeds are those of the expected tokens."""
    rng, decisions = random.Random(seed), []
    for _ in range(num_steps):
        decision = policy.rest() or policy.plan(obs(batch, most))
        k = decision.draft_k
        rows = [drawn(rng, k, hazards) for _ in range(batch)]
        outcome = Outcome(
            decision,
            batch,
            RowOutcomes([r.num_verified for r in rows], [r.num_accepted for r in rows]),
            step_s(k, batch) * rng.lognormvariate(0, 0.05),
            0.0,
            False,
            0,
        )
        policy.observe(outcome)
        decisions.append(decision)
    return decisions


def speed(decisions, batch=1, hazards=HAZARDS):
    tokens = sum(expected_tokens(d.draft_k, hazards) for d in decisions)
    return batch * tokens / sum(step_s(d.draft_k, batch) for d in decisions)


def best_fixed(batch=1, hazards=HAZARDS):
    return max(batch * expected_tokens(k, hazards) / step_s(k, batch) for k in range(MAX_DRAFT + 1))


@pytest.mark.parametrize("kind", LENGTHS)
def test_decisions_name_their_policy_and_hold_to_what_may_be_drafted(kind):
    for decision in decode(build(kind), 60, most=2):
        assert 0 <= decision.draft_k <= 2
        assert decision.policy == kind
        assert decision.drafter == (DRAFTER if decision.draft_k else "none")
        assert 0 < decision.propensity <= 1
    missing = StepObs(0, 1, bytes((8,)), None, (), 8, 0)
    assert build(kind).plan(missing).draft_k == 0


@pytest.mark.parametrize("kind", LEARNING)
def test_propensities_are_how_often_each_k_is_chosen(kind):
    """Planned again and again from one state, because only outcomes change it."""
    policy = build(kind, random_share=0.2)
    decode(policy, 200)
    plans = [policy.plan(obs()) for _ in range(4000)]

    counts = Counter(plan.draft_k for plan in plans)
    claimed = {plan.draft_k: plan.propensity for plan in plans}
    for k, count in counts.items():
        error = math.sqrt(claimed[k] * (1 - claimed[k]) / 4000)
        assert abs(count / 4000 - claimed[k]) < 5 * error + 1e-9
    assert sum(claimed.values()) > 0.97  # a K that never came up is rare


@pytest.mark.parametrize("kind", LEARNING)
@pytest.mark.parametrize("batch", [1, 16])
def test_policies_that_learn_come_near_the_best_fixed_k(kind, batch):
    policy = build(kind)
    decode(policy, 1500, batch)

    assert speed(decode(policy, 300, batch, seed=1), batch) > 0.9 * best_fixed(batch)


@pytest.mark.parametrize("kind", LEARNING)
def test_policies_that_learn_stop_drafting_where_nothing_is_accepted(kind):
    useless = (0.02,) * MAX_DRAFT
    policy = build(kind)
    decode(policy, 1500, 8, useless)

    plain = 8 / step_s(0, 8)
    assert speed(decode(policy, 300, 8, useless, seed=1), 8, useless) > 0.93 * plain


@pytest.mark.parametrize("kind", LEARNING)
def test_policies_that_learn_forget_at_a_swap(kind):
    policy = build(kind)
    decode(policy, 800, 1, (0.02,) * MAX_DRAFT)
    policy.on_swap(DRAFTER, 1, {})
    decode(policy, 200)

    assert speed(decode(policy, 300, seed=1)) > 0.85 * best_fixed()


@pytest.mark.parametrize("kind", LENGTHS)
def test_a_law_that_was_computed_ahead_is_that_of_the_step(kind):
    """Loads change, and outcomes come between: never a law of another state."""

    def decided(*, forgets):
        policy, found = build(kind), []
        for at, batch in enumerate((1, 4, 4, 1, 16)):
            if forgets:
                plan = policy.plan

                def plan_anew(seen, policy=policy, plan=plan):
                    policy._ahead.clear()
                    return plan(seen)

                policy.plan = plan_anew
            found += decode(policy, 40, batch, seed=at)
            policy.on_swap(DRAFTER, at, {})
        return found

    assert decided(forgets=False) == decided(forgets=True)


def test_a_table_looks_up_the_batch():
    lengths = ((4, 5), (16, 2))
    policy = build("table", table={"lengths": lengths})
    found = [policy.plan(obs(batch)).draft_k for batch in (1, 4, 5, 16, 17, 64)]
    assert found == [5, 5, 2, 2, 0, 0]


def test_tiers_rise_and_fall_as_sglang_moves_them():
    """At one request 1, 3, 5, 7: up from 1 as soon as more than half a token is accepted, and down
    again when less than the next lower tier less 0.75 is."""
    policy = build("ema_tiers")
    always, never = (1.0,) * MAX_DRAFT, (0.0,) * MAX_DRAFT

    up = [d.draft_k for d in decode(policy, 40, hazards=always)]
    assert up[:10] == [1] * 10  # warm-up
    assert [k for k, _ in Counter(up).items()] == [1, 3, 5, 7]
    assert up[10:20] == [3] * 10, "2.34 after five steps of 3, which is not above 2.5 yet"

    down = [d.draft_k for d in decode(policy, 60, hazards=never)]
    assert down[-1] == 1, "the lowest tier of one request drafts"


def test_tiers_leave_zero_to_have_a_look():
    policy = build("ema_tiers")
    found = [d.draft_k for d in decode(policy, 200, 8, (0.0,) * MAX_DRAFT)]

    assert found.count(0) > 80
    assert 1 in found[100:], "it looks again and again"


def test_ucb_counts_no_longer_draft_than_ran():
    """A rejection at once says that K = 8 would have brought 1 token, but only such rounds would be
    counted for it, never those that went on."""
    policy = build("ucb")
    for _ in range(3):
        decision = dataclasses.replace(policy.plan(obs()), draft_k=2)
        policy.observe(Outcome(decision, 1, RowOutcomes([2], [0]), 0.01, 0.0, False, 0))

    assert [reward is None for reward in policy.figures()["rewards"]["1"]] == [
        k > 2 for k in range(MAX_DRAFT + 1)
    ]


def network(best, hidden=4, actions=MAX_DRAFT + 1):
    """A network that always scores one K highest."""
    scores = np.zeros(actions, np.float32)
    scores[best] = 1.0
    zeros = np.zeros((hidden, NUM_FEATURES), np.float32)
    return Network(
        np.zeros(NUM_FEATURES, np.float32),
        np.ones(NUM_FEATURES, np.float32),
        zeros,
        np.zeros(hidden, np.float32),
        np.zeros((actions, hidden), np.float32),
        scores,
    )


def test_a_network_decides_and_random_steps_are_known(tmp_path):
    path = tmp_path / "ltd.safetensors"
    path.write_bytes(network(5).to_bytes())
    policy = build("ltd", ltd={"weights": path}, random_share=0.1)

    found = decode(policy, 500)

    share = sum(d.draft_k == 5 for d in found) / 500
    assert 0.85 < share < 0.97
    by_k = {d.draft_k: d.propensity for d in found}
    assert by_k[5] == pytest.approx(0.9 + 0.1 / 9)
    assert by_k[0] == pytest.approx(0.1 / 9)
    assert policy.plan(obs(most=3)).draft_k <= 3


@pytest.mark.parametrize(("acceptance", "longest"), [([0.95], 8), ([0.8, 0.5], 4), ([0.05], 0)])
def test_without_a_network_k_is_what_acceptance_and_times_promise(acceptance, longest):
    """So that there are traces to fit a network to, of drafts that are worth their time."""
    policy = build("ltd", random_share=0.0)
    policy.on_swap(DRAFTER, 1, {"acceptance": acceptance})
    hazards = [acceptance[min(j, len(acceptance) - 1)] for j in range(MAX_DRAFT)]
    rates = [expected_tokens(k, hazards) / step_s(k, 1) for k in range(MAX_DRAFT + 1)]

    k = policy.plan(obs()).draft_k

    assert k == max(range(MAX_DRAFT + 1), key=rates.__getitem__)
    assert k == 0 if longest == 0 else 0 < k <= longest
    assert policy.plan(obs(most=2)).draft_k <= 2


def test_a_network_comes_with_a_version():
    policy = build("ltd", random_share=0.0)

    policy.on_swap(DRAFTER, 1, {"acceptance": [0.8], "ltd": network(3).to_text()})
    assert {d.draft_k for d in decode(policy, 20)} == {3}


@pytest.mark.parametrize("version", [0, 2], ids=["rolled back to", "after it"])
def test_a_version_without_a_network_has_none(version):
    """One that was fitted to other weights is not kept, and is there again with its version."""
    policy = build("ltd", random_share=0.0)
    bundle = {"ltd": network(3).to_text()}
    policy.on_swap(DRAFTER, 1, bundle)

    policy.on_swap(DRAFTER, version, {"acceptance": [0.8]})
    assert not policy.figures()["has_weights"]
    assert policy.plan(obs()).draft_k != 3

    policy.on_swap(DRAFTER, 1, bundle)
    assert {d.draft_k for d in decode(policy, 20)} == {3}


def untrained():
    """K of a policy that never had a network."""
    return build("ltd", random_share=0.0).plan(obs()).draft_k


def fitted_to(drafter, oldest="4", newest="6"):
    about = {"drafter": drafter, "oldest_version": oldest, "newest_version": newest}
    return text_of(network(3).to_bytes(about))


def test_a_server_says_how_old_the_fit_of_its_network_is():
    policy = build("ltd", random_share=0.0)
    policy.on_swap(DRAFTER, 9, {"ltd": fitted_to(DRAFTER)})

    found = policy.figures()

    assert found["has_weights"]
    assert (found["fitted_to_version"], found["versions_since"]) == (6, 3)
    policy.on_swap(DRAFTER, 10, {"ltd": network(3).to_text()})
    assert policy.figures()["versions_since"] is None, "files of before do not tell"


@pytest.mark.parametrize("kind", ["ltd", "specdecpp"])
def test_files_of_networks_are_checked_before_anything_is_loaded(kind, tmp_path):
    check_policy(PolicySettings(kind=kind))
    check_policy(PolicySettings(kind="goodput"))
    file = tmp_path / "weights"
    file.write_bytes(b"junk")
    settings = PolicySettings.model_validate({"kind": kind, kind: {"weights": file}})

    with pytest.raises(SettingsError, match=rf"policy\.{kind}\.weights: .*cannot be used"):
        check_policy(settings)


def test_a_file_that_was_fitted_to_another_drafter_is_refused(tmp_path):
    """Named by the settings, it would cut or lengthen drafts that it knows nothing of."""
    file = tmp_path / "ltd.safetensors"
    origin = {"oldest_version": "4", "newest_version": "6"}
    file.write_bytes(network(3).to_bytes({"drafter": "another", **origin}))
    with pytest.raises(SettingsError, match=f"of 'another'.* drafts with '{DRAFTER}'"):
        build("ltd", ltd=LtdSettings(weights=file))

    file.write_bytes(network(3).to_bytes({"drafter": DRAFTER, **origin}))
    assert build("ltd", ltd=LtdSettings(weights=file)).figures()["has_weights"]


def test_a_network_that_was_fitted_to_another_drafter_is_refused():
    policy = build("ltd", random_share=0.0)
    policy.on_swap(DRAFTER, 9, {"ltd": fitted_to("another")})

    assert policy.plan(obs()).draft_k == untrained() != 3
    assert "fitted to drafts of 'another'" in policy.figures()["problem"]


def damaged():
    whole = network(2).to_bytes()
    infinite = network(2)
    infinite.b2[0] = np.inf
    wide = dataclasses.replace(infinite, b2=np.zeros(3, np.float32))
    return {
        "no text": 7,
        "no base64": "?",
        "cut off": base64.b64encode(whole[:-5]).decode(),
        "infinite": infinite.to_text(),
        "shapes that differ": wide.to_text(),
        "other features": base64.b64encode(
            whole.replace(b"hazard_deep", b"hazard_dxxp")
        ).decode(),
        "no version": fitted_to(DRAFTER, newest="six"),
        "too large": base64.b64encode(bytes(1 << 18)).decode(),
    }  # fmt: skip


@pytest.mark.parametrize("what", damaged())
def test_a_damaged_network_is_none(what):
    policy = build("ltd", random_share=0.0)
    policy.on_swap(DRAFTER, 1, {"ltd": network(3).to_text()})

    policy.on_swap(DRAFTER, 2, {"ltd": damaged()[what]})

    assert policy.plan(obs()).draft_k == untrained() != 3
    assert not policy.figures()["has_weights"]
    assert policy.figures()["problem"]


def test_a_file_that_cannot_be_used_is_refused_at_the_start(tmp_path):
    for path, content in ((tmp_path / "none", None), (tmp_path / "text", b"hello there, all")):
        if content:
            path.write_bytes(content)
        with pytest.raises(SettingsError, match=r"policy\.ltd\.weights: .* cannot be used"):
            build("ltd", ltd=LtdSettings(weights=path))


def test_networks_come_back_as_they_were_written():
    rng = np.random.default_rng(0)
    one = dataclasses.replace(
        network(1), w1=rng.normal(size=(4, NUM_FEATURES)).astype(np.float32),
        w2=rng.normal(size=(MAX_DRAFT + 1, 4)).astype(np.float32),
    )  # fmt: skip
    features = rng.normal(size=NUM_FEATURES).tolist()

    back = Network.from_text(one.to_text())

    assert back.scores(features) == one.scores(features)
    x = np.array(features, np.float64)
    by_hand = one.w2 @ np.tanh(one.w1 @ x) + one.b2
    assert one.scores(features) == pytest.approx(by_hand.tolist(), abs=1e-5)
