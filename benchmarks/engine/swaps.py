"""Swaps of a drafter under load: orders to ``Service.swap`` while the engine decodes on its own
thread, as in a server. The watcher is off, so that nothing else swaps.

Three series, one after the other, each under a load of its own. Many swaps from the order on a
bundle that is staged already: what the engine's thread and the stream do, without reading, checking
and staging a bundle, which take another thread up to seconds and so are done once for each of two
versions. The same load without a swap. Then some tens of swaps as a server makes them,
``unpatched``: every order reads its bundle from the disk (or what the system holds of it in
memory), checks it to the last byte and stages it on the device, while requests decode.
"""

from __future__ import annotations

import gc
import itertools
import statistics
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any
from unittest import mock

import torch

from benchmarks.engine.engines import Made, Place, engine_of
from benchmarks.engine.load import random_prompts
from benchmarks.engine.report import Report
from buffer.interface import WeightsStore
from serving.requests import Output, Request, SamplingParams
from serving.swap import swapper as swapping_thread
from serving.swap.flat_weights import Expected, FlatWeights, Staged
from serving.swap.swapper import Swapper

DRAFT_K = 4
_NUM_PROMPT = 128
_NUM_UNPATCHED = 30
_UNPATCHED_S = 60.0
"""No further bundle is read after so long."""
_QUIET_S = 20.0
"""Most of the series without swaps."""
_NEIGHBOURS = 32
"""Waits whose median, with as many before and after them, they are judged by."""


def measure(
    report: Report, place: Place, shape: str, batch: int, num_swaps: int, interval_s: float
) -> None:
    """Row ``swaps``."""
    chosen = {
        "engine": {"max_batch": batch, "max_model_len": 8192 if place.is_gpu else 1024},
        "drafter": {"max_draft": DRAFT_K},
        "policy": {"kind": "fixed", "draft_k": DRAFT_K},
    }
    with engine_of(shape, place, chosen, num_versions=2) as made:
        made.service.start()
        try:
            found = swap_often(report, made, batch, num_swaps, interval_s)
        finally:
            made.service.stop()
        report.add("swaps", {"shape": shape, "batch": batch, "draft_k": DRAFT_K, **found})


@contextmanager
def bundles_stay_loaded() -> Iterator[None]:
    """A bundle that was read, checked and staged once is not again: an order begins behind that."""
    load, kept = swapping_thread.load_bundle, {}

    def load_once(
        store: WeightsStore, version: int, weights: FlatWeights, expected: Expected
    ) -> Staged:
        if version not in kept:
            staged = load(store, version, weights, expected)
            kept[version] = replace(staged, flat=staged.flat.clone())  # its own place is used again
            if staged.flat.is_cuda:
                torch.cuda.current_stream().synchronize()
        return kept[version]

    with mock.patch.object(swapping_thread, "load_bundle", load_once):
        yield


class Watched:
    """Stands in the engine's place between steps: notes when steps begin and times swaps."""

    def __init__(self, made: Made) -> None:
        swapper = made.service.swapper
        assert swapper is not None
        self._swapper: Swapper = swapper
        self._is_gpu = made.place.is_gpu
        self.begun_s: list[float] = []
        """When each step began."""
        self.swapped: list[int] = []
        """Steps that began with a swap."""
        self._events: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []
        self._host_s: list[float] = []

    def between_steps(self) -> None:
        started = time.perf_counter()
        before = self._swapper.counts()["swapped"]
        begin = end = None
        if self._is_gpu:
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
        self._swapper.between_steps()
        if self._swapper.counts()["swapped"] > before:
            if begin is not None and end is not None:
                end.record()
                self._events.append((begin, end))
            self._host_s.append(time.perf_counter() - started)
            self.swapped.append(len(self.begun_s))
        self.begun_s.append(started)

    def stream_s(self) -> list[float]:
        """Time of each swap on the stream; on a CPU, that of the engine's thread."""
        if not self._is_gpu:
            return self._host_s
        torch.cuda.synchronize()
        return [begin.elapsed_time(end) / 1e3 for begin, end in self._events]


@dataclass(slots=True)
class _Client:
    """One request after another, each as long as the engine allows."""

    prompt: tuple[int, ...]
    news_s: list[float]
    """When it was told of tokens."""


class Traffic:
    """``batch`` requests always in flight, and what became of them."""

    def __init__(self, made: Made, batch: int) -> None:
        self._service = made.service
        vocab_size = made.service.model.vocab_size
        self.clients = [_Client(p, []) for p in random_prompts(batch, _NUM_PROMPT, vocab_size)]
        self.num_finished = 0
        self.num_failed = 0
        self._is_over = threading.Event()
        for number in range(batch):
            self._ask(number, 0)

    def _ask(self, number: int, again: int) -> None:
        client = self.clients[number]
        room = self._service.model.max_model_len - _NUM_PROMPT
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
        self._service.inbox.submit(request, take)

    def wait_until_all_decode(self, num_news: int, timeout_s: float) -> None:
        end = time.monotonic() + timeout_s
        while min(len(client.news_s) for client in self.clients) < num_news:
            if time.monotonic() > end:
                raise RuntimeError("the requests did not begin to decode in time")
            time.sleep(0.01)

    def end(self) -> None:
        """Cancel all."""
        self._is_over.set()
        self._service.engine.cancel_all()
        end = time.monotonic() + 10
        while self._service.inbox.num_inflight() and time.monotonic() < end:
            time.sleep(0.01)


@dataclass(frozen=True, slots=True)
class Series:
    """Swaps one after another, and the window that they lie in; times by ``time.perf_counter``."""

    begin_s: float
    end_s: float
    order_s: tuple[float, ...]
    """From each order until its weights were in force."""
    news_s: tuple[tuple[float, ...], ...]
    """When each request was told of tokens."""


@dataclass(slots=True)
class Collections:
    """Runs of Python's garbage collector, during which no thread of the process does anything."""

    runs: list[tuple[int, float, float]] = field(default_factory=list)
    """Generation, begin and end."""
    _begun_s: float = 0.0

    def __call__(self, phase: str, info: dict[str, Any]) -> None:
        if phase == "start":
            self._begun_s = time.perf_counter()
        else:
            self.runs.append((info["generation"], self._begun_s, time.perf_counter()))

    @contextmanager
    def noted(self) -> Iterator[None]:
        gc.callbacks.append(self)
        try:
            yield
        finally:
            gc.callbacks.remove(self)

    def figures(self, begin: float, end: float) -> dict[str, Any]:
        """How often it ran within a window, and its longest run, by generation."""
        found: dict[str, Any] = {}
        for generation in range(3):
            ms = [
                1e3 * (to - at) for g, at, to in self.runs if g == generation and begin <= at < end
            ]
            found[f"generation_{generation}"] = {"runs": len(ms), "longest_ms": max(ms, default=0)}
        return found


def swap_often(
    report: Report, made: Made, batch: int, num_swaps: int, interval_s: float
) -> dict[str, Any]:
    """A load with a swap every ``interval_s``, the same without swaps, and with some that read
    their bundles; each begins anew, so that contexts are as long in all of them."""
    service = made.service
    watched = Watched(made)
    service.engine.between_steps = watched.between_steps
    collections = Collections()
    with collections.noted():
        with bundles_stay_loaded():
            for version in (0, 1, 0):  # reads both, and makes the buffer of the former one
                service.swapper.swap(version)
            num_before = len(watched.swapped)
            kept, load = under_load(report, made, batch, num_swaps, interval_s, report.left_s - 60)
        quiet_s = min(_QUIET_S, kept.end_s - kept.begin_s)
        quiet, _ = under_load(report, made, batch, 0, interval_s, quiet_s)
        read, _ = under_load(report, made, batch, _NUM_UNPATCHED, interval_s, _UNPATCHED_S)
    stream_ms = [s * 1e3 for s in watched.stream_s()[num_before:]]
    num_kept = len(kept.order_s)

    def figures(series: Series, of_stream_ms: Sequence[float]) -> dict[str, Any]:
        found = figures_of(series, of_stream_ms, watched)
        return {**found, "collector": collections.figures(series.begin_s, series.end_s)}

    return {
        "asked_swaps": num_swaps,
        "drafter_bytes": made.drafter_bytes,
        "requests": len(load.clients),
        "finished_requests": load.num_finished,
        "failed_requests": load.num_failed,
        **figures(kept, stream_ms[:num_kept]),
        "without_swaps": figures(quiet, []),
        "unpatched": figures(read, stream_ms[num_kept:]),
    }


def under_load(
    report: Report, made: Made, batch: int, num_swaps: int, interval_s: float, most_s: float
) -> tuple[Series, Traffic]:
    """Orders of versions 0 and 1 by turns while fresh requests decode; without orders, for as long
    as there may be."""
    traffic = Traffic(made, batch)
    try:
        traffic.wait_until_all_decode(20, 300)
        begin_s = time.perf_counter()
        order_s = swap_in_turn(report, made, num_swaps, interval_s, most_s)
        if not num_swaps:
            time.sleep(most_s)
        end_s = time.perf_counter()
    finally:
        traffic.end()
    news = tuple(tuple(client.news_s) for client in traffic.clients)
    return Series(begin_s, end_s, tuple(order_s), news), traffic


def swap_in_turn(
    report: Report, made: Made, num_swaps: int, interval_s: float, most_s: float
) -> list[float]:
    """Seconds of each order, while there is time."""
    begin_s = time.perf_counter()
    other = 0 if made.service.drafter_status()["version"] else 1
    order_s: list[float] = []
    while len(order_s) < num_swaps and report.left_s > 5:
        ordered_s = time.perf_counter()
        if ordered_s - begin_s > most_s:
            break
        made.service.swapper.swap((other + len(order_s)) % 2)
        order_s.append(time.perf_counter() - ordered_s)
        time.sleep(interval_s)
    return order_s


def figures_of(series: Series, stream_ms: Sequence[float], watched: Watched) -> dict[str, Any]:
    """What a series took, and what its swaps did to steps and requests."""
    found: dict[str, Any] = {"num_swaps": len(series.order_s)}
    if series.order_s:
        found |= {
            "order_to_swapped_median_ms": statistics.median(series.order_s) * 1e3,
            "stream_median_ms": statistics.median(stream_ms),
            "stream_p99_ms": quantile(stream_ms, 0.99),
            "stream_slowest_ms": max(stream_ms),
        }
    return {
        **found,
        **step_times(watched.begun_s, watched.swapped, series.begin_s, series.end_s),
        **slowest_waits(series.news_s, series.begin_s, series.end_s),
        "seconds": series.end_s - series.begin_s,
    }


def step_times(
    begun_s: Sequence[float], swapped: Sequence[int], begin: float, end: float
) -> dict[str, Any]:
    """Median milliseconds of steps with and without a swap, within a window."""
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
    """How much longer than the median of its neighbours the longest wait of a request was; not than
    that of all, since waits grow with the contexts.

    Args:
        news_s: when each request was told of tokens.

    Returns:
        ``slowest_wait_over_median``: the worst request's worst wait over that median; 1 + that many
        steps more. ``None`` where nobody was told anything twice.
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
    """Each wait over the median of those around it."""
    found = []
    for start in range(0, len(waits), _NEIGHBOURS):
        around = waits[max(0, start - _NEIGHBOURS) : start + 2 * _NEIGHBOURS]
        median = statistics.median(around)
        found += [wait / median for wait in waits[start : start + _NEIGHBOURS]]
    return found


def quantile(values: Sequence[float], share: float) -> float:
    """The value that ``share`` of the others do not exceed."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]
