"""Fitting the policy ``ltd`` finds what a fixed K cannot, and says so where there is nothing."""

from __future__ import annotations

import base64
from dataclasses import replace

import numpy as np
import pytest
from typer.testing import CliRunner

from configs.schema import PolicySettings
from policies.catalog import build_policy
from policies.features import NAMES, NUM_FEATURES, Features
from policies.groups import group_of
from policies.ltd import CALIBRATION_KEY
from policies.network import Network
from policies.off_policy import Estimate
from policies.published import Origin
from policies.replayed_log import ReplayedLog, play
from tests.policies.logs import DRAFTER, MAX_DRAFT, any_k, log, profile, write_run
from tests.policies.simulated import DRAFTERS
from trainer.cli import app
from trainer.fitted_policy import fitted_policy, policy_path
from trainer.ltd import (
    FullInformation,
    PolicyGate,
    fit_full_information,
    judge_network,
    split,
)
from trainer.ppo import Ppo, fit_ppo

EASY, HARD = (0.92,) * MAX_DRAFT, (0.25,) * MAX_DRAFT


def moods(at):
    """Text that is easy for 100 steps and hard for the next 100."""
    return EASY if (at // 100) % 2 else HARD


def parts(num_steps=3200, hazards=moods, batches=(1,)):
    steps = log(num_steps, any_k, batches, hazards)
    whole = ReplayedLog.of(steps, DRAFTER, profile(), MAX_DRAFT)
    return whole, split(whole, 0.25)


def test_full_information_follows_moods_that_a_fixed_k_cannot():
    whole, rows = parts(4800)
    network = fit_full_information(whole, rows, FullInformation(epochs=120, rounds=2, passes=40))

    gate = judge_network(network, whole, rows)

    assert gate.passed and gate.gain > 0.02, gate.to_line()
    assert gate.distinct_ks >= 2
    # Replayed by the hazards of easy and hard text together, which is too little for easy text.
    assert gate.off_policy is not None and gate.off_policy.high > 1 + gate.gain


@pytest.mark.parametrize("is_told", [True, False])
def test_it_drafts_for_the_temperature_of_the_requests_where_it_is_told(is_told):
    """Requests of both kinds come in no order, so that nothing else tells them apart."""
    is_greedy = np.random.default_rng(0).random(2400) < 0.5
    steps = [
        replace(step, rows=tuple(replace(row, group=group) for row in step.rows))
        for step, group in zip(
            log(2400, any_k, (1,), lambda at: EASY if is_greedy[at] else HARD),
            np.where(is_greedy & is_told, group_of(0, 0.0), group_of(0, 1.0)).tolist(),
            strict=True,
        )
    ]
    whole = ReplayedLog.of(steps, DRAFTER, profile(), MAX_DRAFT)
    rows = split(whole, 0.25)
    network = fit_full_information(whole, rows, FullInformation(rounds=1, passes=20))

    gate = judge_network(network, whole, rows)

    assert (gate.passed and gate.gain > 0.05) is is_told, gate.to_line()


def test_a_version_starts_from_the_acceptance_that_was_published_with_it():
    policy = build_policy(PolicySettings(kind="ltd", guard=False), DRAFTERS, 0, MAX_DRAFT)
    policy.on_swap("eagle3", 1, {"acceptance": [0.9, 0.8]})
    figures = dict(zip(NAMES, policy._features.vector(1, [1.0] * 9), strict=True))
    assert [figures[f"hazard_{j}"] for j in (1, 2, 3)] == [0.9, 0.8, 0.8]
    assert figures["tokens_slow"] * MAX_DRAFT == pytest.approx(1 + 0.9 + 0.72 + 0.576 + 0.4608)

    policy.on_swap("eagle3", 2, {"acceptance": "much"})
    figures = dict(zip(NAMES, policy._features.vector(1, [1.0] * 9), strict=True))
    assert figures["hazard_1"] == figures["hazard_2"] == 0.6


def test_where_all_text_is_alike_nothing_passes_the_gate():
    whole, rows = parts(1600, lambda _: (0.6,) * MAX_DRAFT)
    network = fit_full_information(whole, rows, FullInformation(epochs=60, rounds=1, passes=20))

    gate = judge_network(network, whole, rows)

    assert not gate.passed, gate.to_line()
    assert gate.gain > -0.05, "it is no worse than the best fixed K either"


@pytest.mark.parametrize(("high", "passes"), [(0.99, False), (1.2, True), (None, True)])
def test_a_gain_that_the_log_itself_refutes_does_not_pass(high, passes):
    """The replay knows times by a table; the off-policy estimate has those of the steps."""
    own = None if high is None else Estimate(0.9, 0.8, high, 500.0)
    gate = PolicyGate(110.0, 100.0, 1.04, own, 3)

    assert gate.passed is passes
    assert gate.to_line().startswith("gate passed" if passes else "gate failed")


def test_ppo_learns_from_what_it_tries():
    whole, rows = parts(1600)
    untrained, trained = (
        judge_network(fit_ppo(whole, rows, how), whole, rows)
        for how in (Ppo(total_steps=2048, epochs=0, seed=2), Ppo(total_steps=10_240, seed=2))
    )
    assert trained.gain > untrained.gain + 0.05
    assert trained.gain > -0.1, trained.to_line()


def test_the_server_plays_what_was_fitted():
    """The same features, the same network: on the host the policy decides as the trainer judged."""
    whole, rows = parts(1600)
    network = fit_full_information(whole, rows, FullInformation(epochs=120, rounds=2, passes=40))
    policy = build_policy(
        PolicySettings(kind="ltd", guard=False, random_share=0.0), whole.traits, 0, MAX_DRAFT
    )
    policy.on_swap(DRAFTER, 0, {CALIBRATION_KEY: network.to_text()})

    ks = play(policy, whole).ks

    easy = np.array([np.mean([r.num_accepted for r in s.rows]) for s in whole.steps])
    assert ks[easy >= 4].mean() > ks[easy == 0].mean() + 2, "and other step times change nothing"


def test_a_policy_that_stopped_drafting_does_not_see_hard_text_for_ever():
    features, shares = Features(MAX_DRAFT), [1.0] * (MAX_DRAFT + 1)
    for accepted in [4] * 300 + [0] * 20:
        features.observe(4, [4], [accepted])
    hard = dict(zip(NAMES, features.vector(1, shares), strict=True))
    for _ in range(100):
        features.observe(0, [0], [0])
    later = dict(zip(NAMES, features.vector(1, shares), strict=True))

    assert hard["tokens_fast"] < 0.6 * hard["tokens_slow"]
    for recent, usual in (
        ("tokens_fast", "tokens_slow"),
        ("tokens_middle", "tokens_slow"),
        ("recent_hazard_1", "hazard_1"),
    ):
        assert later[recent] == pytest.approx(later[usual], rel=0.01)
        assert later[usual] == hard[usual]


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    write_run(folder, log(3200, any_k, (1,), moods))
    return folder


def run_command(folder, effort):
    return CliRunner().invoke(app, ["policy", "--effort", effort, "--set", f"run_dir={folder}"])


def test_the_command_writes_a_policy_that_passes_and_a_version_carries_it(run_dir):
    assert fitted_policy(run_dir) == {}

    result = run_command(run_dir, "0.5")

    assert result.exit_code == 0, result.output
    assert "gate passed" in result.output
    assert f"fitted to version 0 of {DRAFTER}" in result.output
    network = Network.from_bytes(policy_path(run_dir).read_bytes())
    text = fitted_policy(run_dir)[CALIBRATION_KEY]
    carried = Network.from_text(text)
    assert Origin.of_blob(base64.b64decode(text)) == Origin(DRAFTER, 0, 0)
    features = [0.5] * NUM_FEATURES
    assert carried.scores(features) == network.scores(features)


def test_a_fit_to_traces_of_several_versions_says_so(tmp_path):
    steps = log(640, any_k, (1,))
    write_run(tmp_path, [replace(one, version=at // 300) for at, one in enumerate(steps)])

    result = run_command(tmp_path, "0.1")

    assert f"fitted to versions 0 to 2 of {DRAFTER} together: the newest alone" in result.output


def test_a_policy_that_gains_nothing_is_not_written(tmp_path):
    write_run(tmp_path, log(640, any_k, (1,)))
    result = run_command(tmp_path, "0.2")

    assert result.exit_code == 1, result.output
    assert "not written" in result.output
    assert not policy_path(tmp_path).exists()


def test_a_damaged_file_is_not_published(tmp_path, caplog):
    policy_path(tmp_path).parent.mkdir()
    policy_path(tmp_path).write_bytes(b"damaged, surely")

    assert fitted_policy(tmp_path) == {}
    assert "is not published" in caplog.text


def test_a_run_that_is_not_there_is_refused_and_not_made(tmp_path):
    result = CliRunner().invoke(app, ["policy", "--set", f"run_dir={tmp_path / 'typo'}"])

    assert result.exit_code == 2
    assert "typo" in result.output
    assert not (tmp_path / "typo").exists()


def test_a_log_that_is_too_short_is_refused(tmp_path):
    write_run(tmp_path, log(100, any_k, (1,)))
    result = CliRunner().invoke(app, ["policy", "--set", f"run_dir={tmp_path}"])
    assert result.exit_code == 1
    assert "100 steps are too few" in result.output
