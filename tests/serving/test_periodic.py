"""The periodic log line is computed from two readings of the engine's counters."""

from __future__ import annotations

import logging
import time
from dataclasses import replace

import pytest

from serving.periodic import Window, periodic_stats
from serving.requests import EngineFigures

START = EngineFigures(
    num_running=0,
    num_waiting=0,
    kv_usage=0.0,
    prompt_tokens=1000,
    generation_tokens=500,
    cached_prompt_tokens=200,
    num_rounds=90,
    num_draft_tokens=400,
    num_accepted_tokens=100,
    num_accepted_per_pos=(60, 40),
    num_steps=300,
    steps_by_arm={},
    drafter_version=2,
    swaps={},
    swap_seconds=0.0,
    traces={},
    capture_rows_dropped=0,
    num_request_steps=400,
)


def test_figures_are_of_the_window_and_not_since_the_start():
    after = replace(
        START,
        num_running=3,
        num_waiting=1,
        kv_usage=0.25,
        prompt_tokens=1100,
        cached_prompt_tokens=240,
        generation_tokens=700,
        num_request_steps=480,
        num_draft_tokens=560,
        num_accepted_tokens=220,
        drafter_version=3,
    )

    assert Window(START, after, seconds=10.0).line() == (
        "Avg prompt throughput: 10.0 tokens/s, Avg generation throughput: 20.0 tokens/s, "
        "Running: 3 reqs, Waiting: 1 reqs, KV cache usage: 25.0%, Prefix cache hit rate: 40.0%, "
        "Tokens per step: 2.50, Acceptance rate: 75.0%, Drafter version: 3"
    )


def test_a_rate_of_nothing_is_none_and_not_zero():
    after = replace(START, generation_tokens=510, num_request_steps=410)
    window = Window(START, after, seconds=1.0)

    assert (window.acceptance_rate, window.prefix_cache_hit_rate) == (None, None)
    assert "Acceptance rate: None" in window.line()
    assert Window(START, START, seconds=1.0).tokens_per_step is None


def test_traffic_is_tokens_or_unfinished_requests():
    assert not Window(START, START, 1.0).had_traffic
    assert Window(START, replace(START, prompt_tokens=1001), 1.0).had_traffic
    assert Window(START, replace(START, generation_tokens=501), 1.0).had_traffic
    assert Window(START, replace(START, num_waiting=1), 1.0).had_traffic


@pytest.mark.parametrize(("every_s", "num_lines"), [(0.02, 1), (0.0, 0)])
def test_each_window_with_traffic_is_one_line(
    every_s: float, num_lines: int, caplog: pytest.LogCaptureFixture
):
    caplog.set_level(logging.INFO, logger="serving")
    readings = iter([START, replace(START, generation_tokens=600)])
    last = replace(START, generation_tokens=600)

    with periodic_stats(lambda: next(readings, last), every_s):
        time.sleep(0.3)

    assert len(caplog.records) == num_lines
