"""What drafting saves, what learning earns, and whether acceptance has fallen."""

from __future__ import annotations

import random

import numpy as np
import pytest

from policies.cost_table import CostTable, by_tokens
from policies.drift import DriftWatch
from policies.interface import Decision, Outcome, RowOutcomes
from policies.payback import Payback
from policies.savings import Savings


def outcome(draft_k, accepted, step_s, *, has_prefill=False, plan_s=0.0):
    rows = RowOutcomes([draft_k] * len(accepted), accepted)
    decision = Decision("any" if draft_k else "none", draft_k, 1.0, explore=False, reason="test")
    return Outcome(decision, len(accepted), rows, step_s, 0.0, has_prefill, 1, plan_s)


def test_savings_are_tokens_times_the_difference_of_the_rates():
    savings = Savings(lambda batch: 0.01 * batch)

    savings.observe(outcome(3, [2, 1], 0.025))  # 5 tokens; plain would have taken 2.5 steps of 0.02

    assert savings.plain_s == pytest.approx(0.05)
    tokens, plain_rate, actual_rate = 5, 2 / 0.02, 5 / 0.025
    assert savings.saved_s == pytest.approx(tokens * (1 / plain_rate - 1 / actual_rate))


def test_plain_steps_save_nothing_and_their_planning_costs():
    savings = Savings(lambda batch: 99.0)
    savings.observe(outcome(0, [0, 0], 0.02, plan_s=0.001))
    assert savings.saved_s == pytest.approx(-0.001)


def test_steps_that_say_nothing_are_left_out():
    savings = Savings(lambda batch: None if batch > 1 else 0.01)
    for one in (outcome(3, [3], 0.5, has_prefill=True), outcome(3, [3, 3], 0.5), outcome(2, [], 1)):
        savings.observe(one)
    assert (savings.decode_s, savings.plain_s) == (0.0, 0.0)


def table_of(times, batch=4, count=10):
    table = CostTable()
    for k, step_s in times.items():
        rounds = np.full(count, batch, np.int32), np.full(count, k, np.int32)
        table.observe(*rounds, np.full(count, step_s))
    return table


def test_drafting_never_makes_a_step_faster():
    """Plain steps are timed at all hours, a drafter's at those when it was tried: its own may be
    those of a quieter hour, which is no gain."""
    table = table_of({0: 0.020, 1: 0.008, 4: 0.030})

    assert table.step_s(4, 0) == 0.020
    assert table.step_s(4, 1) == 0.020
    assert 0.020 <= table.step_s(4, 2) <= table.step_s(4, 4) == 0.030
    gains = table.speed_table(4).gains[0]
    assert max(gains) == 1.0


def test_step_times_are_medians_and_a_line_between_them():
    table = table_of({0: 0.010, 2: 0.014})
    late = np.full(3, 4, np.int32), np.full(3, 2, np.int32), np.full(3, 5.0)
    table.observe(*late)

    assert table.step_s(4, 2) == 0.014
    assert table.step_s(4, 1) == pytest.approx(0.012)
    assert table.step_s(5, 4) == pytest.approx(0.018)  # of one size with 4
    assert table.step_s(64, 2) is None
    assert table_of({0: 0.010}).step_s(4, 1) is None, "one K tells nothing of another"


def test_what_a_drafter_is_worth_depends_on_what_its_drafts_cost():
    tokens = [1.6, 2.0, 2.2, 2.3]
    cheap = table_of({0: 0.010, 4: 0.011}).speed_table(4)
    dear = table_of({0: 0.010, 4: 0.030}).speed_table(4)
    assert cheap is not None and dear is not None

    assert (cheap.best(tokens), dear.best(tokens)) == ((4,), (1,))
    assert cheap.speedup(tokens, (4,)) == pytest.approx(2.3 / 1.1)
    assert dear.speedup(tokens, (1,)) == pytest.approx(1.6 / 1.5)
    plain = by_tokens(4)
    assert plain.speedup(tokens, plain.best(tokens)) == 2.3


def test_batch_sizes_count_by_their_traffic():
    table = table_of({0: 0.010, 4: 0.010}, batch=1, count=30)
    for k, step_s in ((0, 0.010), (4, 0.020)):
        sizes, ks = np.full(10, 8, np.int32), np.full(10, k, np.int32)
        table.observe(sizes, ks, np.full(10, step_s))
    speed = table.speed_table(4)
    assert speed is not None

    assert sum(speed.weights) == pytest.approx(1)
    assert speed.weights[0] == pytest.approx(0.75, abs=0.01)
    assert speed.gains[0][3] == pytest.approx(1) and speed.gains[1][3] == pytest.approx(0.5)


def test_learning_earns_what_the_version_it_began_from_would_not_have_saved():
    account = Payback(within_s=100.0)
    account.serve(decode_s=10.0, plain_s=15.0, own_s=8.0)  # before anything is known of the gain
    assert (account.saved_s, account.earned_s, account.ratio) == (5.0, 0.0, None)

    account.gain = 1.25
    account.serve(decode_s=10.0, plain_s=15.0, own_s=8.0)
    account.spend(4.0)

    assert (account.saved_s, account.earned_s, account.ratio) == (10.0, 2.0, 0.5)
    again = Payback(within_s=100.0)
    again.restore(account.to_json())
    assert again.figures() == account.figures()


@pytest.mark.parametrize(("earned_s", "fails"), [(2.0, True), (6.0, False)])
def test_a_window_fails_if_it_earned_less_than_it_took(earned_s, fails):
    account = Payback(within_s=60.0, gain=2.0)
    account.spend(5.0)
    account.serve(decode_s=earned_s, plain_s=earned_s, own_s=earned_s)

    assert not account.passed(59.0)
    assert account.passed(1.0) is fails
    assert not account.passed(59.0), "the next window has begun"


def test_time_without_work_is_in_no_window():
    account = Payback(within_s=60.0, gain=2.0)
    for _ in range(9):
        assert not account.passed(59.0), "it waits for traces"
    account.spend(5.0)

    assert not account.passed(59.0)
    assert account.passed(1.0)


def test_without_a_time_no_window_fails():
    account = Payback(within_s=None)
    account.spend(1e6)
    assert not account.passed(1e9)


def feed(watch, rates, traces, *, seed=0, version=1, rounds=30):
    """Alarms on the way; each trace has a difficulty of its own."""
    luck, alarms = random.Random(seed), 0
    for number in range(traces):
        domain, rate = rates[number % len(rates)]
        own = min(max(luck.gauss(rate, 0.08), 0.0), 1.0)
        kept = sum(luck.random() < own for _ in range(rounds))
        alarms += watch.observe(domain, version, rounds, kept)
    return alarms


def test_acceptance_that_falls_is_noticed_and_small_changes_are_not():
    false, missed, late = 0, 0, 0
    for seed in range(40):
        watch = DriftWatch()
        false += feed(watch, [("a", 0.7), ("b", 0.5)], 300, seed=seed)
        false += feed(watch, [("a", 0.69), ("b", 0.49)], 100, seed=seed + 1000)
        missed += feed(watch, [("a", 0.4), ("b", 0.5)], 100, seed=seed + 2000) == 0
        late += watch.num_alarms == 0
    assert (missed, late) == (0, 0)
    assert false <= 2, "in 40 runs of 400 traces"


def test_a_new_domain_that_accepts_less_is_drift_and_one_that_accepts_more_is_not():
    watch = DriftWatch()
    feed(watch, [("a", 0.7)], 100)
    assert feed(watch, [("new", 0.95)], 60, seed=1) == 0
    assert feed(watch, [("other", 0.3)], 60, seed=2) >= 1
    assert watch.figures()["version"] == 1


def test_another_version_is_measured_anew_and_late_traces_of_the_former_say_nothing():
    watch = DriftWatch()
    feed(watch, [("a", 0.7)], 100)
    assert feed(watch, [("a", 0.2)], 100, version=2) == 0, "that is version 2's usual acceptance"
    assert feed(watch, [("a", 0.0)], 50, version=1) == 0
    assert feed(watch, [("a", 0.05)], 100, version=2, seed=3) >= 1


def test_clients_cannot_make_the_watch_grow():
    watch = DriftWatch()
    feed(watch, [(f"d{n}", 0.5) for n in range(500)], 500)
    assert len(watch.domains) <= 33


def test_after_a_roll_back_the_version_in_use_again_is_watched():
    watch = DriftWatch()
    feed(watch, [("a", 0.7)], 100, version=5)
    for seed in range(3):  # late ones say nothing
        assert feed(watch, [("a", 0.1)], 60, version=4, seed=seed) == 0
        assert feed(watch, [("a", 0.7)], 1, version=5) == 0
    assert watch.version == 5

    assert feed(watch, [("a", 0.7)], 150, version=4, seed=2) == 0
    assert watch.version == 4
    assert feed(watch, [("a", 0.3)], 60, version=4, seed=3) > 0


@pytest.mark.parametrize("traces", [4, 10, 60])
def test_acceptance_under_another_target_is_held_against_that_under_the_former(traces):
    watch = DriftWatch()
    feed(watch, [("a", 0.7)], traces)

    assert watch.replace_target()
    assert feed(watch, [("a", 0.3)], 40, seed=1) > 0, "and not what it is to be from now on"


def test_a_few_rounds_are_nothing_to_hold_another_target_against():
    watch = DriftWatch()
    feed(watch, [("a", 0.7)], 3)

    assert not watch.replace_target()
    assert not DriftWatch().replace_target()
