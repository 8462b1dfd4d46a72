"""``policies evaluate`` finds the best fixed K, the oracle and known speeds on synthetic logs."""

from __future__ import annotations

import json
import random
from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
from typer.testing import CliRunner

from configs.schema import PolicySettings
from policies.cli import app
from policies.evaluation import best_ks, evaluate, off_policy_gain, off_policy_rate, rate_of
from policies.replayed_log import ReplayedLog
from policies.run_log import log_of_run, num_mixed, read_steps, time_doubts
from tests.policies.logs import (
    DRAFTER,
    MAX_DRAFT,
    always,
    any_k,
    append_unreadable,
    expected_tokens,
    log,
    profile,
    step_s,
    write_run,
)


def replayed(steps):
    return ReplayedLog.of(steps, DRAFTER, profile(), MAX_DRAFT)


def known_best(batch):
    return max(range(MAX_DRAFT + 1), key=lambda k: expected_tokens(k) / step_s(k, batch))


def test_the_best_fixed_k_of_each_load_is_found_and_nothing_beats_the_oracle():
    found = evaluate(replayed(log(1500, any_k, (1, 16, 64))), PolicySettings(), (), (0,))

    assert [load.best_k for load in found.loads] == [known_best(b) for b in (1, 16, 64)]
    names = [one.name for one in found.policies]
    assert names[0] == "oracle of each round"
    assert {f"fixed, K = {k}" for k in range(MAX_DRAFT + 1)} <= set(names)
    assert all(one.regret_oracle >= 0 for one in found.policies)
    assert all(one.regret_fixed >= 0 for one in found.policies[1:])
    assert found.policies[0].headroom == pytest.approx(1)
    assert found.policies[0].off_policy is None


def test_a_log_of_the_longest_k_extrapolates_nothing():
    found = evaluate(replayed(log(400, always(MAX_DRAFT))), PolicySettings(), (), (0,))
    assert {one.extrapolated for one in found.policies} == {0}

    short = evaluate(replayed(log(400, always(2))), PolicySettings(), (), (0,))
    by_name = {one.name: one.extrapolated for one in short.policies}
    assert by_name["fixed, K = 2"] == 0 < by_name["fixed, K = 3"] < by_name["fixed, K = 8"]


def test_speeds_of_fixed_k_are_those_that_they_have():
    found = evaluate(replayed(log(3000, any_k, (4,))), PolicySettings(), (), (0,))
    for one in found.policies:
        if one.name.startswith("fixed"):
            k = int(one.name[-1])
            assert one.rate == pytest.approx(4 * expected_tokens(k) / step_s(k, 4), rel=0.03)


def test_off_policy_estimates_agree_with_the_known_speeds():
    """Of tokens and times as they were measured: no table is involved but as a model."""
    found = evaluate(replayed(log(6000, any_k, (4,))), PolicySettings(), (), (0,))
    for one in found.policies:
        if one.name.startswith("fixed"):
            k = int(one.name[-1])
            truth = 4 * expected_tokens(k) / step_s(k, 4)
            assert one.off_policy.value == pytest.approx(truth, rel=0.05)
            assert one.off_policy.low * 0.99 < truth < one.off_policy.high * 1.01
            assert one.off_policy.effective_steps > 400


def test_without_random_decisions_only_the_policy_of_the_log_can_be_estimated():
    found = evaluate(replayed(log(300, always(3))), PolicySettings(), (), (0,))
    known = [one.name for one in found.policies if one.off_policy is not None]
    assert known == ["fixed, K = 3"]


def test_the_best_k_of_one_log_can_be_judged_on_another():
    first, second = replayed(log(900, any_k)), replayed(log(900, any_k, seed=1))
    assert rate_of(second, best_ks(second, first)) <= rate_of(second, best_ks(second))
    unknown_load = replayed(log(300, any_k, (64,)))
    ks = best_ks(unknown_load, first)
    assert len(set(ks.tolist())) == 1


def test_joined_speeds_weigh_loads_by_their_tokens():
    steps = replayed(log(200, any_k, (1, 32)))
    work = np.array([step.tokens for step in steps.steps])
    times = [work[steps.sizes == size].sum() * step_s(0, b) / b for size, b in ((0, 1), (5, 32))]
    assert rate_of(steps, np.zeros(200, np.int64)) == pytest.approx(work.sum() / sum(times))


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    write_run(folder, log(240, any_k, (1, 2)))
    return folder


def test_the_command_prints_a_table_and_writes_json_and_a_picture(run_dir):
    result = CliRunner().invoke(app, ["evaluate", str(run_dir), "--seeds", "1"])

    assert result.exit_code == 0, result.output
    assert "240 steps, 360 rounds of eagle3" in result.output
    for kind in ("goodput", "table", "ema_tiers", "ucb", "thompson", "exp3s", "ltd", "oracle"):
        assert kind in result.output
    written = json.loads((run_dir / "policies" / "evaluation.json").read_text())
    assert {one["name"] for one in written["policies"]} >= {"goodput", "fixed, K = 0"}
    assert [load["smallest_batch"] for load in written["loads"]] == [1, 2]
    picture = ElementTree.fromstring((run_dir / "policies" / "evaluation.svg").read_text())
    texts = [one.text for one in picture.iter("{http://www.w3.org/2000/svg}text")]
    assert "goodput" in texts and "K = 8" in texts


def test_the_command_can_take_times_from_the_traces(tmp_path):
    write_run(tmp_path, log(400, any_k, (1,)))
    (tmp_path / "step_times.json").unlink()

    result = CliRunner().invoke(app, ["evaluate", str(tmp_path), "--seeds", "1"])
    refused = CliRunner().invoke(app, ["evaluate", str(tmp_path), "--times", "profile"])

    assert result.exit_code == 0, result.output
    assert refused.exit_code == 1 and "holds no profile of step times" in refused.output


def test_a_drafter_that_the_profile_lacks_is_timed_by_the_traces(tmp_path):
    """A server profiles the drafters on its device, and an index is none of them."""
    steps = [
        replace(one, drafter="index" if one.draft_k else "none")
        for one in log(400, any_k, (1,), noise=0.0)
    ]
    write_run(tmp_path, steps)  # with a profile of another drafter

    refused = CliRunner().invoke(app, ["evaluate", str(tmp_path), "--times", "profile"])
    found = log_of_run(steps, None, tmp_path, "auto", MAX_DRAFT)

    assert found.table.seconds(1).tolist() == pytest.approx([step_s(k, 1) for k in range(9)])
    assert refused.exit_code == 1 and "no step times of 'index'" in refused.output
    with pytest.raises(ValueError, match=r"neither a profile nor these traces.*serve more"):
        log_of_run(steps[:20], None, tmp_path, "auto", MAX_DRAFT)


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["nowhere"], 2, "neither a run folder nor a URL"),
        (["RUN", "--drafter", "index"], 2, "no step was drafted by 'index'; the run has eagle3"),
        (["RUN", "--set", "policy.knd=ucb"], 2, "did you mean 'policy.kind'"),
        (["RUN", "--set", "policy.kind=goodputt"], 2, "did you mean 'goodput'"),
        (["RUN", "--out", "FILE"], 2, "cannot be a folder"),
        (["RUN", "--out", "FILE/deeper/still"], 2, "cannot be a folder"),
    ],
)
def test_wrong_usage_says_what_is_wrong_before_the_work(
    run_dir, arguments, code, message, monkeypatch
):
    monkeypatch.setattr("policies.cli.evaluate", lambda *_, **__: pytest.fail("it was judged"))
    file = run_dir / "step_times.json"
    words = [word.replace("RUN", str(run_dir)).replace("FILE", str(file)) for word in arguments]
    result = CliRunner().invoke(app, ["evaluate", *words])
    assert (result.exit_code, message in result.output) == (code, True), result.output


def test_a_run_that_is_not_there_is_refused_and_not_made(tmp_path):
    result = CliRunner().invoke(app, ["evaluate", "--set", f"run_dir={tmp_path / 'typo'}"])

    assert (result.exit_code, "typo" in result.output) == (2, True), result.output
    assert not (tmp_path / "typo").exists()


def test_a_damaged_profile_is_no_lack_of_traces(tmp_path):
    write_run(tmp_path, log(20, any_k, (1,)))
    (tmp_path / "step_times.json").write_text('{"samples": [{"drafter": 3}]}')

    result = CliRunner().invoke(app, ["evaluate", str(tmp_path)])

    assert (result.exit_code, "is no profile" in result.output) == (2, True), result.output


@pytest.mark.parametrize(("factor", "is_doubted"), [(1.1, False), (1.5, True), (0.6, True)])
def test_a_profile_that_the_traces_contradict_is_reported(factor, is_doubted):
    """A machine that was busy at the start, or another one."""
    samples = [
        replace(one, step_s=one.step_s * (factor if one.draft_k == 0 and one.batch == 4 else 1))
        for one in profile()
    ]
    judged = ReplayedLog.of(log(900, any_k, (1, 4), noise=0.0), DRAFTER, samples, MAX_DRAFT)

    found = time_doubts(judged)

    assert (found is not None) == is_doubted
    if found is not None:
        assert "K = 0 at batch 4" in found and "--times traces" in found
        assert "at batch 1:" not in found


def test_a_profile_with_a_step_that_never_ends_is_damaged(tmp_path):
    write_run(tmp_path, log(20, any_k, (1,)))
    file = tmp_path / "step_times.json"
    stored = json.loads(file.read_text())
    stored["samples"][0]["step_s"] = float("inf")
    file.write_text(json.dumps(stored))

    result = CliRunner().invoke(app, ["evaluate", str(tmp_path)])

    assert (result.exit_code, "is no profile" in result.output) == (2, True), result.output


def test_damaged_records_are_counted_and_no_lack_of_drafts(tmp_path):
    write_run(tmp_path, log(240, any_k, (1, 2)))
    [segment] = (tmp_path / "traces").rglob("*.seg")
    whole = segment.read_bytes()
    segment.write_bytes(whole[:-200] + bytes(100) + whole[-100:])
    some = CliRunner().invoke(app, ["evaluate", str(tmp_path), "--seeds", "1"])
    segment.write_bytes(random.Random(0).randbytes(len(whole)))
    none = CliRunner().invoke(app, ["evaluate", str(tmp_path), "--seeds", "1"])

    assert some.exit_code == 0, some.output
    assert "left out: 1 damaged records; `buffer inspect`" in some.output
    assert none.exit_code == 1 and "left out: 1 torn ends of segments" in none.output


def test_traces_behind_many_unreadable_records_are_read(tmp_path):
    """A read of nothing but such records returns no trace, and is not the end."""
    append_unreadable(tmp_path, 300)
    write_run(tmp_path, log(60, any_k, (1,)))

    steps, counts = read_steps("log:", tmp_path, 1000)

    assert (len(steps), counts.quarantined) == (60, 300)


@pytest.mark.parametrize("num_steps", [3, 100])
def test_few_steps_have_no_interval(num_steps):
    """Resampling one or two blocks would give one without width."""
    [*_, plain] = (
        one
        for one in evaluate(replayed(log(num_steps, any_k)), PolicySettings(), (), (0,)).policies
        if one.name == "fixed, K = 0"
    )
    assert plain.off_policy is None


def test_a_run_without_drafts_is_refused(tmp_path):
    write_run(tmp_path, log(20, always(0)))
    result = CliRunner().invoke(app, ["evaluate", str(tmp_path)])
    assert result.exit_code == 1
    assert "20 steps were read and none drafted anything" in result.output


def test_a_run_of_several_drafters_at_once_is_refused_and_a_few_such_steps_are_counted():
    own = log(300, any_k, (2,))
    mixed = [replace(step, is_mixed=True, drafter="eagle3+suffix") for step in own if step.draft_k]

    found = log_of_run([*own, *mixed], None, Path("nowhere"), "traces", MAX_DRAFT)

    assert found.steps == tuple(own)
    assert num_mixed([*own, *mixed]) == len(mixed)
    with pytest.raises(ValueError, match=r"several drafters at once.*drafter\.mixed=false"):
        log_of_run(mixed, None, Path("nowhere"), "traces", MAX_DRAFT)


def estimated(steps, k):
    return off_policy_rate(replayed(steps), np.full(len(steps), k, np.int64))


@pytest.mark.parametrize("ks", [(5, 1), (1, 5), (0, 4)])
def test_estimates_of_policies_that_draft_more_at_some_loads_agree_with_their_replay(ks):
    """Both weigh loads by the tokens of the log. By the policy's own, one that drafts long at the
    slow load would seem a sixth slower than it is here."""
    whole = replayed(log(4000, any_k, (1, 8), noise=0.0))
    chosen = np.where(whole.sizes == 0, *ks)

    found, wanted = off_policy_rate(whole, chosen), rate_of(whole, chosen)

    assert found.value == pytest.approx(wanted, rel=0.011)
    assert found.low < wanted < found.high


def test_all_figures_of_a_policy_that_draws_are_means_over_its_seeds():
    whole = replayed(log(400, any_k, (4,)))
    each = [evaluate(whole, PolicySettings(), ("thompson",), (seed,)) for seed in (0, 1, 2)]
    (found,) = (
        [one for one in result.policies if one.name == "thompson"]
        for result in [evaluate(whole, PolicySettings(), ("thompson",))]
    )
    alone = [one for result in each for one in result.policies if one.name == "thompson"]

    assert len({one.mean_k for one in alone}) == 3
    for name in ("rate", "mean_k", "extrapolated"):
        values = [getattr(one, name) for one in alone]
        assert getattr(found[0], name) == pytest.approx(np.mean(values)), name
    values = [one.off_policy.value for one in alone]
    assert found[0].off_policy.value == pytest.approx(np.mean(values))


def test_the_gain_of_one_policy_over_another_shares_what_the_log_has_of_chance():
    """Steps that are slow for both widen the interval of either speed, not that of the quotient."""
    steps = [
        replace(step, step_s=step.step_s * (3.0 if (at // 64) % 2 else 1.0))
        for at, step in enumerate(log(4000, any_k, (4,), noise=0.0))
    ]
    judged = replayed(steps)
    ours, theirs = (np.full(len(steps), k, np.int64) for k in (3, 1))
    truth = expected_tokens(3) / step_s(3, 4) / (expected_tokens(1) / step_s(1, 4))

    gain = off_policy_gain(judged, ours, theirs)
    alone, other = off_policy_rate(judged, ours), off_policy_rate(judged, theirs)

    assert gain is not None and alone is not None and other is not None
    assert gain.low < truth < gain.high
    assert gain.high / gain.low < (alone.high / alone.low) * (other.high / other.low)
    assert off_policy_gain(judged.rows(np.arange(4000) < 40), ours[:40], theirs[:40]) is None


@pytest.mark.parametrize("k", [1, 4, 8])
def test_prompts_beside_steps_do_not_slow_an_estimate(k):
    """A step that computes a prompt takes five times as long whatever its K, which makes any two K
    look alike. A live turn is not charged for it either."""
    steps = [
        replace(step, step_s=5 * step.step_s, is_timed=False) if at % 5 == 0 else step
        for at, step in enumerate(log(3000, any_k, (4,)))
    ]
    untold = [replace(step, is_timed=True) for step in steps]
    truth = 4 * expected_tokens(k) / step_s(k, 4)

    assert estimated(steps, k).value == pytest.approx(truth, rel=0.03)
    assert estimated(untold, k).value < 0.7 * truth


def test_catching_up_after_a_plain_step_is_not_the_price_of_a_k():
    """A ninth of the drafts of a log of random K follow a plain step; those of one K never do."""
    steps, was_plain = [], False
    for step in log(3000, any_k, (4,)):
        catches_up = was_plain and step.draft_k > 0
        steps.append(replace(step, step_s=step.step_s + 0.03 * catches_up))
        was_plain = step.draft_k == 0
    for k in (0, 3):
        truth = 4 * expected_tokens(k) / step_s(k, 4)
        assert estimated(steps, k).value == pytest.approx(truth, rel=0.03)


def test_tokens_are_known_from_all_drafts_that_were_long_enough():
    """From an even log of 900 steps of one request, each K ran in about 100: their own mean tokens
    scatter by 6 %."""
    errors = []
    for seed in range(12):
        steps = log(900, any_k, (1,), seed=seed, noise=0.0)
        truth = expected_tokens(2) / step_s(2, 1)
        errors.append(estimated(steps, 2).value / truth - 1)
    assert np.std(errors) < 0.03
    assert abs(np.mean(errors)) < 0.02
