"""The suffix index in a round beside Arctic Inference's suffix decoding.

    python -m benchmarks.index_peer                # a minute on one core

Needs ``arctic_inference`` (PyPI ``arctic-inference``) with the extension of its suffix decoding.
That much of it builds without its other kernels: ``cmake`` in ``csrc/suffix_decoding``, and the
result beside ``cache.py``.

Both get the traffic of ``benchmarks.index``: a full memory of finished text, then requests whose
steps commit what is kept of each draft of up to 4 tokens and one token more. Each has the requests
to itself, in turns of changing order. Arctic's cache has vLLM's defaults (depth 24, at least 0.1 of
the occurrences, no more tokens than the match has), and keeps as many finished answers as hold
about as many tokens. It remembers answers and not prompts of others;
``SuffixIndex`` remembers both. Its drafts are shorter or longer for that reason and by its rule, so
the tokens of a step are reported beside the time.

Writes ``benchmarks/results/index_peer.json`` and rows of ``index``.
"""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, Protocol

import numpy as np
import typer

from benchmarks.harness.results import RESULTS, Out, Row, rounded, write_result, write_rows
from benchmarks.index import Traffic, pieces, timed
from drafters.suffix.index import SuffixIndex

SOURCE = "python -m benchmarks.index_peer"
_RECENT_TOKENS, _K = 400_000, 4
_BOUNDS = 2, 12
_DEPTH = 24
"""Of Arctic's trees, as in vLLM."""
_WARM_UPS = 30


class Index(Protocol):
    """What ``Traffic`` asks of an index."""

    def begin(self, key: str, tokens: Sequence[int]) -> None: ...
    def finish(self, key: str, *, keep: bool) -> None: ...
    def extend(self, keys: Sequence[str], tokens: Sequence[Sequence[int]]) -> None: ...
    def observe(self, keys: Sequence[str]) -> list[int]: ...
    def propose(self, keys: Sequence[str], lens: Sequence[int]) -> list[list[int]]: ...


class ArcticIndex:
    """Arctic's cache behind the same calls."""

    def __init__(self, most_requests: int) -> None:
        """
        Args:
            most_requests: finished answers that it remembers.

        Raises:
            ImportError: it is not installed.
        """
        from arctic_inference.suffix_decoding import SuffixDecodingCache

        self._cache = SuffixDecodingCache(_DEPTH, most_requests)
        self._ends: dict[str, list[int]] = {}
        """Last tokens of each request, which a lookup is given."""

    def begin(self, key: str, tokens: Sequence[int]) -> None:
        self._cache.start_request(key, list(tokens))
        self._ends[key] = list(tokens[-_DEPTH:])

    def finish(self, key: str, *, keep: bool) -> None:
        self._cache.stop_request(key)
        if not keep:
            self._cache.evict_cached_response(key)
        del self._ends[key]

    def extend(self, keys: Sequence[str], tokens: Sequence[Sequence[int]]) -> None:
        for key, new in zip(keys, tokens, strict=True):
            if new:
                self._cache.add_active_response(key, list(new))
                end = self._ends[key]
                end += new
                del end[:-_DEPTH]

    def observe(self, keys: Sequence[str]) -> list[int]:
        """It finds out how good a match is together with the draft."""
        return [0] * len(keys)

    def propose(self, keys: Sequence[str], lens: Sequence[int]) -> list[list[int]]:
        speculate, ends = self._cache.speculate, self._ends
        return [
            list(speculate(key, ends[key], max_spec_tokens=most).token_ids)
            for key, most in zip(keys, lens, strict=True)
        ]


@dataclass(slots=True)
class Found:
    """Of one index at one batch size."""

    step_us: list[float] = field(default_factory=list)
    between_us: list[float] = field(default_factory=list)
    tokens: list[float] = field(default_factory=list)
    """Of a request in a step."""


def run(index: Index, texts: Iterator[list[int]], batch: int, num_steps: int, into: Found) -> None:
    """Time the steps of requests that have the index to themselves."""
    traffic = Traffic(texts, batch)
    for number in range(_WARM_UPS + num_steps):
        between, _ = timed(lambda: traffic.change(index))  # type: ignore[arg-type]
        step, (_, drafts) = timed(lambda: traffic.step(index))  # type: ignore[arg-type]
        traffic.go_on(drafts)
        if number >= _WARM_UPS:
            into.step_us.append(step)
            into.between_us.append(between)
            into.tokens.append(statistics.mean(max(len(news), 1) for news in traffic.news))
    traffic.change(index)  # type: ignore[arg-type]
    for one in traffic.running:
        index.finish(one.key, keep=False)


def figures(found: Found) -> dict[str, float]:
    """JSON-ready."""
    return {
        "step_median_us": statistics.median(found.step_us),
        "step_p99_us": float(np.percentile(found.step_us, 99)),
        "between_mean_us": statistics.mean(found.between_us),
        "tokens_per_step": statistics.mean(found.tokens),
    }


def rows_of(results: Sequence[dict[str, Any]]) -> Iterator[Row]:
    """How both compare; a slower index of ours would not hold."""
    for one in results:
        case = (
            f"suffix index beside Arctic Inference's, {one['batch']} requests, K = {_K}, "
            f"{_RECENT_TOKENS:,} recent tokens, thread time, each alone"
        )
        own, other = one["own"], one["arctic"]
        times = other["step_median_us"] / own["step_median_us"]
        yield Row(case, "times as fast, median of steps", times, "at least 1", times >= 1)
        for name, of in (("ours", own), ("Arctic's", other)):
            step_ms, tokens = of["step_median_us"] / 1e3, of["tokens_per_step"]
            yield Row(case, f"milliseconds of a step, median, {name}", step_ms, None, None)
            yield Row(case, f"tokens of a request in a step, {name}", tokens, None, None)


def filled(texts: Sequence[list[int]]) -> tuple[dict[str, Index], list[list[int]]]:
    """Both, with so many recent tokens, and the texts that neither knows."""
    lengths = list(itertools.accumulate(map(len, texts)))
    num_texts = next(at for at, length in enumerate(lengths) if length >= _RECENT_TOKENS)
    own, other = SuffixIndex(*_BOUNDS, _RECENT_TOKENS), ArcticIndex(num_texts)
    for number, text in enumerate(texts[:num_texts]):
        own.begin("full", text)
        own.finish("full", keep=True)
        own.catch_up()
        other.begin(f"full-{number}", [])
        other.extend([f"full-{number}"], [text])
        other.finish(f"full-{number}", keep=True)
    return {"own": own, "arctic": other}, list(texts[num_texts:])  # type: ignore[dict-item]


def main(
    out: Out = RESULTS / "index_peer.json",
    batches: Annotated[str, typer.Option(help="comma-separated")] = "1,8,32,128",
    num_steps: Annotated[int, typer.Option(help="measured steps of each turn")] = 300,
    turns: Annotated[int, typer.Option(min=1, help="of each index at each batch size")] = 4,
) -> None:
    """Measure all batch sizes."""
    texts = pieces(3 * _RECENT_TOKENS)
    indexes, new = filled(texts)
    streams = {name: itertools.cycle(new) for name in indexes}
    results = []
    for batch in (int(size) for size in batches.split(",")):
        found = {name: Found() for name in indexes}
        for turn in range(turns):
            for name in list(indexes)[:: 1 if turn % 2 else -1]:
                run(indexes[name], streams[name], batch, num_steps, found[name])
        results.append({"batch": batch, **{name: figures(one) for name, one in found.items()}})
        print({name: rounded(figures(one)) for name, one in found.items()}, flush=True)
    write_result(out, {"recent_tokens": _RECENT_TOKENS, "draft_k": _K, "rows": results})
    write_rows("index", rows_of(results), SOURCE)


if __name__ == "__main__":
    typer.run(main)
