"""/metrics: the names that panels use, with the engine's figures."""

from __future__ import annotations

import pytest
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.registry import Collector

from serving.http.metrics import families
from serving.requests import EngineFigures

FIGURES = EngineFigures(
    num_running=2,
    num_waiting=3,
    kv_usage=0.25,
    prompt_tokens=100,
    generation_tokens=200,
    cached_prompt_tokens=40,
    num_rounds=50,
    num_draft_tokens=150,
    num_accepted_tokens=90,
    num_accepted_per_pos=(45, 30, 15),
    num_steps=110,
    steps_by_arm={("eagle3", 3): 50, ("none", 0): 60},
    drafter_version=7,
    swaps={"swapped": 7, "rejected": 1, "rolled_back": 2},
    swap_seconds=0.5,
    traces={"queued": 9, "written": 8, "dropped": 1, "rejected": 0},
    capture_rows_dropped=11,
    ignored_calibrations=3,
    policy_failures=4,
    num_corrupted=1,
    extra={"suffix_tokens": 12.0},
)


class Fixed(Collector):
    def collect(self):
        return families(FIGURES, "tiny")


@pytest.fixture(scope="module")
def samples() -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
    registry = CollectorRegistry()
    registry.register(Fixed())
    text = generate_latest(registry).decode()
    return {
        (s.name, tuple(sorted((k, v) for k, v in s.labels.items() if k not in COMMON))): s.value
        for family in text_string_to_metric_families(text)
        for s in family.samples
    }


COMMON = ("model_name", "engine")


@pytest.mark.parametrize(
    ("name", "labels", "value"),
    [
        ("num_requests_running", {}, 2),
        ("num_requests_waiting", {}, 3),
        ("kv_cache_usage_perc", {}, 0.25),
        ("num_preemptions_total", {}, 0),
        ("corrupted_requests_total", {}, 1),
        ("prompt_tokens_total", {}, 100),
        ("generation_tokens_total", {}, 200),
        ("prefix_cache_queries_total", {}, 100),
        ("prefix_cache_hits_total", {}, 40),
        ("spec_decode_num_drafts_total", {}, 50),
        ("spec_decode_num_draft_tokens_total", {}, 150),
        ("spec_decode_num_accepted_tokens_total", {}, 90),
        ("spec_decode_num_accepted_tokens_per_pos_total", {"position": "2"}, 15),
        ("policy_failures_total", {}, 4),
        ("policy_arm_steps_total", {"drafter": "eagle3", "draft_k": "3"}, 50),
        ("drafter_version", {}, 7),
        ("weight_swaps_total", {"result": "rolled_back"}, 2),
        ("ignored_calibrations_total", {}, 3),
        ("weight_swap_seconds_sum", {}, 0.5),
        ("weight_swap_seconds_count", {}, 9),
        ("traces_total", {"result": "dropped"}, 1),
        ("traces_waiting", {}, 0),
        ("capture_rows_dropped_total", {}, 11),
        ("suffix_tokens", {}, 12),
    ],
)
def test_a_figure_is_reported_under_its_name(samples, name, labels, value):
    assert samples[f"slipstream:{name}", tuple(sorted(labels.items()))] == value
