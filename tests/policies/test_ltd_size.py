"""The policy ``ltd`` with a size: which budget it asks for, what it says of it, and what it does
with networks that are damaged or fitted to something else."""

from __future__ import annotations

import base64
import dataclasses
from collections import Counter

import numpy as np
import pytest

from configs.choices import SettingsError
from configs.schema import PolicySettings
from policies.allocation import Allocation
from policies.budgets import CUT, budget_of
from policies.catalog import build_policy, cuts_of, uncut
from policies.evaluation import evaluate
from policies.features import NUM_FEATURES
from policies.guard import Guard
from policies.interface import Outcome, RowOutcomes, StepObs
from policies.network import SIZE_NAMES, Network, Size
from policies.replayed_log import ReplayedLog, play
from policies.weight_file import text_of
from tests.policies import confident_logs
from tests.policies.confident_logs import confident_log
from tests.policies.logs import DRAFTER, MAX_DRAFT, profile
from tests.policies.simulated import NEURAL

NUM = 4


def layers(kind, num_inputs, outputs, best, **more):
    """Constant scores, the nearer to the best choice, the higher."""
    scores = -abs(np.arange(outputs, dtype=np.float32) - best)
    return kind(
        np.zeros(num_inputs, np.float32),
        np.ones(num_inputs, np.float32),
        np.zeros((3, num_inputs), np.float32),
        np.zeros(3, np.float32),
        np.zeros((outputs, 3), np.float32),
        scores,
        **more,
    )


def pair(k=4, share=1, max_draft=MAX_DRAFT):
    """Always K, and this share of it."""
    size = layers(Size, len(SIZE_NAMES), NUM, share)
    return layers(Network, NUM_FEATURES, max_draft + 1, k, size=size)


def build(network=None, tmp_path=None, **settings):
    ltd = settings.pop("ltd", {})
    if network is not None:
        path = tmp_path / "ltd.safetensors"
        path.write_bytes(network.to_bytes())
        ltd = {"weights": path, **ltd}
    policy = build_policy(
        PolicySettings(kind="ltd", guard=False, drafter=DRAFTER, ltd=ltd, **settings),
        {DRAFTER: NEURAL}, 0, MAX_DRAFT,
    )  # fmt: skip
    policy.calibrate(profile())
    return policy


def obs(batch=4, most=MAX_DRAFT):
    return StepObs(0, batch, bytes((most,)) * batch, None, (DRAFTER,), most, 0)


def observe(policy, decision, batch=4, step_s=0.01):
    k = decision.draft_k
    rows = RowOutcomes([k] * batch, [min(k, 1)] * batch)
    policy.observe(Outcome(decision, batch, rows, step_s, 0.0, False, 0))


def test_both_networks_decide(tmp_path):
    policy = build(pair(k=5, share=1), tmp_path, random_share=0.0)
    for batch in (4, 1, 3, 4):
        decision = policy.plan(obs(batch))
        allocation = decision.allocation
        assert (decision.draft_k, decision.propensity) == (5, 1.0)
        assert allocation.cut == CUT and allocation.threshold == 0
        assert allocation.budget(batch, 5) == budget_of(1, NUM, batch, 5) == -(-batch * 5 // 2)
        assert decision.columns() == {"budget_each": allocation.budget_each}
        observe(policy, decision, batch)
    assert policy.figures()["has_size"] and policy.figures()["cut"] == 4


def above(name, threshold):
    """Verifies a quarter where an input is above this, and everything elsewhere."""
    size = layers(Size, len(SIZE_NAMES), NUM, NUM - 1)
    w1, w2 = size.w1.copy(), size.w2.copy()
    w1[0, SIZE_NAMES.index(name)] = 20.0
    w2[0, 0] = 10.0
    b1 = np.array([-20 * threshold, 0, 0], np.float32)
    return dataclasses.replace(size, w1=w1, w2=w2, b1=b1)


def test_a_size_is_told_k(tmp_path):
    size = above("draft_k", 3.5 / MAX_DRAFT)
    policy = build(dataclasses.replace(pair(k=6), size=size), tmp_path, random_share=0.0)

    assert policy.plan(obs(4)).allocation.budget_each == pytest.approx(6 / 4)
    assert policy.plan(obs(4, most=3)).draft_k == 3
    assert not policy.plan(obs(4, most=3)).allocation.may_cut
    assert policy.plan(obs(4)).draft_k == 6, "and of longer ones again"


def test_a_size_is_told_what_half_a_budget_saves(tmp_path):
    """By the profile, 0.09 of a plain step at batch 1, and 0.34 at batch 32."""
    size = above("saved_half", 0.2)
    policy = build(dataclasses.replace(pair(k=4), size=size), tmp_path, random_share=0.0)
    policy.calibrate(
        [dataclasses.replace(sample, draft_s=1e-4 * sample.draft_k) for sample in profile()]
    )

    assert [policy.plan(obs(batch)).allocation.may_cut for batch in (1, 32)] == [False, True]


def test_any_budget_is_tried_with_a_known_probability(tmp_path):
    policy = build(pair(k=4, share=1), tmp_path, random_share=0.4)
    found = Counter()
    chances = {}
    for _ in range(6000):
        decision = policy.plan(obs(2))
        if decision.draft_k:
            arm = decision.draft_k, decision.allocation.budget(2, decision.draft_k)
            found[arm] += 1
            chances[arm] = decision.propensity
            assert decision.explore is (arm != (4, 4))
    # With K = 1 there are two budgets: one draft token, or both.
    assert {budget for k, budget in found if k == 1} == {1, 2}
    for arm, chance in chances.items():
        error = (chance * (1 - chance) / 6000) ** 0.5
        assert abs(found[arm] / 6000 - chance) < 5 * error + 1e-3, arm
    assert chances[4, 4] == pytest.approx((0.6 + 0.4 / 9) * (0.6 + 0.4 / 4))
    assert chances[1, 1] == pytest.approx(0.4 / 9 * (0.6 + 0.4 / 2))
    assert sum(chances.values()) == pytest.approx(1 - 0.4 / 9), "the rest decode plainly"


@pytest.mark.parametrize(
    ("use", "has_size", "allocation"),
    [
        ("play", False, None),
        ("note", False, Allocation(CUT, 0.0)),
        ("off", True, None),
        ("note", True, Allocation(CUT, 0.0, 2.0)),
    ],
)
def test_without_a_size_everything_is_verified(tmp_path, use, has_size, allocation):
    network = pair() if has_size else dataclasses.replace(pair(), size=None)
    policy = build(network, tmp_path, random_share=0.0, ltd={"size": use})

    decision = policy.plan(obs())

    assert (decision.draft_k, decision.allocation, decision.propensity) == (4, allocation, 1.0)


def test_programs_that_cut_are_made_where_a_size_can_come(tmp_path):
    def cuts(network, use="play"):
        ltd = {"size": use}
        if network is not None:
            path = tmp_path / "file"
            path.write_bytes(network.to_bytes())
            ltd["weights"] = path
        return cuts_of(PolicySettings(kind="ltd", ltd=ltd))

    alone = dataclasses.replace(pair(), size=None)
    assert cuts(None) == cuts(pair()) == cuts(alone, "note") == (CUT,)
    assert cuts(alone) == cuts(None, "off") == cuts(pair(), "off") == ()
    assert uncut(PolicySettings(kind="ltd")).ltd.size == "off"
    assert uncut(PolicySettings(kind="ragged")) is None
    assert uncut(PolicySettings(kind="fixed")) == PolicySettings(kind="fixed")


def test_files_come_back_as_they_were_written():
    rng = np.random.default_rng(0)
    wide = rng.normal(size=(3, len(SIZE_NAMES))).astype(np.float32)
    size = dataclasses.replace(pair().size, w1=wide)
    one = dataclasses.replace(pair(), size=size)

    again = Network.from_text(one.to_text())

    inputs = rng.normal(size=len(SIZE_NAMES)).tolist()
    assert again.size.scores(inputs) == size.scores(inputs)
    assert again.scores(inputs[:NUM_FEATURES]) == one.scores(inputs[:NUM_FEATURES])
    assert Network.from_text(dataclasses.replace(one, size=None).to_text()).size is None


def damaged():
    whole = pair()
    infinite = whole.size.b2.copy()
    infinite[0] = np.inf
    wide = dataclasses.replace(whole.size, b2=np.zeros(5, np.float32))
    single = layers(Size, len(SIZE_NAMES), 1, 0)

    def other(size):
        return dataclasses.replace(whole, size=size).to_bytes()

    return {
        "infinite": other(dataclasses.replace(whole.size, b2=infinite)),
        "shapes that differ": other(wide),
        "one share": other(single),
        "other features": whole.to_bytes().replace(b"saved_half", b"saved_hxxf"),
        "a part": whole.to_bytes().replace(b"size.w1", b"size.wx"),
        "no names": whole.to_bytes().replace(b"size_features", b"size_fxxtures"),
    }


@pytest.mark.parametrize("what", damaged())
def test_a_damaged_size_is_no_network_at_all(what, tmp_path):
    """Half a policy would be another one: nothing is decided by what is left of it."""
    policy = build(random_share=0.0)
    policy.on_swap(DRAFTER, 1, {"ltd": pair().to_text()})
    assert policy.plan(obs()).allocation is not None

    policy.on_swap(DRAFTER, 2, {"ltd": text_of(damaged()[what])})

    decision, without = policy.plan(obs()), build(random_share=0.0).plan(obs())
    assert (decision.draft_k, decision.allocation) == (without.draft_k, None)
    assert "its size cannot be used" in policy.refused(DRAFTER)
    path = tmp_path / "file"
    path.write_bytes(damaged()[what])
    with pytest.raises(SettingsError, match=r"policy\.ltd\.weights: .*its size cannot be used"):
        build(ltd={"weights": path})


def test_both_networks_change_in_one_swap():
    policy = build(random_share=0.0)
    without = policy.plan(obs()).draft_k
    bundles = {
        1: {"ltd": pair(k=4, share=1).to_text()},
        2: {"ltd": dataclasses.replace(pair(k=6), size=None).to_text()},
        3: {"ltd": pair(k=2, share=0).to_text()},
        4: {},
    }
    for version in (1, 2, 3, 4, 1):
        policy.on_swap(DRAFTER, version, bundles[version])
        decision = policy.plan(obs())
        each = None if decision.allocation is None else decision.allocation.budget_each
        assert (decision.draft_k, each) == {
            1: (4, 2.0), 2: (6, None), 3: (2, 0.5), 4: (without, None)
        }[version]  # fmt: skip
        observe(policy, decision)


def test_a_size_of_a_drafter_on_the_host_is_not_asked():
    text = dataclasses.replace(NEURAL, on_device=False)
    policy = build_policy(
        PolicySettings(kind="ltd", guard=False, drafter="text", random_share=0.0),
        {"text": text}, 0, MAX_DRAFT,
    )  # fmt: skip
    policy.on_swap("text", 1, {"ltd": pair().to_text()})
    decision = policy.plan(dataclasses.replace(obs(), drafters=("text",)))
    assert (decision.draft_k, decision.allocation) == (4, None)


def test_the_time_of_a_packed_step_is_not_that_of_its_k(tmp_path):
    policy = build(pair(share=0), tmp_path, random_share=0.0)
    before = policy.costs.cost
    for _ in range(50):
        observe(policy, policy.plan(obs()), step_s=0.001)
    assert policy.costs.cost == before
    whole = build(pair(share=NUM - 1), tmp_path, random_share=0.0)
    observe(whole, whole.plan(obs()), step_s=0.001)
    assert whole.costs.cost != before


def test_the_guard_passes_a_budget_on(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(pair().to_bytes())
    settings = PolicySettings(kind="ltd", drafter=DRAFTER, ltd={"weights": path}, random_share=0.0)
    policy = build_policy(settings, {DRAFTER: NEURAL}, 0, MAX_DRAFT)
    policy.calibrate(profile())
    assert isinstance(policy, Guard)

    decision = policy.plan(obs())

    assert decision.allocation.budget_each == 2.0
    assert decision.columns() == {"budget_each": 2.0}


def test_an_evaluation_tells_k_alone_and_both_apart(tmp_path):
    steps = confident_log(200, batch=8, threshold=0.0, share=1.0)
    own = ReplayedLog.of(steps, DRAFTER, confident_logs.profile(), confident_logs.MAX_DRAFT)
    path = tmp_path / "file"
    path.write_bytes(pair(k=5, share=1, max_draft=confident_logs.MAX_DRAFT).to_bytes())
    settings = PolicySettings(guard=False, ltd={"weights": path}, random_share=0.0)

    found = {one.name: one for one in evaluate(own, settings, ("ltd", "confidence"), (0,)).policies}

    assert found["ltd"].rate > 1.1 * found["ltd, K alone"].rate
    assert found["ltd"].verified == pytest.approx(0.5)
    assert found["ltd, K alone"].verified == 1.0
    assert found["ltd, K alone"].rate == pytest.approx(found["fixed, K = 5"].rate)
    assert "confidence, K alone" not in found
    bare = []
    for step in steps:
        rows = tuple(dataclasses.replace(row, considered=None) for row in step.rows)
        bare.append(dataclasses.replace(step, rows=rows))
    own = ReplayedLog.of(bare, DRAFTER, confident_logs.profile(), confident_logs.MAX_DRAFT)
    names = {one.name for one in evaluate(own, settings, ("ltd", "confidence"), (0,)).policies}
    assert "ltd" in names and "ltd, K alone" not in names and "confidence" not in names


def test_a_replay_charges_what_packed_rows_take():
    steps = confident_log(50, batch=8, threshold=0.0, share=1.0)
    own = ReplayedLog.of(steps, DRAFTER, confident_logs.profile(), confident_logs.MAX_DRAFT)
    policy = build_policy(
        PolicySettings(kind="ltd", guard=False, random_share=0.0), own.traits, 0, own.max_draft
    )
    policy.on_swap(DRAFTER, 0, {"ltd": pair(4, 1, own.max_draft).to_text()})

    found = play(policy, own)

    assert set(found.ks.tolist()) == {4} and len(found.cuts) == 50
    seconds = own.seconds[0, 4] - own.table.saved(8, 4, 2.0)
    assert all(cut[2] == pytest.approx(seconds) for cut in found.cuts.values())


def test_a_file_of_text_is_no_size():
    blob = base64.b64encode(b"no network").decode()
    policy = build(random_share=0.0)
    policy.on_swap(DRAFTER, 1, {"ltd": blob})
    assert policy.plan(obs()).allocation is None and policy.refused(DRAFTER)
