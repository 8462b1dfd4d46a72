"""Notes of predictions are compared with what came, whichever policy made them."""

from __future__ import annotations

from dataclasses import replace

import pytest
from typer.testing import CliRunner

from policies.cli import app
from policies.logged import steps_of
from policies.predictions import predictions_of
from tests.policies.logs import expected_tokens, log, step_s, traces_of, write_run


def noted(tokens=1.0, seconds=1.0, policy="mine", num_steps=600):
    """Steps of K = 0 to 4 with predictions that are wrong by these factors."""
    steps = log(num_steps, lambda rng, _batch: (rng.randrange(5), 0.2), batches=(1, 4), noise=0.0)
    return [
        replace(
            step,
            policy=policy,
            notes=(
                (f"{policy}.seconds", seconds * step_s(step.draft_k, step.batch)),
                (f"{policy}.tokens", tokens * expected_tokens(step.draft_k)),
            ),
        )
        for step in steps
    ]


def test_errors_are_those_of_the_predictions():
    [found] = predictions_of(noted(tokens=1.2, seconds=0.7))
    assert (found.policy, found.num_steps) == ("mine", 600)
    assert found.tokens == pytest.approx(1.2, rel=0.05)
    assert found.seconds == pytest.approx(0.7, rel=0.02)


def test_traces_keep_predictions_and_policies_are_told_apart():
    steps = [*noted(tokens=1.5), *noted(policy="other")]
    steps[:300] = [replace(step, notes=()) for step in steps[:300]]
    mine, other = predictions_of(steps_of(traces_of(steps)))
    assert (mine.policy, mine.num_steps, other.num_steps) == ("mine", 300, 600)
    assert mine.tokens == pytest.approx(1.5, rel=0.05)
    assert other.tokens == pytest.approx(1.0, rel=0.05)


def test_times_beside_prompts_are_left_out_and_few_steps_say_nothing():
    steps = noted()
    steps[::2] = [replace(one, is_timed=False, step_s=9 * one.step_s) for one in steps[::2]]
    [found] = predictions_of(steps)
    assert found.seconds == pytest.approx(1.0, rel=0.02)
    [found] = predictions_of([replace(one, is_timed=False) for one in steps])
    assert found.seconds is None
    assert predictions_of(steps[:20]) == []


def test_evaluate_says_how_far_predictions_are(tmp_path):
    write_run(tmp_path, noted(seconds=1.5, num_steps=120))
    done = CliRunner().invoke(app, ["evaluate", str(tmp_path), "--seeds", "1"])
    assert done.exit_code == 0, done.output
    [line] = [line for line in done.output.splitlines() if line.startswith("mine predicted")]
    assert line.startswith("mine predicted 120 steps: ")
    assert "% tokens" in line
    assert line.endswith("% time")
    assert 44 <= float(line.split()[-3]) <= 56
