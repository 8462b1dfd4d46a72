"""The lossless benchmark of a GPU, at a tiny size: it sees what it is there to see."""

from __future__ import annotations

import pytest
import torch

import serving.rounds
from benchmarks.engine.engines import Place
from benchmarks.lossless_gpu import greedy, law
from benchmarks.lossless_gpu.greedy import Run
from specops.verify_logits import Rule

CPU = Place(torch.device("cpu"))
TINY = Run("tiny", "float32", "fast", 1.0)


def test_every_setting_is_sampled_in_two_regimes_first():
    first = list(law.runs(10_000_000))[:60]

    assert len({(run.setting.name, run.regime) for run in first}) == 60
    assert {run.regime for run in first} == {"close", "opposed"}
    assert {(run.rule, run.share, run.bug) for run in first} == {(Rule.BLOCK, 1.0, None)}


def test_rows_come_until_the_budget_is_spent():
    rows = []
    law.measure(torch.device("cpu"), 500, 0.5, rows.append)

    assert rows and len(rows) < len(list(law.runs(500)))
    assert law.is_sound(rows)
    rows[0]["chi_squared_over_limit"] = 1.5
    assert not law.is_sound(rows)


def test_a_planted_bug_that_is_not_seen_is_told():
    row = {"planted": "a bug", "chi_squared_over_limit": 0.5, "samples": 1, "seconds": 0.1}
    seen = {**row, "chi_squared_over_limit": 2.0}

    assert not law.is_sound([row])
    assert law.is_sound([row, seen])
    assert law.summary([row, seen], 500)["planted_bugs_rejected"] == 1


def test_drafts_and_swaps_change_nothing(monkeypatch):
    monkeypatch.setattr(greedy, "SWAP_EVERY", 4)
    row = greedy._row(TINY, CPU, 24)

    assert (row["mismatches"], row["texts_that_differ"]) == (0, 0)
    assert row["swaps"] > 0
    assert 0 < row["accepted_tokens"] < row["drafted_tokens"]


def test_drafts_that_are_kept_unseen_are_found(monkeypatch):
    """Bug: the first draft token is kept, whatever the target says."""
    right = serving.rounds.close_round

    def wrong(state, opened, draft, verdict, logq, outputs):
        best = verdict.clone()
        first = (opened.lens_R > 0).nonzero()[:, 0]
        best[first, 0] = draft[first, 0] if len(first) else best[first, 0]
        return right(state, opened, draft, best, logq, outputs)

    monkeypatch.setattr(serving.rounds, "close_round", wrong)
    row = greedy._row(TINY, CPU, 24)

    assert row["mismatches"] > 0
    assert not greedy.is_sound([{**row, "numerics": "pinned"}])


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("target", ["tiny", "bundled"])
def test_by_pinned_numerics_no_byte_differs(target, dtype, monkeypatch):
    monkeypatch.setattr(greedy, "SWAP_EVERY", 10)
    row = greedy._row(Run(target, dtype, "pinned", 1.0), Place(torch.device("cuda")), 200)

    assert row["swaps"] > 0
    assert greedy.is_sound([row])
