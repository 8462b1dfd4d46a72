"""Fitting K and the size of ``ltd`` together: what it finds, and what it says where a size is of no
use."""

from __future__ import annotations

import functools
import json
from dataclasses import asdict, replace

import numpy as np
import pytest
from typer.testing import CliRunner

from configs.schema import PolicySettings
from policies.budgets import BudgetScores, cut_rows
from policies.catalog import build_policy
from policies.features import NAMES, NUM_FEATURES
from policies.ltd import CALIBRATION_KEY
from policies.network import SIZE_NAMES, Network, Size
from policies.replayed_log import ReplayedLog, play
from tests.policies import confident_logs
from tests.policies.confident_logs import confident_log
from tests.policies.logs import DRAFTER, any_k, log, write_run
from tests.trainer.test_fits import network, request_for, served
from trainer.cli import app
from trainer.fitted_policy import fitted_policy, policy_path
from trainer.fitting import fit
from trainer.ltd import FullInformation, fit_full_information, judge_network, split
from trainer.ltd_networks import features_of, played
from trainer.ppo import Ppo
from trainer.sizes import ALONE, fit_both, judge_size

QUICK = FullInformation(epochs=80, rounds=2, passes=15)
TRIED = Ppo(total_steps=1024, rollout=512, minibatch=128)


@functools.cache
def parts(telling=True, num_steps=1200):
    steps = confident_log(num_steps, batch=8, threshold=0.0, share=1.0, telling=telling)
    whole = ReplayedLog.of(steps, DRAFTER, confident_logs.profile(), confident_logs.MAX_DRAFT)
    return whole, split(whole, 0.25), BudgetScores.of(whole, 4)


@functools.cache
def fitted(how):
    return fit_both(*parts(), how)


@functools.cache
def alone():
    whole, rows, _ = parts()
    return fit_full_information(whole, rows, QUICK)


@pytest.mark.parametrize("how", [QUICK, TRIED], ids=["full information", "PPO"])
def test_a_size_finds_that_confident_positions_are_enough(how):
    whole, rows, budgets = parts()

    found = fitted(how)

    gate = judge_network(found.network, whole, rows, budgets)
    assert gate.passed and gate.gain > 0.03, gate.to_line()
    assert gate.verified < 0.8
    assert f"{100 * gate.verified:.0f} % of the draft tokens verified" in gate.to_line()
    against = judge_size(found.network, alone(), whole, rows, budgets)
    assert against.passed and against.gain > 0.03
    assert f"over {ALONE} on held-out steps" in against.to_line()


@pytest.mark.parametrize("how", [QUICK, TRIED], ids=["full information", "PPO"])
def test_the_schedule_alternates_and_keeps_the_fastest_pair(how):
    found = fitted(how)

    names = [stage.name for stage in found.stages]
    assert names == ["K alone", "size, any K", "size", "K", "size again"]
    assert found.stages[0].verified == 1.0
    whole, rows, budgets = parts()
    stretches = np.arange(len(whole.steps)) // 64
    validated = rows & (stretches % 8 == 0)
    own = played(found.network, whole, budgets).rows(validated)
    best = max(stage.rate for stage in found.stages[1:])
    assert own.tokens.sum() / own.seconds.sum() == pytest.approx(best)
    assert best > found.stages[0].rate
    assert len(found.to_lines()) == 5


def test_a_frozen_partner_does_not_change():
    whole, rows, budgets = parts()
    how = replace(QUICK, epochs=5, passes=2)
    from trainer.sizes import _ByAll, _ByTrying

    for fitter in (
        _ByAll(whole, rows, budgets, how),
        _ByTrying(whole.rows(rows), budgets.rows(rows), replace(TRIED, total_steps=512)),
    ):
        network = fitter.first()
        size = fitter.size(network, any_k=True)
        before = network.to_bytes()
        assert network.to_bytes() == before, "a size leaves K alone"
        again = fitter.depth(replace(network, size=size))
        assert all(np.array_equal(*pair) for pair in zip(
            again.size.arrays().values(), size.arrays().values(), strict=True
        ))  # fmt: skip
        assert not np.array_equal(again.w1, network.w1)


def test_where_confidence_tells_nothing_a_size_does_not_pass():
    whole, rows, budgets = parts(telling=False)
    found = fit_both(whole, rows, budgets, QUICK)

    gate = judge_size(found.network, fit_full_information(whole, rows, QUICK), whole, rows, budgets)

    assert not gate.passed, gate.to_line()
    assert gate.gain > -0.05


def test_the_server_plays_what_was_fitted():
    """Shares and K, by the same features, K and saved times."""
    whole, _, budgets = parts()
    network = fitted(TRIED).network
    policy = build_policy(
        PolicySettings(kind="ltd", guard=False, random_share=0.0), whole.traits, 0, whole.max_draft
    )
    policy.on_swap(DRAFTER, 0, {CALIBRATION_KEY: network.to_text()})

    served, judged = play(policy, whole), played(network, whole, budgets)

    assert np.mean(served.ks == judged.ks) > 0.99
    cut = np.array([at in served.cuts for at in range(len(whole.steps))])
    assert np.mean(cut == judged.is_cut) > 0.99
    ours = served.columns(whole)
    assert ours[0].sum() == pytest.approx(judged.tokens.sum(), rel=0.005)
    assert ours[2].sum() == pytest.approx(judged.seconds.sum(), rel=0.005)


def test_features_of_a_cut_policy_see_what_was_verified():
    whole, _, budgets = parts()
    at = NAMES.index("tokens_slow")

    def slow(share):
        def cut(step, _, k):
            return cut_rows(whole, step, k, share, 4)

        return float(features_of(whole, lambda *_: 5, cut=cut)[-1, at]) * whole.max_draft

    for share in (0, 3):
        kept = budgets.tokens[:, 5, share].mean() / 8
        assert slow(share) == pytest.approx(kept, rel=0.05)


def write(folder, telling):
    write_run(folder, confident_log(900, batch=8, threshold=0.0, share=1.0, telling=telling))
    samples = [asdict(sample) for sample in confident_logs.profile()]
    (folder / "step_times.json").write_text(json.dumps({"facts": {}, "samples": samples}))


def command(folder, *more):
    sets = ("--set", f"run_dir={folder}", "--set", "drafter.max_draft=5")
    return CliRunner().invoke(app, ["policy", "--budgets", "4", "--effort", "0.25", *sets, *more])


def test_the_command_writes_both_networks_and_a_version_carries_them(tmp_path):
    write(tmp_path, telling=True)

    result = command(tmp_path)

    assert result.exit_code == 0, result.output
    assert "size again: " in result.output and "size: gate passed" in result.output
    network = Network.from_bytes(policy_path(tmp_path).read_bytes())
    assert network.size.num_shares == 4
    carried = Network.from_text(fitted_policy(tmp_path)[CALIBRATION_KEY])
    assert carried.size.scores([0.5] * (NUM_FEATURES + 2)) == network.size.scores(
        [0.5] * (NUM_FEATURES + 2)
    )


def test_the_command_leaves_a_size_out_that_does_not_pay(tmp_path):
    write(tmp_path, telling=False)

    result = command(tmp_path, "--out", str(tmp_path / "out"))

    assert "the size is left out: K alone is as good" in result.output
    if (tmp_path / "out").exists():
        assert Network.from_bytes((tmp_path / "out").read_bytes()).size is None


def test_traces_without_figures_cannot_tell_of_a_size(tmp_path):
    write_run(tmp_path, log(640, any_k, (1,)))

    result = CliRunner().invoke(app, ["policy", "--set", f"run_dir={tmp_path}", "--budgets", "4"])

    assert result.exit_code == 1
    assert "no step noted the drafter's figures" in result.output


def test_one_budget_is_refused(tmp_path):
    result = CliRunner().invoke(app, ["policy", "--set", f"run_dir={tmp_path}", "--budgets", "1"])

    assert result.exit_code == 2
    assert "--budgets 1 leaves nothing to choose" in result.output


@pytest.mark.parametrize("is_noted", [True, False], ids=["figures noted", "none noted"])
def test_a_fit_keeps_the_size_that_is_in_force(tmp_path, is_noted):
    """One of K alone would drop it, and be judged as if everything had been verified before."""
    samples = [asdict(one) for one in confident_logs.profile()]
    (tmp_path / "step_times.json").write_text(json.dumps({"facts": {}, "samples": samples}))
    steps = confident_log(1300, batch=8, threshold=0.0, share=1.0)
    if not is_noted:
        bare = [tuple(replace(row, considered=None) for row in one.rows) for one in steps]
        steps = [replace(one, rows=rows) for one, rows in zip(steps, bare, strict=True)]
    most = confident_logs.MAX_DRAFT
    in_force = with_half_of_it(Network.from_bytes(network(1, max_draft=most)))

    request = request_for(tmp_path, in_force.to_bytes(), max_draft=most)
    found = fit(request, served(steps))

    own, former = Network.from_bytes(found.network).size, in_force.size
    assert own is not None and former is not None
    for name, values in former.arrays().items():
        assert np.array_equal(values, own.arrays()[name])
    assert found.passed is is_noted, found.lines
    assert ("50 % of the draft tokens verified" in found.lines[0]) is is_noted, found.lines


def with_half_of_it(one):
    """The same K; half of the draft tokens are verified."""
    num = len(SIZE_NAMES)
    size = Size(
        np.zeros(num, np.float32), np.ones(num, np.float32), np.zeros((4, num), np.float32),
        np.zeros(4, np.float32), np.zeros((4, 4), np.float32), np.eye(4, dtype=np.float32)[1],
    )  # fmt: skip
    return replace(one, size=size)
