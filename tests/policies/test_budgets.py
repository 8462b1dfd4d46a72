"""What a verification budget would have brought in every step of a log."""

from __future__ import annotations

import random
from dataclasses import replace

import numpy as np
import pytest

from policies.allocation import Allocation
from policies.budgets import CUT, BudgetScores, SavedTimes, allocation_of, budget_of, cut_rows
from policies.interface import Decision
from policies.logged import cut_score
from policies.replayed_log import ReplayedLog
from tests.policies.confident_logs import MAX_DRAFT, confident_log, profile, row
from tests.policies.logs import DRAFTER, any_k, log
from tests.policies.logs import profile as profile_of_ks

NUM = 4


def replayed(steps, samples=None):
    return ReplayedLog.of(steps, DRAFTER, profile() if samples is None else samples, MAX_DRAFT)


def mixed_log():
    """Whole drafts, cut ones, batches of several sizes, and requests that could use less."""
    steps = [
        step
        for batch in (1, 3, 8)
        for step in confident_log(40, batch=batch, threshold=0.5, share=0.5, seed=batch)
    ]
    rng = random.Random(9)
    short = row(rng, 0.0)
    figures = replace(short.considered, confidence=short.considered.confidence[:6])
    limited = replace(short, num_verified=2, num_accepted=1, considered=figures)
    steps[7] = replace(steps[7], rows=(limited,))
    # Only some requests of this batch left a trace.
    steps[50] = replace(steps[50], batch=5)
    return steps


def test_shares_of_a_batch_are_rounded_up():
    assert [budget_of(at, NUM, 3, 5) for at in range(NUM)] == [4, 8, 12, 15]
    assert [budget_of(at, NUM, 1, 1) for at in range(NUM)] == [1, 1, 1, 1]
    for at in range(NUM):
        found = allocation_of(at, NUM, 3, 5)
        assert found.budget(3, 5) == budget_of(at, NUM, 3, 5)
        assert found.may_cut is (at < NUM - 1)


def test_scores_are_those_of_the_definition_of_cuts():
    """``Allocation.lengths`` decides which positions stay, one step and budget at a time."""
    own = replayed(mixed_log())
    scores = BudgetScores.of(own, NUM)
    for at, step in enumerate(own.steps):
        for k in range(1, MAX_DRAFT + 1):
            assert scores.is_known[at, k]
            for share in range(NUM - 1):
                each = budget_of(share, NUM, step.batch, k) / step.batch
                allocation = Allocation(CUT, 0.0, budget_each=each)
                decision = Decision(DRAFTER, k, 1.0, False, "", allocation=allocation)
                lengths = own.lengths(at, decision)
                wanted = cut_score(step, lengths, own.beyond)
                found = scores.tokens[at, k, share], scores.extrapolated[at, k, share]
                assert found == pytest.approx(wanted)
                cut = cut_rows(own, at, k, share, NUM)
                assert cut == (lengths if each < k else None)
                saved = own.table.saved(step.batch, k, each)
                assert scores.seconds[at, k, share] == pytest.approx(own.seconds[at, k] - saved)


def test_the_last_share_is_the_whole_draft():
    own = replayed(mixed_log())
    scores = BudgetScores.of(own, NUM)

    assert np.array_equal(scores.tokens[..., -1], own.tokens)
    assert np.array_equal(scores.seconds[..., -1], own.seconds)
    assert np.array_equal(scores.tokens[:, 0], np.repeat(own.tokens[:, :1], NUM, axis=1))
    assert (np.diff(scores.tokens, axis=2) >= -1e-9).all(), "a larger budget keeps no less"
    assert (np.diff(scores.seconds, axis=2) >= -1e-12).all()
    assert scores.tokens[:, 4, 1].sum() < own.tokens[:, 4].sum(), "and a smaller one less"


def test_a_cut_of_more_than_was_drafted_is_not_known():
    steps = confident_log(60, batch=2, threshold=0.0, share=1.0)
    rng = random.Random(1)
    short = row(rng, 0.0)
    three = replace(short.considered, confidence=short.considered.confidence[:9])
    rows = (replace(short, num_verified=3, num_accepted=3, considered=three),) * 2
    steps[5] = replace(steps[5], draft_k=3, rows=rows)
    steps[6] = replace(steps[6], rows=tuple(replace(one, considered=None) for one in steps[6].rows))
    own = replayed(steps)
    scores = BudgetScores.of(own, NUM)

    assert scores.is_known[5].tolist() == [False, True, True, True, False, False]
    assert not scores.is_known[6].any()
    for at, k in ((5, 4), (5, 5), (6, 3)):
        assert (scores.tokens[at, k] == own.tokens[at, k]).all()
        assert (scores.seconds[at, k] == own.seconds[at, k]).all()
        assert cut_rows(own, at, k, 0, NUM) is None
        assert (scores.saved[at, k, :-1] > 0).all(), "what it would save is known all the same"


def test_logs_that_do_not_tell_are_refused():
    with pytest.raises(ValueError, match=r"no step noted the drafter's figures.*size=note"):
        BudgetScores.of(ReplayedLog.of(log(60, any_k), DRAFTER, profile_of_ks(), 8), NUM)
    untold = [replace(sample, draft_s=0.0) for sample in profile()]
    with pytest.raises(ValueError, match="do not tell drafting and verification apart"):
        BudgetScores.of(replayed(confident_log(60), untold), NUM)


def test_saved_times_are_those_of_half_a_draft_in_plain_steps():
    own = replayed(mixed_log())
    saved = SavedTimes(own.table)
    for batch, k in ((1, 4), (8, 5), (5, 2)):
        wanted = own.table.saved(batch, k, k / 2) / own.table.seconds(batch)[0]
        assert saved.half(batch, k) == pytest.approx(wanted) and wanted > 0
        # The same by a profile that came through a table.
        again = SavedTimes.of_samples(own.table.samples(DRAFTER), DRAFTER, MAX_DRAFT)
        assert again.half(batch, k) == pytest.approx(wanted)
    assert SavedTimes.of_samples([], DRAFTER, MAX_DRAFT).half(8, 4) == 0.0
