"""/metrics: vLLM's names with our prefix, so that existing panels carry over; counters, not ratios.

Acceptance rate is rate(spec_decode_num_accepted_tokens_total) over
rate(spec_decode_num_draft_tokens_total); mean acceptance length is 1 + accepted tokens over
spec_decode_num_drafts_total. No label comes from a request.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import accumulate
from typing import get_args

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    SummaryMetricFamily,
)
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from serving.capture.recorder import num_waiting
from serving.http.tallies import Tallies
from serving.requests import EngineFigures, FinishReason

PREFIX = "slipstream:"
CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"

_LABELS = ("model_name", "engine")
_TTFT_S = (
    *(0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75),
    *(1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0, 160.0),
)
_ITL_S = (
    *(0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75),
    *(1.0, 2.5, 5.0),
)
_E2E_S = (
    *(0.05, 0.1, 0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0),
    *(60.0, 120.0, 240.0),
)


@dataclass(frozen=True, slots=True)
class _Histogram:
    """A histogram in ``Tallies``: one number for each bucket and one beyond them, then the sum."""

    name: str
    text: str
    bounds: tuple[float, ...]
    """Upper bounds of the buckets, inclusive."""
    first: int
    """Its first number in the tallies."""

    @property
    def end(self) -> int:
        """The first number behind it."""
        return self.first + len(self.bounds) + 2

    def observe(self, tallies: Tallies, value: float, count: int = 1) -> None:
        tallies.add(self.first + bisect_left(self.bounds, value), count)
        tallies.add(self.end - 1, value * count)

    def family(self, totals: list[float], labels: list[str]) -> Metric:
        family = HistogramMetricFamily(PREFIX + self.name, self.text, labels=_LABELS)
        counts = accumulate(totals[self.first : self.end - 1])
        names = [str(bound) for bound in self.bounds] + ["+Inf"]
        family.add_metric(labels, list(zip(names, counts, strict=True)), totals[self.end - 1])
        return family


_TTFT = _Histogram(
    "time_to_first_token_seconds", "From submission to the first token.", _TTFT_S, first=0
)
_ITL = _Histogram(
    "inter_token_latency_seconds",
    "Time of each further token; tokens committed together share it evenly.",
    _ITL_S,
    first=_TTFT.end,
)
_E2E = _Histogram(
    "e2e_request_latency_seconds", "From submission to the last token.", _E2E_S, first=_ITL.end
)
_REASONS: tuple[FinishReason, ...] = get_args(FinishReason)
NUM_TALLIES = _E2E.end + len(_REASONS)
"""Numbers that HTTP itself counts."""


class ChoiceClock:
    """Latencies of one choice: first token, between tokens, end to end."""

    def __init__(self, metrics: Metrics, submitted_s: float) -> None:
        self._metrics = metrics
        self._submitted_s = submitted_s
        self._last_s: float | None = None

    def tick(self, at_s: float, num_tokens: int) -> None:
        """Record tokens that came together. Each of m tokens counts 1/m of the time, so that the
        histogram's sum is wall time and its count is tokens."""
        if num_tokens == 0:
            return
        tallies = self._metrics.tallies
        if self._last_s is None:
            _TTFT.observe(tallies, at_s - self._submitted_s)
        else:
            _ITL.observe(tallies, (at_s - self._last_s) / num_tokens, num_tokens)
        self._last_s = at_s

    def finish(self, at_s: float, reason: FinishReason) -> None:
        _E2E.observe(self._metrics.tallies, at_s - self._submitted_s)
        self._metrics.count_finished(reason)


class Metrics:
    """What HTTP counts, in all its processes, beside the figures of the engine."""

    def __init__(self, model_name: str, tallies: Tallies | None = None) -> None:
        """
        Args:
            tallies: of ``NUM_TALLIES`` numbers; ``None``: this app's own.
        """
        self._model_name = model_name
        self.tallies = Tallies.private(NUM_TALLIES) if tallies is None else tallies

    def start_clock(self, submitted_s: float) -> ChoiceClock:
        return ChoiceClock(self, submitted_s)

    def count_finished(self, reason: FinishReason) -> None:
        self.tallies.add(_E2E.end + _REASONS.index(reason), 1)

    def render(self, figures: EngineFigures) -> bytes:
        """Everything in Prometheus' text format."""
        registry = CollectorRegistry()
        registry.register(_Once([*self._own(), *families(figures, self._model_name)]))
        return generate_latest(registry)

    def _own(self) -> Iterator[Metric]:
        common, totals = [self._model_name, "0"], self.tallies.totals()
        for histogram in (_TTFT, _ITL, _E2E):
            yield histogram.family(totals, common)
        finished = CounterMetricFamily(
            f"{PREFIX}request_success",
            "Choices that ended, by reason.",
            labels=(*_LABELS, "finished_reason"),
        )
        for reason, count in zip(_REASONS, totals[_E2E.end :], strict=True):
            finished.add_metric([*common, reason], count)
        yield finished


class _Once(Collector):
    """Families of one scrape."""

    def __init__(self, families: list[Metric]) -> None:
        self._families = families

    def collect(self) -> Iterator[Metric]:
        yield from self._families


def families(figures: EngineFigures, model_name: str) -> Iterator[Metric]:
    """One metric family for each figure, labelled with the model's name."""
    common = [model_name, "0"]

    def gauge(name: str, text: str, value: float) -> Metric:
        return gauges(name, text, (), {(): value})

    def gauges(
        name: str, text: str, labels: tuple[str, ...], values: dict[tuple[str, ...], float]
    ) -> Metric:
        family = GaugeMetricFamily(PREFIX + name, text, labels=(*_LABELS, *labels))
        for extra, value in values.items():
            family.add_metric([*common, *extra], value)
        return family

    def counter(name: str, text: str, value: float) -> Metric:
        return counters(name, text, (), {(): value})

    def counters(
        name: str, text: str, labels: tuple[str, ...], values: dict[tuple[str, ...], float]
    ) -> Metric:
        family = CounterMetricFamily(PREFIX + name, text, labels=(*_LABELS, *labels))
        for extra, value in values.items():
            family.add_metric([*common, *extra], value)
        return family

    yield gauge("num_requests_running", "Requests in the batch.", figures.num_running)
    yield gauge("num_requests_waiting", "Requests not yet admitted.", figures.num_waiting)
    yield gauge("kv_cache_usage_perc", "Share of KV pages in use, 0 to 1.", figures.kv_usage)
    yield counter("num_preemptions", "Requests put back to waiting.", 0)
    yield counter(
        "corrupted_requests", "Requests that ended in NaN or infinity.", figures.num_corrupted
    )
    yield counter("prompt_tokens", "Prompt tokens.", figures.prompt_tokens)
    yield counter("generation_tokens", "Completion tokens.", figures.generation_tokens)
    yield counter("prefix_cache_queries", "Prompt tokens looked up.", figures.prompt_tokens)
    yield counter("prefix_cache_hits", "Prompt tokens found.", figures.cached_prompt_tokens)
    yield counter("engine_steps", "Passes of the target over the batch.", figures.num_steps)
    yield counter("spec_decode_num_drafts", "Rounds that proposed.", figures.num_rounds)
    yield counter("spec_decode_num_draft_tokens", "Proposed.", figures.num_draft_tokens)
    yield counter("spec_decode_num_accepted_tokens", "Accepted.", figures.num_accepted_tokens)
    yield counters(
        "spec_decode_num_accepted_tokens_per_pos",
        "Accepted, by position in the draft.",
        ("position",),
        {(str(place),): n for place, n in enumerate(figures.num_accepted_per_pos)},
    )
    yield counters(
        "policy_arm_steps",
        "Steps decoded with each arm of the policy.",
        ("drafter", "draft_k"),
        {(drafter, str(k)): n for (drafter, k), n in figures.steps_by_arm.items()},
    )
    yield counter(
        "policy_failures",
        "Steps decoded plainly, or not learned from, because the policy failed.",
        figures.policy_failures,
    )
    yield counters(
        "drafter_rounds",
        "Rounds of requests in which each drafter proposed.",
        ("drafter",),
        {(kind,): counts.rounds for kind, counts in figures.drafters.items()},
    )
    yield counters(
        "drafter_draft_tokens",
        "Proposed, by drafter.",
        ("drafter",),
        {(kind,): counts.tokens for kind, counts in figures.drafters.items()},
    )
    yield counters(
        "drafter_accepted_tokens",
        "Accepted, by drafter.",
        ("drafter",),
        {(kind,): counts.accepted for kind, counts in figures.drafters.items()},
    )
    yield gauge("drafter_version", "Version in use.", figures.drafter_version)
    yield gauges(
        "drafter_versions",
        "Version in use of each drafter that learns, and of KIND:former.",
        ("drafter",),
        {(kind,): version for kind, version in figures.versions.items()},
    )
    yield counters(
        "weight_swaps",
        "Versions offered to the engine, by outcome.",
        ("result",),
        {(result,): n for result, n in figures.swaps.items()},
    )
    yield counters(
        "weight_refusals",
        "Versions that were not taken, by reason.",
        ("reason",),
        {(reason,): n for reason, n in figures.refusals.items()},
    )
    yield counter(
        "ignored_calibrations",
        "Versions whose calibration was malformed, so that the policy ignored it.",
        figures.ignored_calibrations,
    )
    copies = SummaryMetricFamily(
        f"{PREFIX}weight_swap_seconds", "Time of the copies into the drafter.", labels=_LABELS
    )
    copies.add_metric(common, _num_copies(figures.swaps), figures.swap_seconds)
    yield copies
    yield gauge(
        "target_version", "How often the target's weights were replaced.", figures.target_version
    )
    yield counters(
        "target_updates",
        "Orders to replace the target's weights, by outcome.",
        ("result",),
        {(result,): n for result, n in figures.target_updates.items()},
    )
    yield counter(
        "target_update_seconds", "Time that steps waited for it.", figures.target_update_seconds
    )
    yield counter(
        "target_untraced_requests",
        "Requests without a trace because the target's weights changed during their answer.",
        figures.target_untraced,
    )
    yield counters(
        "traces",
        "Traces, by outcome.",
        ("result",),
        {(result,): n for result, n in figures.traces.items()},
    )
    if figures.traces:
        yield gauge(
            "traces_waiting",
            "Traces that were queued, less those written, dropped, failed, withheld and deleted.",
            num_waiting(figures.traces),
        )
    yield counter("capture_rows_dropped", "Hidden rows not kept.", figures.capture_rows_dropped)
    for name, value in sorted(figures.extra.items()):
        yield gauge(name, _EXTRA.get(name, "A figure of the engine."), value)


_EXTRA = {
    "decode_seconds": "Time of the steps for which that of a plain step is known.",
    "plain_seconds": "Time that plain decoding would have taken for their tokens.",
    "saved_seconds": "The difference; below 0 if drafting has cost time.",
    "learning_seconds": "Time that learning took up to the version in use, says its trainer.",
    "payback_ratio": "saved_seconds over learning_seconds.",
}


def _num_copies(swaps: dict[str, int]) -> int:
    return swaps.get("swapped", 0) + swaps.get("rolled_back", 0)
