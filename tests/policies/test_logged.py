"""What a log says about every K is exact where a round showed it, and marked as a guess beyond."""

from __future__ import annotations

import dataclasses
import random

import numpy as np
import pytest

from buffer.records import Sampling
from policies.costs import times_of
from policies.groups import group_of
from policies.logged import (
    LoggedRow,
    LoggedStep,
    drafters_of,
    hazards_of,
    of_drafter,
    of_newest_versions,
    scores_of,
    steps_of,
)
from tests.policies.logs import (
    DRAFTER,
    HAZARDS,
    MAX_DRAFT,
    always,
    any_k,
    expected_tokens,
    log,
    step_s,
    traces_of,
)


def step(k, *rows, batch=None, drafter=DRAFTER):
    kept = tuple(LoggedRow(*row) for row in rows)
    return LoggedStep(drafter, k, batch or len(rows), 1.0, "", 0, step_s(k, len(rows)), kept)


def test_steps_come_back_from_their_traces_in_order():
    steps = log(120, any_k, batches=(1, 3))

    found = steps_of(traces_of(steps))

    assert [dataclasses.replace(one, context=None) for one in found] == [
        dataclasses.replace(one, drafter="none" if not one.draft_k else DRAFTER) for one in steps
    ]
    assert found[0].context == 2
    assert found[1].context == 2 + 1 + steps[0].rows[0].num_accepted


def test_rows_are_told_apart_by_the_temperature_and_the_tenant_of_their_requests():
    traces = [
        dataclasses.replace(trace, tenant=tenant, sampling=Sampling({"temperature": temperature}))
        for trace, tenant, temperature in zip(
            traces_of(log(3, any_k, batches=(3,))), ("default", "ours", "ours"), (0.0, 1.0, 0.0),
            strict=True,
        )
    ]  # fmt: skip
    (one, *_) = steps_of(traces)
    assert one.groups == bytes((group_of(0, 0.0), group_of(1, 1.0), group_of(1, 0.0)))
    assert dataclasses.replace(one, batch=5).groups == one.groups + one.groups[:2]


def test_traces_that_number_no_steps_are_put_together_by_the_time_of_the_step():
    steps = log(100, any_k, batches=(2, 4))
    old = [
        dataclasses.replace(
            trace,
            rounds=type(trace.rounds).of(
                dataclasses.replace(one, step=None, policy="") for one in trace.rounds
            ),
        )
        for trace in traces_of(steps)
    ]

    found = steps_of(old)

    assert sorted(one.step_s for one in found) == sorted(one.step_s for one in steps)
    assert {one.step_s: one.rows for one in found} == {one.step_s: one.rows for one in steps}


def test_every_k_up_to_the_one_that_ran_is_scored_exactly():
    """And every longer one where a token was rejected, or where the request could use no more."""
    hazards = np.full(MAX_DRAFT, 0.5)
    scores = scores_of([step(4, (4, 2), (4, 0), (2, 2))], hazards)

    kept = [min(2, k) + 0 + min(2, k) for k in range(MAX_DRAFT + 1)]
    assert scores.tokens[0].tolist() == [3 + one for one in kept]
    assert not scores.extrapolated.any()


def test_longer_k_after_a_round_that_kept_all_is_extrapolated_by_hazards():
    hazards = np.array([0.9, 0.8, 0.5, 0.4])
    scores = scores_of([step(2, (2, 2)), step(0, (0, 0))], hazards)

    assert scores.tokens[0].tolist() == pytest.approx([1, 2, 3, 3.5, 3.7])
    assert scores.extrapolated[0].tolist() == pytest.approx([0, 0, 0, 0.5, 0.7])
    assert scores.tokens[1].tolist() == pytest.approx([1, 1.9, 2.62, 2.98, 3.124])
    assert scores.extrapolated[1].tolist() == pytest.approx(scores.tokens[1] - 1)


def test_requests_without_a_trace_count_like_the_others():
    scores = scores_of([step(1, (1, 1), (1, 0), batch=8)], np.array([0.5]))

    assert scores.tokens[0].tolist() == [8, 12]


def test_hazards_are_those_of_the_drafter_although_long_drafts_are_censored():
    """Rounds with few tokens say nothing of deep positions. Counting them as rejections there, or
    acceptance over all drafted tokens, would be far off."""
    steps = log(6000, any_k, batches=(4,))
    hazards, reached = hazards_of(steps, MAX_DRAFT)

    error = np.sqrt(np.array(HAZARDS) * (1 - np.array(HAZARDS)) / reached)
    assert (np.abs(hazards - HAZARDS) < 4 * error).all()
    assert (np.diff(reached) < 0).all()


def test_scores_of_short_drafts_have_the_mean_of_long_ones():
    """Extrapolation is right on average: drafts of 3 tell what 8 would bring."""
    short = log(4000, lambda rng, batch: (3, 1.0), batches=(4,))
    hazards = np.array(HAZARDS)

    means = scores_of(short, hazards).tokens.mean(axis=0) / 4

    wanted = [expected_tokens(k) for k in range(MAX_DRAFT + 1)]
    assert means.tolist() == pytest.approx(wanted, rel=0.03)


def test_positions_that_no_round_reached_are_a_little_less_likely_than_the_one_before():
    hazards, reached = hazards_of([step(2, (2, 2), (2, 1))], 4)

    assert reached.tolist() == [2, 2, 0, 0]
    assert hazards.tolist() == pytest.approx([1, 0.5, 0.5 * 0.97, 0.5 * 0.97**2])


def test_a_log_without_drafts_cannot_be_scored():
    with pytest.raises(ValueError, match="no round of these traces drafted anything"):
        hazards_of([step(0, (0, 0), drafter="none")], 4)


def test_steps_of_other_drafters_say_nothing():
    plain = step(0, (0, 0), drafter="none")
    unmatched = step(4, (0, 0), drafter="none")
    assert of_drafter([step(2, (2, 1)), step(2, (2, 1), drafter="other"), plain, unmatched],
                      DRAFTER) == [step(2, (2, 1)), plain]  # fmt: skip


def picked(trace, drafter, **changes):
    """The trace of a request for which a mix picked this drafter, whose draft ids are all kept."""
    rounds = (
        dataclasses.replace(
            one, drafter=drafter, propensity=one.propensity * 0.9, reason="best",
            num_accepted=len(one.draft_ids), p_logp=(-0.5,) * len(one.draft_ids), **changes,
        )
        for one in trace.rounds
    )  # fmt: skip
    return dataclasses.replace(trace, rounds=type(trace.rounds).of(rounds))


def test_rows_of_one_drafter_in_a_step_of_several_are_not_the_others():
    """Neither what they keep nor what the step takes."""
    alone = steps_of(traces_of(log(200, always(4), batches=(2,))))
    mixed = [
        picked(trace, "suffix", version=7) if at % 2 else trace
        for at, trace in enumerate(traces_of(log(200, always(4), batches=(2,), seed=1)))
    ]
    mixed = [dataclasses.replace(trace, epoch=2) for trace in mixed]
    steps = [*alone, *steps_of(mixed)]

    assert {one.drafter for one in steps} == {DRAFTER, f"{DRAFTER}+suffix"}
    assert sum(one.is_mixed for one in steps) == 200
    assert drafters_of(steps) == [DRAFTER]
    assert of_drafter(steps, DRAFTER) == alone
    assert times_of(steps) == times_of(alone)


@pytest.mark.parametrize(("batch", "is_mixed"), [(1, False), (2, True)])
def test_a_pick_for_one_request_is_the_decision_of_its_step(batch, is_mixed):
    """Of several requests, others may have got another drafter, also where no trace tells."""
    traces = traces_of(log(50, always(4), batches=(batch,)))[:1]
    steps = steps_of([picked(trace, "suffix") for trace in traces])
    assert {(one.drafter, one.is_mixed, one.propensity) for one in steps} == {
        ("suffix", is_mixed, 0.9)
    }
    assert len(of_drafter(steps, "suffix")) == (0 if is_mixed else len(steps))
    assert drafters_of(steps) == ([] if is_mixed else ["suffix"])


def test_a_fit_uses_the_newest_versions_that_have_drafted_enough():
    """And what was decoded plainly since the first of their steps."""
    versions = [1] * 40 + [2] * 40 + [3] * 20
    steps = [
        dataclasses.replace(one, version=version)
        for one, version in zip(log(100, always(2)), versions, strict=True)
    ]
    plain = [dataclasses.replace(step(0, (0, 0), drafter="none"), version=v) for v in (1, 2, 3)]
    steps = [plain[0], *steps[:40], *steps[40:60], plain[1], *steps[60:], plain[2]]

    newest, which = of_newest_versions(steps, DRAFTER, 20)
    assert (newest, which) == ([*steps[82:]], (3, 3))
    newest, which = of_newest_versions(steps, DRAFTER, 21)
    assert (newest, which) == ([*steps[41:]], (2, 3))
    assert of_newest_versions(steps, DRAFTER, 1000) == (steps[1:], (1, 3))
    with pytest.raises(ValueError, match="no step was drafted by 'other'"):
        of_newest_versions(steps, "other", 1)


def test_any_k_is_as_likely_in_the_logs_of_these_tests():
    rng = random.Random(0)
    assert {any_k(rng, 1)[0] for _ in range(500)} == set(range(MAX_DRAFT + 1))
