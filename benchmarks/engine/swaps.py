"""Drafter swaps under load: swaps are ordered while the engine decodes on its own thread, as in a
server. The watcher is off, so that nothing else swaps.

Two series, each under its own load. In the first, two versions are ordered in turn: each order
reads its bundle, verifies every byte, stages it on the device, and takes effect between two steps.
The second is the same load without swaps.
"""

from __future__ import annotations

import itertools
import statistics
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from benchmarks.harness.engines import Built, engine_of
from benchmarks.harness.loops import random_prompts
from benchmarks.harness.policy import PolicySwitch
from benchmarks.harness.results import Report
from benchmarks.ops.timing import replayed_ms
from serving.requests import Output, Request, SamplingParams

DRAFT_K = 4
_NUM_PROMPT = 128
_QUIET_S = 20.0
"""Maximum length of the series without swaps."""
_NEIGHBOURS = 32
"""Block size: a wait is compared with the median of its own block and the blocks beside it."""


def measure(
    report: Report, device: torch.device, shape: str, batch: int, num_swaps: int, interval_s: float
) -> None:
    """Add the ``swaps`` row."""
    chosen = [
        f"engine.max_batch={batch}",
        f"engine.max_model_len={8192 if device.type == 'cuda' else 1024}",
        f"drafter.max_draft={DRAFT_K}",
        f"policy.draft_k={DRAFT_K}",
    ]
    with engine_of(shape, device, chosen, num_versions=2) as built:
        built.service.start()
        try:
            found = swap_often(report, built, batch, num_swaps, interval_s)
        finally:
            built.service.stop()
        if device.type == "cuda":
            found["copies_ms"] = copies_ms(built.drafter_bytes)
        report.add("swaps", {"shape": shape, "batch": batch, "draft_k": DRAFT_K, **found})


def copies_ms(num_bytes: int) -> float:
    """Milliseconds of the two device copies of a swap alone."""
    current, former, staged = torch.zeros((3, num_bytes), dtype=torch.uint8, device="cuda")

    def swap() -> None:
        former.copy_(current)
        current.copy_(staged)

    return replayed_ms(swap)


@dataclass(slots=True)
class _Client:
    """Sends one request after another, each as long as the engine allows."""

    prompt: tuple[int, ...]
    news_s: list[float]
    """Times at which it received tokens."""


class Traffic:
    """Keeps ``batch`` requests in flight and counts how they end."""

    def __init__(self, built: Built, batch: int) -> None:
        self._engine = built.engine
        vocab_size = built.engine.inbox.limits.vocab_size
        self.clients = [_Client(p, []) for p in random_prompts(batch, _NUM_PROMPT, vocab_size)]
        self.num_finished = 0
        self.num_failed = 0
        self._is_over = threading.Event()
        for number in range(batch):
            self._ask(number, 0)

    def _ask(self, number: int, again: int) -> None:
        client = self.clients[number]
        room = self._engine.inbox.limits.max_model_len - _NUM_PROMPT
        sampling = SamplingParams(temperature=0.0, max_tokens=room, ignore_eos=True)

        def take(output: Output) -> None:
            client.news_s.append(time.perf_counter())
            if output.finish_reason is None:
                return
            self.num_failed += output.finish_reason == "error"
            if not self._is_over.is_set():
                self.num_finished += 1
                self._ask(number, again + 1)

        request = Request(f"{number}-{again}", client.prompt, sampling, capture=False)
        self._engine.inbox.submit(request, take)

    def wait_until_all_decode(self, num_news: int, timeout_s: float) -> None:
        end = time.monotonic() + timeout_s
        while min(len(client.news_s) for client in self.clients) < num_news:
            if time.monotonic() > end:
                raise RuntimeError("the requests did not begin to decode in time")
            time.sleep(0.01)

    def end(self) -> None:
        """Cancel all requests."""
        self._is_over.set()
        self._engine.inbox.cancel_all()
        end = time.monotonic() + 10
        while self._engine.inbox.num_inflight() and time.monotonic() < end:
            time.sleep(0.01)


@dataclass(frozen=True, slots=True)
class Series:
    """Successive swaps and their time window; times from ``time.perf_counter``."""

    begin_s: float
    end_s: float
    order_s: tuple[float, ...]
    """Seconds from each order until its weights were in use."""
    news_s: tuple[tuple[float, ...], ...]
    """Times at which each request received tokens."""


def swap_often(
    report: Report, built: Built, batch: int, num_swaps: int, interval_s: float
) -> dict[str, Any]:
    """A load with a swap every ``interval_s``, then the same load without swaps; each starts with
    fresh requests, so that contexts are equally long in both."""
    swapper = built.service.swapper
    assert swapper is not None
    for version in (0, 1, 0):  # fills the file cache and allocates the previous version's buffer
        swapper.swap(version)
    most_s = report.left_s - _QUIET_S - 20
    swapping, load = under_load(report, built, batch, num_swaps, interval_s, most_s)
    found = figures_of(swapping, built.policy)
    quiet_s = min(_QUIET_S, swapping.end_s - swapping.begin_s)
    quiet, _ = under_load(report, built, batch, 0, interval_s, quiet_s)
    without = figures_of(quiet, built.policy)
    return {
        "asked_swaps": num_swaps,
        "drafter_bytes": built.drafter_bytes,
        "requests": len(load.clients),
        "finished_requests": load.num_finished,
        "failed_requests": load.num_failed,
        **found,
        "without_swaps": without,
    }


def under_load(
    report: Report, built: Built, batch: int, num_swaps: int, interval_s: float, most_s: float
) -> tuple[Series, Traffic]:
    """Order versions 0 and 1 in turn while fresh requests decode; if ``num_swaps`` is 0, let them
    decode for ``most_s``."""
    built.policy.play()
    traffic = Traffic(built, batch)
    try:
        traffic.wait_until_all_decode(20, 300)
        begin_s = time.perf_counter()
        order_s = swap_in_turn(report, built, num_swaps, interval_s, most_s)
        if not num_swaps:
            time.sleep(most_s)
        end_s = time.perf_counter()
    finally:
        traffic.end()
    news = tuple(tuple(client.news_s) for client in traffic.clients)
    return Series(begin_s, end_s, tuple(order_s), news), traffic


def swap_in_turn(
    report: Report, built: Built, num_swaps: int, interval_s: float, most_s: float
) -> list[float]:
    """Seconds of each order; stops when the time is used up."""
    begin_s, swapper = time.perf_counter(), built.service.swapper
    assert swapper is not None
    other = 0 if built.service.drafter_status()["version"] else 1
    order_s: list[float] = []
    while len(order_s) < num_swaps and report.left_s > 5:
        ordered_s = time.perf_counter()
        if ordered_s - begin_s > most_s:
            break
        swapper.swap((other + len(order_s)) % 2)
        order_s.append(time.perf_counter() - ordered_s)
        time.sleep(interval_s)
    return order_s


def figures_of(series: Series, policy: PolicySwitch) -> dict[str, Any]:
    """Duration of the swaps of a series, and their effect on steps and requests."""
    found: dict[str, Any] = {"num_swaps": len(series.order_s)}
    if series.order_s:
        found["order_to_swapped_median_ms"] = statistics.median(series.order_s) * 1e3
    return {
        **found,
        **step_times(policy.planned_s, policy.swapped, series.begin_s, series.end_s),
        **slowest_waits(series.news_s, series.begin_s, series.end_s),
        "seconds": series.end_s - series.begin_s,
    }


def step_times(
    begun_s: Sequence[float], swapped: Sequence[int], begin: float, end: float
) -> dict[str, Any]:
    """Median milliseconds of the steps with and without a swap, within a window."""
    with_swap = set(swapped)
    both: dict[bool, list[float]] = {True: [], False: []}
    for number, (started, following) in enumerate(itertools.pairwise(begun_s)):
        if begin <= started and following <= end:
            both[number in with_swap].append((following - started) * 1e3)
    return {
        "steps_with_swap": len(both[True]),
        "steps_without_swap": len(both[False]),
        "step_with_swap_ms": statistics.median(both[True]) if both[True] else None,
        "step_without_swap_ms": statistics.median(both[False]) if both[False] else None,
        "slowest_step_ms": max(both[True] + both[False], default=None),
    }


def slowest_waits(news_s: Sequence[Sequence[float]], begin: float, end: float) -> dict[str, Any]:
    """Each request's longest wait over the median of neighbouring waits. The median of all waits
    would not do: waits grow with the contexts.

    Args:
        news_s: times at which each request received tokens.

    Returns:
        ``slowest_wait_over_median``: the largest such ratio of any request; 3 means two steps
        longer. ``None`` if no request received tokens twice.
    """
    worst, medians = [], []
    for stamps in news_s:
        kept = [stamp for stamp in stamps if begin <= stamp <= end]
        waits = [after - before for before, after in itertools.pairwise(kept)]
        if waits:
            medians.append(statistics.median(waits))
            worst.append(max(over_neighbours(waits)))
    return {
        "median_wait_ms": statistics.median(medians) * 1e3 if medians else None,
        "slowest_wait_over_median": max(worst, default=None),
        "requests_slowed_by_more_than_one_step": sum(ratio > 2 for ratio in worst),
    }


def over_neighbours(waits: Sequence[float]) -> list[float]:
    """Each wait divided by the median of those around it."""
    found = []
    for start in range(0, len(waits), _NEIGHBOURS):
        around = waits[max(0, start - _NEIGHBOURS) : start + 2 * _NEIGHBOURS]
        median = statistics.median(around)
        found += [wait / median for wait in waits[start : start + _NEIGHBOURS]]
    return found
