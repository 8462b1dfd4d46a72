"""The lossless benchmark for a GPU, at a tiny size: it detects what it must detect."""

from __future__ import annotations

import json

import pytest
import torch
import typer

import serving.engine.rounds
from benchmarks.lossless import greedy, law
from benchmarks.lossless.__main__ import Part, main
from benchmarks.lossless.greedy import Run
from oracles.joint_law import Cut
from specops.verify_logits import Rule

CPU = torch.device("cpu")
TINY = Run("tiny", "float32", "fast", 1.0)


HONEST = [run for run in law.RUNS if run.bug is None]


def test_bugs_are_planted_first_and_every_setting_is_sampled_in_two_regimes_next():
    first = HONEST[:60]

    assert tuple(HONEST) == law.RUNS[-len(HONEST) :]
    assert len({(run.setting.name, run.regime) for run in first}) == 60
    assert {run.regime for run in first} == {"close", "opposed"}
    assert {(run.rule, run.share) for run in first} == {(Rule.BLOCK, 1.0)}


def test_the_samplings_are_many_and_each_cut_is_also_alone():
    assert {run.setting.cut for run in HONEST} == set(Cut)
    assert len({run.setting.sampling for run in HONEST}) == 15


def test_what_servers_run_comes_before_the_standard_rule():
    kinds = [(run.layout, run.regime, run.rule) for run in HONEST]
    standard = [rule for _, _, rule in kinds].index(Rule.STANDARD)

    assert ("wide", "opposed", Rule.BLOCK) in kinds[:standard]
    assert ("reduced", "close", Rule.BLOCK) in kinds[:standard]
    assert ("whole", "swapped", Rule.BLOCK) in kinds[:standard]
    assert ("whole", "opposed", Rule.MATCH) in kinds[:standard]


def test_real_sizes_are_sampled_in_many_ways():
    wide = [run.setting for run in HONEST if run.layout == "wide"]

    assert {setting.num_draft for setting in wide} == {0, 1, 3, 4, 8}
    assert {setting.cut is Cut.NOTHING for setting in wide} == {True, False}
    assert any(setting.adaptive for setting in wide)


def test_few_runs_are_told_that_nothing_is_cut_off():
    told = [run for run in HONEST if not run.as_served]

    assert 0 < len(told) < 0.05 * len(HONEST)
    assert {run.setting.cut for run in told} == {Cut.NOTHING}


def test_rows_come_until_the_budget_is_spent():
    rows = []
    law.measure(torch.device("cpu"), 500, 0.5, rows.append)

    assert rows and len(rows) < len(law.RUNS)


def honest_row(**changed):
    row = {
        "planted": None, "setting": "a", "sampling": "b", "samples": 500, "seconds": 0.1,
        "chi_squared_over_limit": 0.7,
    }  # fmt: skip
    return {**row, **changed}


def test_a_law_that_is_rejected_is_told():
    assert law.is_sound([honest_row()])
    assert not law.is_sound([honest_row(), honest_row(chi_squared_over_limit=1.5)])


def test_the_summary_says_how_many_samples_there_were():
    summary = law.summary([honest_row(), honest_row(samples=25), honest_row(planted="c")], 500)

    assert (summary["samples"], summary["samples_min"], summary["samples_max"]) == (525, 25, 500)
    assert (summary["runs"], summary["runs_of_all_samples"]) == (2, 1)


@pytest.mark.parametrize("part", Part)
def test_a_spent_budget_is_no_proof(part, tmp_path, capsys):
    out = tmp_path / "result.json"

    with pytest.raises(typer.Exit) as left:
        main(out, [part], "cpu", num_samples=20, num_prompts=2, budget_s=0.0)

    assert left.value.exit_code == 1
    assert f"INCOMPLETE: {part}" in capsys.readouterr().out
    summary = json.loads(out.read_text())["summary"]
    assert {name: told["complete"] for name, told in summary.items()} == {part: False}


def test_what_is_complete_says_so():
    rows = [honest_row()] * len(law.RUNS)

    assert law.summary(rows, 500)["complete"]
    assert greedy.is_complete([{}] * len(greedy.RUNS_ON_CPU), CPU)


def test_a_planted_bug_that_is_not_seen_is_told():
    row = honest_row(planted="a bug")
    seen = {**row, "chi_squared_over_limit": 2.0}

    assert not law.is_sound([row])
    assert law.is_sound([row, seen])
    assert law.summary([row, seen], 500)["planted_bugs_rejected"] == 1


def test_drafts_and_swaps_change_nothing(monkeypatch):
    monkeypatch.setattr(greedy, "SWAP_EVERY", 4)
    row = greedy.row_of(TINY, CPU, 24)

    assert (row["mismatches"], row["texts_that_differ"]) == (0, 0)
    assert row["swaps"] > 0
    assert 0 < row["accepted_tokens"] < row["drafted_tokens"]
    assert (row["prompts"], row["distinct_prompts"]) == (24, 12)


def test_drafts_that_are_kept_unseen_are_found(monkeypatch):
    """Bug: the first draft token is kept, whatever the target says."""
    right = serving.engine.rounds.close_round

    def wrong(state, opened, draft, verdict, logq, outputs):
        if not isinstance(verdict, torch.Tensor):  # only rounds of greedy requests have the bug
            return right(state, opened, draft, verdict, logq, outputs)
        best = verdict.clone()
        first = (opened.lens_R > 0).nonzero()[:, 0]
        best[first, 0] = draft[first, 0] if len(first) else best[first, 0]
        return right(state, opened, draft, best, logq, outputs)

    monkeypatch.setattr(serving.engine.rounds, "close_round", wrong)
    row = greedy.row_of(TINY, CPU, 24)

    assert row["mismatches"] > 0
    assert not greedy.is_sound([{**row, "numerics": "pinned"}])


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("target", ["tiny", "bundled"])
def test_by_pinned_numerics_no_byte_differs(target, dtype, monkeypatch):
    monkeypatch.setattr(greedy, "SWAP_EVERY", 10)
    row = greedy.row_of(Run(target, dtype, "pinned", 1.0), torch.device("cuda"), 200)

    assert row["swaps"] > 0
    assert greedy.is_sound([row])
