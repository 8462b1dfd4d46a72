"""Policies whose drafts the device cuts: what they ask for, learn, and are judged by."""

from __future__ import annotations

import dataclasses
import random

import numpy as np
import pytest

from configs.choices import SettingsError
from configs.policies import SpecDecPpSettings
from configs.schema import PolicySettings
from policies.allocation import Allocation, Cut
from policies.catalog import CATALOG, build_policy, cuts_of
from policies.confidence_head import MAX_BYTES, Head
from policies.evaluation import evaluate
from policies.interface import Decision, Outcome, RowOutcomes, StepObs
from policies.logged import hazards_of, steps_of
from policies.replayed_log import ReplayedLog, play
from tests.policies import confident_logs
from tests.policies.confident_logs import EASY, HARD, confident_log
from tests.policies.logs import DRAFTER, drawn, profile, traces_of
from tests.policies.simulated import NEURAL
from tests.specops.test_allocation import random_head

CUTTING = ("confidence", "adaedl", "specdecpp")


def build(kind, **settings):
    policy = build_policy(
        PolicySettings(kind=kind, guard=False, drafter=DRAFTER, **settings), {DRAFTER: NEURAL}, 0, 8
    )
    policy.calibrate(profile())
    if kind == "specdecpp":
        policy.on_swap(DRAFTER, 1, {"specdecpp": random_head().to_text()})
    return policy


def obs(batch=4, most=8):
    return StepObs(0, batch, bytes((most,)) * batch, None, (DRAFTER,), most, 0)


def outcome_of(decision, verified, accepted, step_s=0.01):
    rows = RowOutcomes(verified, accepted)
    return Outcome(decision, len(verified), rows, step_s, 0.0, False, 1)


@pytest.mark.parametrize("kind", CUTTING)
def test_every_draft_is_cut_but_in_a_share_of_the_steps(kind):
    policy = build(kind, random_share=0.25, draft_k=5)

    plans = [policy.plan(obs()) for _ in range(2000)]

    assert {plan.draft_k for plan in plans} == {5}
    assert {plan.policy for plan in plans} == {kind}
    is_open = [not plan.allocation.may_cut for plan in plans]
    assert abs(np.mean(is_open) - 0.25) < 0.05
    for plan, whole in zip(plans, is_open, strict=True):
        assert plan.propensity == pytest.approx(0.25 if whole else 0.75)
    assert {plan.allocation.cut for plan in plans} == set(cuts_of(PolicySettings(kind=kind)))


@pytest.mark.parametrize("score", ["drawn", "margins", ""])
def test_a_rule_that_does_not_keep_the_targets_law_is_refused_by_name(score):
    """As one that looks at the drawn token: the lossless suite sees that it changes the output."""
    with pytest.raises(
        ValueError, match=f"cannot be cut by '{score}'; the scores are top, entropy"
    ):
        Cut(score, cumulative=False)


def test_only_policies_that_cut_need_programs_for_it():
    asking = {kind for kind in CATALOG if cuts_of(PolicySettings(kind=kind))}
    assert asking == {*CUTTING, "ragged", "ltd"}
    assert not cuts_of(PolicySettings())


def test_room_for_packed_rows_follows_the_lengths_that_cuts_leave():
    policy = build("confidence", random_share=0.0, cutting={"headroom": 1.5, "slack": 0.5})
    first = policy.plan(obs())
    assert first.allocation.budget_each is None, "nothing is known yet"
    policy.observe(outcome_of(first, [2, 1, 3, 2], [1, 1, 3, 0]))

    second = policy.plan(obs())

    assert second.allocation.budget_each == pytest.approx(2 * 1.5 + 0.5)
    whole = build("confidence", random_share=0.0, cutting={"packed": False})
    whole.observe(outcome_of(whole.plan(obs()), [2, 1, 3, 2], [1, 1, 3, 0]))
    assert whole.plan(obs()).allocation.budget_each is None


def test_adaedl_moves_its_threshold_as_the_paper_says():
    policy = build("adaedl", random_share=0.0, draft_k=4)

    def threshold_after(verified, accepted):
        policy.observe(outcome_of(policy.plan(obs(2)), verified, accepted))
        return policy.plan(obs(2)).allocation.threshold

    rate, threshold = 0.9, 0.4
    for verified, accepted in (([4, 2], [1, 0]), ([1, 1], [1, 1]), ([2, 2], [2, 2])) * 4:
        rate = 0.5 * rate + 0.5 * sum(accepted) / sum(verified)
        moved = threshold + (0.01 if rate < 0.9 else -0.01)
        threshold = 0.9 * threshold + 0.1 * moved
        assert threshold_after(verified, accepted) == pytest.approx(threshold)
    while rate < 0.9:
        rate = 0.5 * rate + 0.5
        threshold_after([4, 4], [4, 4])
    before = policy.plan(obs(2)).allocation.threshold
    assert threshold_after([4, 4], [4, 4]) == before, "a draft that was kept whole moves nothing"


def test_a_head_comes_from_a_file_or_with_a_version(tmp_path):
    head = random_head(3)
    path = tmp_path / "specdecpp.safetensors"
    path.write_bytes(head.to_bytes())
    policy = build("specdecpp", specdecpp={"weights": path, "most_risk": 0.2}, random_share=0.0)

    allocation = policy.plan(obs()).allocation

    assert allocation.threshold == pytest.approx(0.8) and allocation.cut.cumulative
    assert np.array_equal(allocation.head.w1, head.w1), "a version replaces no file"
    bare = build_policy(
        PolicySettings(kind="specdecpp", guard=False, drafter=DRAFTER), {DRAFTER: NEURAL}, 0, 8
    )
    whole = [bare.plan(obs()) for _ in range(200)]
    assert {(one.draft_k, one.propensity, one.explore) for one in whole} == {(4, 1.0, False)}
    assert not any(one.allocation.may_cut for one in whole), "without a head nothing is cut"
    bare.on_swap(DRAFTER, 1, {"specdecpp": head.to_text()})
    assert bare.plan(obs()).allocation.head is not None and bare.plan(obs()).draft_k == 4
    assert any(bare.plan(obs()).allocation.may_cut for _ in range(5))


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda head: dataclasses.replace(head, w1=head.w1[:8]), "w1 must be F32"),
        (lambda head: dataclasses.replace(head, b1=head.b1 * np.nan), "b1 is not finite"),
    ],
)
def test_a_damaged_head_is_none(damage, said):
    policy = build("specdecpp", random_share=0.0)
    assert policy.plan(obs()).allocation.may_cut

    policy.on_swap(DRAFTER, 2, {"specdecpp": damage(random_head()).to_text()})

    assert not policy.plan(obs()).allocation.may_cut
    assert said in policy.figures()["problem"]


@pytest.mark.parametrize("blob", [b"", b"\0" * 100, b"x" * (MAX_BYTES + 1)])
def test_bytes_that_are_no_head_are_refused_with_the_setting(tmp_path, blob):
    path = tmp_path / "head"
    path.write_bytes(blob)
    with pytest.raises(ValueError):
        Head.from_bytes(blob)
    with pytest.raises(SettingsError, match=r"policy\.specdecpp\.weights: .* cannot be used"):
        build("specdecpp", specdecpp=SpecDecPpSettings(weights=path))


# ---- ragged --------------------------------------------------------------------------------------


def decode_ragged(policy, num_steps, gain, batch=8):
    """Steps of ``ragged`` with a drafter whose tokens are kept with 0.6, or ``gain`` times that in
    a ragged step; what is drafted and not verified takes a little longer."""
    rng, decisions = random.Random(0), []
    for number in range(num_steps):
        decision = policy.rest() or policy.plan(dataclasses.replace(obs(batch), step=number))
        k = decision.draft_k
        is_ragged = decision.allocation is not None
        each = k if not is_ragged else round(decision.allocation.budget_each)
        rate = 0.6 * (gain if is_ragged else 1.0)
        accepted = [drawn(rng, each, [rate] * each).num_accepted for _ in range(batch)]
        seconds = 0.01 * (1 + 0.15 * each + 0.02 * (k - each))
        policy.observe(outcome_of(decision, [each] * batch, accepted, seconds))
        decisions.append(decision)
    return decisions


@pytest.mark.parametrize(("gain", "wins"), [(1.25, True), (0.8, False)])
def test_ragged_goes_on_with_what_brings_more(gain, wins):
    decisions = decode_ragged(build("ragged"), 800, gain)[-300:]

    chosen = [one for one in decisions if one.reason in ("ragged", "planned")]
    share = np.mean([one.reason == "ragged" for one in chosen])

    assert len(chosen) > 200
    assert (share > 0.75) if wins else (share < 0.25), share
    for one in chosen:
        assert 0 < one.propensity < 1 and one.policy == "ragged"
        if one.allocation is not None:
            assert one.allocation.budget(8, one.draft_k) == 8 * (one.draft_k - 2)


def test_ragged_leaves_a_single_request_and_probes_alone():
    decisions = decode_ragged(build("ragged"), 300, 1.0, batch=1)
    assert all(one.allocation is None for one in decisions)
    batch = decode_ragged(build("ragged"), 300, 1.0)
    assert all(one.allocation is None for one in batch if one.explore)


# ---- judged on logs ------------------------------------------------------------------------------


def replayed(steps):
    return ReplayedLog.of(steps, DRAFTER, confident_logs.profile(), confident_logs.MAX_DRAFT)


def test_what_was_considered_comes_back_from_traces():
    steps = confident_log(20)
    found = steps_of(traces_of(steps))
    assert [step.may_cut for step in found] == [step.may_cut for step in steps]
    for ours, theirs in zip(found, steps, strict=True):
        assert ours.draft_k == theirs.draft_k == confident_logs.MAX_DRAFT
        for mine, other in zip(ours.rows, theirs.rows, strict=True):
            assert (mine.num_verified, mine.num_accepted) == (
                other.num_verified,
                other.num_accepted,
            )
            assert mine.temperature == 0.7
            assert mine.considered.confidence == pytest.approx(other.considered.confidence)


def test_hazards_are_of_steps_whose_drafts_were_not_cut():
    """A draft that was not cut is an easy one."""
    truth = (EASY + HARD) / 2
    hazards, _ = hazards_of(confident_log(1500), 3)
    assert hazards == pytest.approx([truth] * 3, abs=0.03)
    cut_only, _ = hazards_of(confident_log(300, share=0.0), 3)
    assert cut_only.min() > truth + 0.1, "or the test shows nothing"


def test_a_replayed_cut_brings_what_the_same_cut_brought():
    """The log's own threshold, replayed on the steps that were not cut, against those that were."""
    steps = confident_log(2000, share=0.5)
    log = replayed(steps)
    is_open = np.array([not step.may_cut for step in steps])
    cut = np.array([step.tokens for step in steps])[~is_open].mean()

    policy = build_policy(
        PolicySettings(
            kind="confidence", guard=False, draft_k=confident_logs.MAX_DRAFT, random_share=0.0,
            confidence={"threshold": 0.6}, drafter=DRAFTER, cutting={"packed": False},
        ),
        log.traits, 0, log.max_draft,
    )  # fmt: skip
    tokens, extrapolated, seconds = play(policy, log.rows(is_open)).columns(log.rows(is_open))

    assert tokens.mean() == pytest.approx(cut, rel=0.02)
    assert extrapolated.sum() == 0
    assert seconds == pytest.approx(confident_logs.step_s(confident_logs.MAX_DRAFT, 8)), (
        "no rows saved"
    )


def test_where_confidence_tells_and_rows_cost_a_cut_beats_every_fixed_k():
    settings = PolicySettings(
        draft_k=confident_logs.MAX_DRAFT,
        confidence={"threshold": 0.6},
        cutting={"headroom": 1.0, "slack": 0.2},
    )
    found = evaluate(replayed(confident_log(600)), settings, ("confidence", "adaedl"), (0,))

    by_name = {one.name: one for one in found.policies}

    best = max(one.rate for name, one in by_name.items() if name.startswith("fixed"))
    assert by_name["confidence"].rate > 1.03 * best
    assert by_name["confidence"].off_policy is None
    assert {"adaedl", "oracle of each round"} <= set(by_name)


def test_every_kind_of_the_catalog_is_judged_on_such_a_log():
    found = evaluate(replayed(confident_log(60)), PolicySettings(drafter=DRAFTER), seeds=(0,))
    assert {*CATALOG} - {"fixed"} <= {one.name for one in found.policies}


def test_cuts_that_verify_all_rows_or_have_no_figures_take_the_time_of_their_k():
    log = replayed(confident_log(40))
    table = log.table
    assert table.saved(8, 4, 4.0) == 0 < table.saved(8, 4, 2.0) < table.saved(8, 4, 0.0)
    assert table.saved(8, 4, 1.0) == pytest.approx(0.01 * 0.05 * 8 * 3)
    untold = [dataclasses.replace(sample, draft_s=0.0) for sample in confident_logs.profile()]
    assert ReplayedLog.of(log.steps, DRAFTER, untold, 4).table.saved(8, 4, 1.0) == 0


def test_a_decision_held_to_what_requests_allow_keeps_its_cut():
    cut = Allocation(Cut("top", False), 0.5, budget_each=2.0)
    decision = Decision(DRAFTER, 8, 1.0, False, "", allocation=cut)
    assert dataclasses.replace(decision, draft_k=3).allocation.budget(4, 3) == 8
    assert cut.budget(4, 1) == 4, "never more than was drafted"
