"""Candidates pass on evidence only; replay keeps the newest traces and samples older ones."""

from __future__ import annotations

import random
import statistics
from collections import Counter

import pytest

from policies.gate import PairedTrace, errors_allowed, gain_error, gate
from policies.replay import Replay, add, is_held_out


def test_a_candidate_passes_when_it_beats_the_incumbent_by_the_margin():
    assert gate(2.02, 2.0, 1.005, 100).passed
    assert not gate(2.005, 2.0, 1.005, 100).passed


@pytest.mark.parametrize("figure", [float("nan"), float("inf"), float("-inf")])
def test_figures_that_are_not_finite_never_pass(figure):
    assert not gate(figure, 2.0, 1.005, 100).passed
    assert not gate(3.0, figure, 1.005, 100).passed


def test_nothing_passes_without_rows_and_the_reason_says_so():
    verdict = gate(3.0, 2.0, 1.005, 0)
    assert (verdict.passed, verdict.reason) == (False, "no held-out rows to judge on")


def kept(num, *, seed=0, recent=10, reservoir=20, step=7):
    replay = Replay()
    for start in range(0, num, step):
        replay = add(
            replay,
            range(start, min(start + step, num)),
            recent_traces=recent,
            reservoir_traces=reservoir,
            seed=seed,
        )
    return replay


def test_the_newest_are_recent_and_older_ones_are_sampled():
    replay = kept(200)
    assert replay.recent == tuple(range(190, 200))
    assert len(set(replay.reservoir)) == 20
    assert max(replay.reservoir) < 190
    assert replay.num_left == 190


def test_few_traces_are_all_kept():
    replay = kept(25)
    assert sorted(replay.recent + replay.reservoir) == list(range(25))


def test_the_reservoir_is_uniform_over_all_older_traces():
    seen = Counter(trace // 19 for seed in range(400) for trace in kept(200, seed=seed).reservoir)
    assert set(seen) == set(range(10))
    assert all(abs(count - 800) < 120 for count in seen.values())  # 4.5 standard deviations


def test_sampling_depends_only_on_order_and_seed():
    assert kept(200, step=7) == kept(200, step=1)
    assert kept(200, seed=1) != kept(200, seed=2)
    assert kept(50, reservoir=0).reservoir == ()


def test_one_trace_in_eight_is_held_out_for_good():
    keys = [f"server/0/{seq}" for seq in range(8000)]
    held = [key for key in keys if is_held_out(key, 8)]
    assert 850 < len(held) < 1150
    assert held == [key for key in keys if is_held_out(key, 8)]
    with pytest.raises(ValueError, match="every must be >= 1"):
        is_held_out("a", 0)


def test_a_candidate_may_not_forget_earlier_traffic():
    better = {"candidate": 3.2, "incumbent": 3.0, "margin": 1.0, "num_rows": 10}

    assert gate(**better, older=(3.89, 4.0)).passed
    verdict = gate(**better, older=(3.87, 4.0))
    assert (verdict.passed, verdict.kind) == (False, "forgets")
    assert "forgets earlier traffic: candidate 3.8700 there, below 0.97 x" in verdict.reason
    small = gate(candidate=3.06, incumbent=3.0, margin=1.0, num_rows=10, older=(3.9, 4.0))
    assert not small.passed, "a small gain does not pay for a larger loss"
    assert not gate(**better, older=(float("nan"), 4.0)).passed


def pairs(num, gain, spread, seed=0, chains=60):
    """Traces on which a candidate gains on average, by more on some than on others."""
    luck = random.Random(seed)
    traces = []
    for _ in range(num):
        count = luck.randint(chains // 2, 3 * chains // 2)
        level, own = luck.gauss(2.0, 0.5), luck.gauss(gain, spread)
        traces.append(PairedTrace(count, count * (level + own), count * level))
    return traces


def judged(traces, confidence=0.9, margin=1.0):
    total = sum(t.num_chains for t in traces)
    candidate, incumbent = (
        sum(getattr(t, name) for t in traces) / total for name in ("candidate", "incumbent")
    )
    return gate(candidate, incumbent, margin, total, traces=traces, confidence=confidence)


def test_a_gain_within_its_uncertainty_does_not_pass():
    assert judged(pairs(32, gain=0.06, spread=0.05)).passed
    unsure = judged(pairs(32, gain=0.06, spread=0.6, seed=3))
    assert not unsure.passed
    assert "gain uncertain by 0.1" in unsure.reason


def test_equal_drafters_pass_as_rarely_as_confidence_says():
    passed = [judged(pairs(12, 0.0, 0.3, seed)).passed for seed in range(2000)]

    assert 0.07 < sum(passed) / len(passed) < 0.13


def test_the_error_is_the_spread_of_the_gain_over_many_draws():
    gains, errors = [], []
    for seed in range(1500):
        traces = pairs(24, 0.1, 0.3, seed)
        total = sum(t.num_chains for t in traces)
        gains.append(sum(t.candidate - t.incumbent for t in traces) / total)
        errors.append(gain_error(traces))

    assert statistics.fmean(errors) == pytest.approx(statistics.stdev(gains), rel=0.06)


def test_how_hard_the_traces_are_adds_no_uncertainty():
    """Both drafters are measured on the same ones."""
    assert gain_error(pairs(16, 0.1, 0.0)) == pytest.approx(0.0, abs=1e-9)


@pytest.mark.parametrize(
    ("confidence", "num", "table"),
    [(0.9, 6, 1.476), (0.9, 13, 1.356), (0.95, 33, 1.694), (0.5, 9, 0.0), (0.9, 10**6, 1.2816)],
)
def test_quantiles_are_those_of_the_table(confidence, num, table):
    assert errors_allowed(confidence, num) == pytest.approx(table, rel=0.01)


def test_one_trace_is_no_evidence():
    verdict = judged(pairs(1, gain=1.0, spread=0.0))

    assert not verdict.passed
    assert "too few held-out traces" in verdict.reason
    assert gain_error(pairs(1, 1.0, 0.0)) is None


def test_no_domain_may_fall_however_much_others_gain():
    gains, falls = pairs(20, 0.6, 0.05), pairs(10, -0.2, 0.05, seed=1)
    figures = {"candidate": 2.4, "incumbent": 2.0, "margin": 1.005, "num_rows": 100}

    verdict = gate(**figures, confidence=0.9, domains={"code": gains, "tales": falls})
    assert (verdict.passed, verdict.kind) == (False, "domain")
    assert "'tales'" in verdict.reason and "'code'" not in verdict.reason
    assert gate(**figures, confidence=0.9, domains={"code": gains, "tales": falls[:1]}).passed, (
        "one trace is no evidence"
    )
    small = pairs(10, -0.02, 0.01, seed=1)
    assert gate(**figures, confidence=0.9, domains={"code": gains, "tales": small}).passed, (
        "less than 3 %"
    )


def test_a_good_candidate_is_seldom_refused_for_a_domain():
    """Better by 5 % on average in each of four domains, whose traces scatter."""
    refused = 0
    for seed in range(1000):
        domains = {str(d): pairs(12, 0.1, 0.15, seed=seed * 10 + d) for d in range(4)}
        verdict = gate(2.1, 2.0, 1.005, 100, confidence=0.9, domains=domains)
        refused += not verdict.passed
    assert refused <= 1


def test_a_verdict_says_what_the_candidate_lacks():
    verdict = gate(1.98, 2.0, 1.005, 100)

    assert verdict.lacks == pytest.approx(2.01 / 1.98 - 1)
    assert gate(1.98 * (1 + verdict.lacks) + 1e-9, 2.0, 1.005, 100).passed
    assert gate(2.5, 2.0, 1.005, 100).lacks is None


def test_a_margin_below_one_lets_worse_candidates_pass_however_unsure():
    assert judged(pairs(8, -0.2, 0.3), margin=0.1).passed


def test_a_reservoir_that_must_shrink_stays_uniform():
    seen = Counter()
    for seed in range(400):
        smaller = add(kept(200, seed=seed), (), recent_traces=5, reservoir_traces=10, seed=seed)
        assert len(smaller.reservoir) == 10 and smaller.recent == tuple(range(195, 200))
        seen.update(trace // 39 for trace in smaller.reservoir)
    assert all(abs(count - 800) < 120 for count in list(seen.values())[:5])
