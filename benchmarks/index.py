"""The suffix index in a round: the compiled search beside the one in Python that it replaced.

    python -m benchmarks.index                     # two minutes on one core

Requests answer with text that exists: code and documentation of this installation, tokenized by the
bundled target's tokenizer, in pieces of 200 to 800 tokens, a third of them prompt. Both indexes are
first given 400,000 tokens of finished pieces and then the same requests. A step tells the index of
the tokens that the last one committed, asks for the kinds of match, and for up to 4 draft tokens
for each request; those that the text goes on with are kept, and one more. Requests that are
through finish and make room for others.

The two alternate at every step, in changing order, and their proposals are compared. Each finds
the caches full of the other's arrays, so the compiled one is also measured *alone*; beside a
server's other work it is between the two.
``time.thread_time`` counts, so other work on the machine matters only by the caches that it spoils.
``step`` is what a round waits for: telling, looking and proposing. ``between`` is what finishing
and beginning requests adds, per step; a server does this while the device works. ``parts`` split
the steps of the Python index, measured on other steps.

Writes ``benchmarks/results/index.json`` and rows of ``index``.
"""

from __future__ import annotations

import itertools
import random
import statistics
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import typer

from benchmarks.engine.host import Meter, patched
from benchmarks.harness.results import (
    RESULTS,
    Out,
    Row,
    at_least,
    at_most,
    rounded,
    write_result,
    write_rows,
)
from benchmarks.harness.run_traces import num_kept
from drafters.suffix.index import SuffixIndex
from examples.corpus import documents
from oracles.suffix_index import PlainSuffixIndex
from oracles.suffix_recent import RecentText
from oracles.suffix_running import RunningText
from targets.tokenizer import load_tokenizer

_TARGET = Path("examples/target")
_RECENT_TOKENS, _K = 400_000, 4
_BOUNDS = 2, 12
_SHORTEST, _LONGEST = 200, 800
_WARM_UPS = 30
_MOST_MS = {32: 0.10, 128: 0.15}
"""Wanted at most, by requests."""
_PARTS: dict[str, tuple[type, str]] = {
    "index finished": (RecentText, "catch_up"),
    "link own": (RunningText, "_catch_up"),
    "search own": (RunningText, "find"),
    "search recent": (RecentText, "find"),
    "draft": (PlainSuffixIndex, "_continue"),
    "tell": (PlainSuffixIndex, "extend"),
    "search, rest": (PlainSuffixIndex, "_search"),
}
Index = SuffixIndex | PlainSuffixIndex


def pieces(num_tokens: int, seed: int = 0) -> list[list[int]]:
    """Pieces of text in random order, with so many tokens in all. Neighbours of one document are
    near each other, as in traffic."""
    rng, tokenizer = random.Random(seed), load_tokenizer(_TARGET)
    found: list[list[int]] = []
    count = 0
    streams = [documents(domain, "train") for domain in ("python", "c", "docs")]
    for document in itertools.chain.from_iterable(zip(*streams, strict=False)):
        ids, at = tokenizer.encode(document.text[:20_000]), 0
        while at + _SHORTEST < len(ids):
            size = rng.randrange(_SHORTEST, _LONGEST)
            found.append(ids[at : at + size])
            at += size
            count += len(found[-1])
        if count >= num_tokens:
            break
    for at in range(0, len(found), 64):
        near = found[at : at + 64]
        rng.shuffle(near)
        found[at : at + 64] = near
    return found


@dataclass(slots=True)
class Running:
    """A request whose answer is known."""

    key: str
    text: list[int]
    at: int
    """Tokens that the index knows or is about to be told."""


@dataclass(slots=True)
class Times:
    """Microseconds of one index at one batch size."""

    step: list[float] = field(default_factory=list)
    between: list[float] = field(default_factory=list)


class Traffic:
    """Requests that come and go, the same ones for every index."""

    def __init__(self, texts: Iterator[list[int]], batch: int) -> None:
        self._texts, self._keys = texts, map(str, itertools.count())
        self.running = [self._next() for _ in range(batch)]
        rng = random.Random(0)
        for one in self.running:  # not all begin at once
            one.at = rng.randrange(one.at, len(one.text) - _K)
        self.news: list[list[int]] = [[] for _ in self.running]
        self.ended: list[Running] = []
        self.begun = list(self.running)

    def _next(self) -> Running:
        text = next(self._texts)
        return Running(next(self._keys), text, len(text) // 3)

    def go_on(self, drafts: Sequence[Sequence[int]]) -> None:
        """Commit what is kept of each draft, and one token more."""
        self.ended, self.begun, self.news = [], [], []
        for r, (one, draft) in enumerate(zip(self.running, drafts, strict=True)):
            stop = min(one.at + num_kept(draft, one.text, one.at) + 1, len(one.text))
            if stop == len(one.text):
                self.ended.append(one)
                self.running[r] = self._next()
                self.begun.append(self.running[r])
                self.news.append([])
            else:
                self.news.append(one.text[one.at : stop])
                one.at = stop

    def change(self, index: Index) -> None:
        """Tell an index of requests that ended and began."""
        for one in self.ended:
            index.extend([one.key], [one.text[one.at :]])
            index.finish(one.key, keep=True)
        for one in self.begun:
            index.begin(one.key, one.text[: one.at])

    def step(self, index: Index) -> tuple[list[int], list[list[int]]]:
        """What a round asks an index."""
        keys = [one.key for one in self.running]
        index.extend(keys, self.news)
        return index.observe(keys), index.propose(keys, [_K] * len(keys))


def timed(work: Callable[[], Any]) -> tuple[float, Any]:
    """Microseconds of this thread, and the result."""
    before = time.thread_time_ns()
    result = work()
    return (time.thread_time_ns() - before) / 1e3, result


def measure(
    indexes: dict[str, Index], texts: Iterator[list[int]], batch: int, num_steps: int
) -> dict[str, Any]:
    """Time steps of both indexes in turn, and then the parts of the plain one."""
    traffic, times = Traffic(texts, batch), {name: Times() for name in indexes}
    kept: list[int] = []
    matched = 0
    for number in range(_WARM_UPS + num_steps):
        answers = {}
        order = list(indexes)[:: 1 if number % 2 else -1]
        for name in order:
            between, _ = timed(lambda index=indexes[name]: traffic.change(index))
            step, answers[name] = timed(lambda index=indexes[name]: traffic.step(index))
            if number >= _WARM_UPS:
                times[name].step.append(step)
                times[name].between.append(between)
        kinds, drafts = answers["compiled"]
        assert answers["python"] == (kinds, drafts), "the indexes differ"
        traffic.go_on(drafts)
        kept += [max(len(news), 1) for news in traffic.news]
        matched += sum(kind > 0 for kind in kinds)
    parts = _parts(indexes, traffic, num_steps // 2)
    for index in indexes.values():
        traffic.change(index)
        for one in traffic.running:
            index.finish(one.key, keep=False)
    return {
        "batch": batch,
        "matched": matched / (batch * (_WARM_UPS + num_steps)),
        "tokens_per_step": statistics.mean(kept),
        "python_parts_us": parts,
        **figures(times),
    }


def figures(times: dict[str, Times]) -> dict[str, float]:
    """JSON-ready."""
    return {
        f"{name}_{what}_us": value
        for name, own in times.items()
        for what, value in (
            ("step_median", statistics.median(own.step)),
            ("step_p99", sorted(own.step)[int(0.99 * len(own.step))]),
            ("step_mean", statistics.mean(own.step)),
            ("between_mean", statistics.mean(own.between)),
        )
    }


def alone(index: Index, texts: Iterator[list[int]], batch: int, num_steps: int) -> Times:
    """Time steps of one index with nothing but its own traffic in between."""
    traffic, times = Traffic(texts, batch), Times()
    for number in range(_WARM_UPS + num_steps):
        between, _ = timed(lambda: traffic.change(index))
        step, (_, drafts) = timed(lambda: traffic.step(index))
        if number >= _WARM_UPS:
            times.step.append(step)
            times.between.append(between)
        traffic.go_on(drafts)
    traffic.change(index)
    for one in traffic.running:
        index.finish(one.key, keep=False)
    return times


def _parts(indexes: dict[str, Index], traffic: Traffic, num_steps: int) -> dict[str, float]:
    """Mean microseconds of a step of the plain index by part; the innermost one counts."""
    meter, spent = Meter(time.thread_time_ns), Counter[str]()
    wrapped = {
        (owner, name): meter.wrap(part, getattr(owner, name))
        for part, (owner, name) in _PARTS.items()
    }
    for _ in range(num_steps):
        for index in indexes.values():
            traffic.change(index)
        with patched(wrapped):
            meter.begin()
            traffic.step(indexes["python"])
            spent.update(meter.end())
        _, drafts = traffic.step(indexes["compiled"])
        traffic.go_on(drafts)
    return {part: round(us / num_steps, 1) for part, us in spent.items()}


def rows_of(result: dict[str, Any]) -> Iterator[Row]:
    """The claims."""
    batch = result["batch"]
    case = (
        f"suffix index in a round, {batch} requests, K = {_K}, {_RECENT_TOKENS:,} recent tokens, "
        "thread time"
    )
    most = _MOST_MS.get(batch)
    for name, where in (("compiled", "beside the one in Python"), ("alone", "alone")):
        measure, median = f"milliseconds of a step, {where}", result[f"{name}_step_median_us"] / 1e3
        yield (
            Row(case, f"{measure}, median", median, None, None)
            if most is None
            else at_most(case, f"{measure}, median", median, most)
        )
        p99 = result[f"{name}_step_p99_us"] / 1e3
        yield Row(case, f"{measure}, p99", p99, None, None)
    times = result["python_step_median_us"] / result["compiled_step_median_us"]
    yield at_least(case, "times as fast as in Python, median, one run", times, 1.0)
    yield Row(
        case, "milliseconds of finishing and beginning requests, a step",
        result["compiled_between_mean_us"] / 1e3, None, None,
    )  # fmt: skip


def main(
    out: Out = RESULTS / "index.json",
    batches: Annotated[str, typer.Option(help="comma-separated")] = "1,8,32,128",
    num_steps: Annotated[int, typer.Option(help="measured steps of each batch size")] = 600,
) -> None:
    """Measure all batch sizes."""
    sizes = [int(size) for size in batches.split(",")]
    texts = pieces(3 * _RECENT_TOKENS)
    indexes: dict[str, Index] = {
        "python": PlainSuffixIndex(*_BOUNDS, _RECENT_TOKENS),
        "compiled": SuffixIndex(*_BOUNDS, _RECENT_TOKENS),
    }
    stream = itertools.cycle(texts)
    while indexes["python"].num_evicted_sequences == 0:
        text = next(stream)
        for index in indexes.values():
            index.begin("full", text)
            index.finish("full", keep=True)
            index.catch_up()
    results = []
    for size in sizes:
        results.append(measure(indexes, stream, size, num_steps))
        print(rounded(results[-1]), flush=True)
    for size, result in zip(sizes, results, strict=True):  # afterwards, for only one is told
        result |= figures({"alone": alone(indexes["compiled"], stream, size, num_steps)})
    write_result(out, {"recent_tokens": _RECENT_TOKENS, "draft_k": _K, "rows": results})
    write_rows(
        "index", [row for one in results for row in rows_of(one)], "python -m benchmarks.index"
    )


if __name__ == "__main__":
    typer.run(main)
