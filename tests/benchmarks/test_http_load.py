"""What is said about a load follows from what its clients saw."""

from __future__ import annotations

from itertools import pairwise

import pytest

from benchmarks.real.http_load import (
    Answer,
    Arrival,
    Client,
    arrivals,
    between_tokens,
    row_of,
    spread_ms,
    turn_of,
)


def test_arrivals_are_a_poisson_process_of_the_rate():
    due = [a.at_s for a in arrivals(rate=50, seconds=200, prompts=["a"], seed=0)]
    waits = [b - a for a, b in pairwise(due)]
    mean = sum(waits) / len(waits)
    variance = sum((w - mean) ** 2 for w in waits) / len(waits)

    assert due == sorted(due)
    assert max(due) < 200
    assert len(due) == pytest.approx(50 * 200, abs=4 * (50 * 200) ** 0.5)
    assert variance == pytest.approx(mean**2, rel=0.1)


def test_both_arms_of_a_turn_meet_the_same_arrivals():
    first = arrivals(rate=5, seconds=10, prompts=["a", "b", "c"], seed=7)

    assert first == arrivals(rate=5, seconds=10, prompts=["a", "b", "c"], seed=7)
    assert first != arrivals(rate=5, seconds=10, prompts=["a", "b", "c"], seed=8)
    assert [a.prompt for a in first[:4]] == ["a", "b", "c", "a"]


def answer(*events: tuple[float, int], error: str | None = None) -> Answer:
    return Answer(0.0, events, error, 2.0)


def test_the_wait_for_an_event_is_shared_by_its_tokens():
    seen = answer((0.5, 1), (0.7, 4), (0.8, 1))

    assert between_tokens(seen) == pytest.approx([0.05] * 4 + [0.1])


def test_nothing_measured_is_none():
    assert spread_ms([]) is None
    assert spread_ms(between_tokens(answer((0.5, 3)))) is None


def test_failed_requests_are_counted_and_no_part_of_the_speed():
    sent = [[Arrival(1.0, "a"), Arrival(3.0, "c")], [Arrival(2.0, "b")]]
    seen = [
        Client(
            [answer((0.5, 10), (1.0, 10)), answer((0.5, 30), error="cut off")], 1.0, 5.0, [0.001]
        ),
        Client([answer((1.0, 20))], 2.0, 5.0, [0.003]),
    ]
    turn = turn_of(sent, seen)

    row = row_of(4.0, "on", [turn])

    assert turn.seconds == pytest.approx(2.5)  # first arrival at 1.0, last token at 3.5
    assert (row["requests"], row["failed"], row["errors"]) == (3, 1, {"cut off": 1})
    assert row["tokens_per_s"] == pytest.approx(40 / 2.5)
    assert row["first_token_ms"]["p50"] == pytest.approx(750)
    assert row["client"]["busiest_cpu_share"] == pytest.approx(0.4)
    assert row["client"]["cpu_us_per_event"] == pytest.approx(3e6 / 4)
