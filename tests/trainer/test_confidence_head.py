"""``trainer policy --method specdecpp`` learns where drafts will be rejected, and says so where
confidence tells nothing."""

from __future__ import annotations

import base64
import json
from dataclasses import asdict

import numpy as np
import pytest
from typer.testing import CliRunner

from policies.confidence_head import Head
from policies.published import Origin
from tests.policies.confident_logs import confident_log, profile
from tests.policies.logs import DRAFTER, log, write_run
from tests.policies.logs import always as always_k
from trainer.cli import app
from trainer.confidence_head import HeadFit, auc, fit_head, judge_head, samples_of, split_samples
from trainer.fitted_policy import fitted_policy, head_path


def fitted(steps, epochs=60):
    ours, held_out = split_samples(samples_of(steps, None), 0.25)
    head = fit_head(ours, HeadFit(epochs=epochs))
    return head, judge_head(head, ours, held_out)


def test_a_head_tells_easy_positions_from_hard_ones():
    head, gate = fitted(confident_log(200))

    assert gate.passed and gate.auc > 0.75 > gate.place_auc, gate.to_line()
    easy, hard = (0.95, 0.1, 0.9), (0.3, 1.4, 0.0)
    scores = head.scores(np.array([[easy, hard]]), np.array([0.7]))
    assert scores[0, 0] > scores[0, 1] + 0.3


def test_where_confidence_tells_nothing_the_gate_refuses():
    _, gate = fitted(confident_log(150, telling=False))
    assert not gate.passed, gate.to_line()


def test_positions_behind_a_cut_or_a_rejection_are_left_out():
    steps = confident_log(60)
    samples = samples_of(steps, DRAFTER)
    rows = [row for step in steps for row in step.rows]
    assert len(samples) == sum(min(r.num_accepted + 1, r.num_verified) for r in rows)
    assert samples.kept.sum() == sum(r.num_accepted for r in rows)


def test_the_command_writes_a_head_that_is_published_with_the_next_version(tmp_path):
    write_run(tmp_path, confident_log(150))
    samples = [asdict(sample) for sample in profile()]
    (tmp_path / "step_times.json").write_text(json.dumps({"facts": {}, "samples": samples}))
    arguments = ["policy", "--method", "specdecpp", "--set", f"run_dir={tmp_path}"]

    done = CliRunner().invoke(app, arguments)

    assert done.exit_code == 0, done.output
    assert "gate passed" in done.output
    head = Head.from_bytes(head_path(tmp_path).read_bytes())
    text = fitted_policy(tmp_path)["specdecpp"]
    assert np.array_equal(Head.from_text(text).w1, head.w1)
    assert Origin.of_blob(base64.b64decode(text)) == Origin(DRAFTER, 0, 0)
    head_path(tmp_path).write_bytes(b"damaged")
    assert fitted_policy(tmp_path) == {}, "and the log says why"


def test_a_run_without_figures_is_refused(tmp_path):
    write_run(tmp_path, log(40, always_k(3)))
    arguments = ["policy", "--method", "specdecpp", "--set", f"run_dir={tmp_path}"]

    done = CliRunner().invoke(app, arguments)

    assert done.exit_code == 1
    assert "policy.kind=confidence" in done.output


def test_ranks_count_ties_half():
    assert auc(np.array([0.1, 0.2, 0.2, 0.3]), np.array([False, True, False, True])) == 0.875
    with pytest.raises(ValueError, match="positions with figures"):
        samples_of([], None)
