"""Off-policy estimates of policies that choose a budget, on logs whose truth is known."""

from __future__ import annotations

import functools

import numpy as np
import pytest

from policies.budgets import BudgetScores
from policies.cut_estimate import off_policy_gain_of, sampled_pair
from policies.evaluation import off_policy_rate
from policies.played_pair import PairPlay
from policies.replayed_log import ReplayedLog
from tests.policies.budget_logs import MAX_DRAFT, NUM_SHARES, always, any_pair, budget_log, profile
from tests.policies.logs import DRAFTER


def replayed(steps):
    return ReplayedLog.of(steps, DRAFTER, profile(), MAX_DRAFT)


def play_of(log, k, share, budgets=None):
    num = len(log.steps)
    budgets = BudgetScores.of(log, NUM_SHARES) if budgets is None else budgets
    return PairPlay.of(log, np.full(num, k), np.full(num, share), budgets)


def truth(k, share, slower):
    """Tokens per second of a policy that always does this."""
    steps = budget_log(4000, always(k, share), seed=5, slower=slower)
    return sum(s.tokens for s in steps) / sum(s.step_s for s in steps)


@functools.cache
def tried(slower):
    """A log that ran everything, and what it says of budgets."""
    log = replayed(budget_log(8000, any_pair, slower=slower))
    return log, BudgetScores.of(log, NUM_SHARES)


@pytest.mark.parametrize("slower", [1.0, 1.3])
@pytest.mark.parametrize(("k", "share"), [(4, 1), (3, 2), (4, 3)])
def test_it_is_right_where_the_table_is_wrong_about_packed_rows(k, share, slower):
    """Seconds are those of the steps that ran the same budget, not the table's alone."""
    log, budgets = tried(slower)

    found = sampled_pair(log, play_of(log, k, share, budgets)).estimate()

    wanted = truth(k, share, slower)
    assert found.value == pytest.approx(wanted, rel=0.025)
    assert abs(found.value - wanted) < found.high - found.low, "four standard errors"
    assert found.high / found.low < 1.15


def test_what_is_not_cut_is_estimated_as_before():
    log = replayed(budget_log(3000, any_pair))
    whole = play_of(log, 3, NUM_SHARES - 1)
    assert sampled_pair(log, whole).estimate() == off_policy_rate(log, whole.ks)


def test_a_gain_is_that_of_the_same_blocks():
    log, budgets = tried(1.3)
    ours, theirs = play_of(log, 4, 1, budgets), play_of(log, 2, 3, budgets)

    gain = off_policy_gain_of(log, ours, theirs)

    wanted = truth(4, 1, 1.3) / truth(2, 3, 1.3)
    assert gain.low < wanted < gain.high
    assert gain.value == pytest.approx(wanted, rel=0.03)


def test_a_log_that_never_ran_such_a_budget_does_not_tell_its_time():
    log = replayed(budget_log(3000, always(4, 3)))
    assert sampled_pair(log, play_of(log, 4, 1)) is None
    whole = PairPlay.of(log, np.full(len(log.steps), 4))
    assert off_policy_gain_of(log, play_of(log, 4, 1), whole) is None
    assert sampled_pair(log, whole) is not None
