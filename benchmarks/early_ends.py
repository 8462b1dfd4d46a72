"""What it brings to end drafts early, at batch 1: live, and against an oracle of each round.

    python -m benchmarks.early_ends --run-dir runs/ends       # eight minutes on two cores

Live: two engines with the bundled target and its drafter, alike but for ``policy.ends_early``,
answer the same prompts of three domains in turns, one request at a time, with the same seeds. Both
begin with what the start-up profile says and learn while they decode. Speed is that of all tokens
behind the first of a request. ``plain`` is the same server without drafts.

Against an oracle: the engine drafts eight tokens in every round and verifies all of them, so a
round tells what each length would have brought, with the confidence in each position. Rounds are
gone through in order; the model of confidence has learned from those before. Times are those that
the live engines have measured. An oracle knows what each round keeps, and drafts as many tokens.
The best fixed K is known in hindsight. Traces in the folder are used again.

With ``--own-time`` all clocks count the time of the engine's thread alone, for a machine that is
busy with other things. Writes ``early_ends.json`` and ``rows/early_ends.json`` in
``benchmarks/results``.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from statistics import fmean
from typing import Annotated, Any

import numpy as np
import torch
import typer

from benchmarks.harness.arms import LEARNED
from benchmarks.harness.engines import DEMO, Built, build, engine_from
from benchmarks.harness.loops import Answer
from benchmarks.harness.results import RESULTS, Out, Row, at_least, say, write_result, write_rows
from benchmarks.learned_lengths import BATCH, MAX_DRAFT, settings_of
from benchmarks.policies import DOMAINS, PROMPTS, generate
from buffer.records import FIGURES, Trace
from configs.load import load_settings
from examples import corpus
from policies.ending import lengths
from policies.ending_model import EndingModel, Prices
from policies.run_log import read_traces
from serving.build import load_target
from serving.requests import Request, SamplingParams

SOURCE = "python -m benchmarks.early_ends"
COMMON = (
    "engine.max_batch=1", "engine.max_model_len=512", "drafter.suffix.enabled=false",
    "swap.enabled=false", "capture.enabled=false",
)  # fmt: skip
ARMS: dict[str, tuple[str, ...]] = {
    "ends": ("policy.ends_early=true",),
    "fixed": (),
    "plain": ("policy.kind=fixed", "policy.draft_k=0"),
}
MAX_TOKENS = 96
RESAMPLES = 1000
TURNS = 12
"""Requests of a domain before the next one."""

Round = tuple[list[float], int]
"""Confidence in each of eight positions, and tokens that were kept."""


def answer(built: Built, request: Request) -> tuple[int, float]:
    """Decode one request; returns tokens behind the first, and seconds."""
    got = Answer()
    built.engine.inbox.submit(request, got.take)
    with torch.inference_mode():
        while not got.tokens:
            built.engine.step()
        first, started_s = len(got.tokens), time.perf_counter()
        while not got.is_over:
            built.engine.step()
    return len(got.tokens) - first, time.perf_counter() - started_s


def prompts() -> list[tuple[int, ...]]:
    """Those of three domains, in bouts."""
    tokenizer = load_target(load_settings([DEMO], [], {})).tokenizer
    texts = [corpus.prompts(domain, PROMPTS, seed=11) for domain in DOMAINS]
    bouts = [text[i : i + TURNS] for i in range(0, PROMPTS, TURNS) for text in texts]
    return [tuple(tokenizer(text)["input_ids"]) for text in itertools.chain(*bouts)]


def live(temperature: float, seconds: float) -> dict[str, Any]:
    """Speeds of the arms, with intervals by resampling requests."""
    turns: dict[str, list[tuple[int, float]]] = {name: [] for name in ARMS}
    with ExitStack() as stack:
        engines = {
            name: stack.enter_context(engine_from(DEMO, [*COMMON, *chosen]))
            for name, chosen in ARMS.items()
        }
        stop_s = time.monotonic() + seconds
        for number, ids in enumerate(itertools.cycle(prompts())):
            if time.monotonic() > stop_s:
                break
            names = list(ARMS)[number % 3 :] + list(ARMS)[: number % 3]
            for name in names:
                sampling = SamplingParams(
                    temperature=temperature, max_tokens=MAX_TOKENS, ignore_eos=True, seed=number
                )
                request = Request(f"{name}-{number}", ids, sampling, capture=False)
                turns[name].append(answer(engines[name], request))
        figures = {name: built.policy.figures() for name, built in engines.items()}
    found = {"num_requests": len(turns["ends"]), "ending": figures["ends"]["ending"][LEARNED]}
    found |= {name: rate(own) for name, own in turns.items()}
    found |= {
        f"ends against {other}": against(turns["ends"], turns[other])
        for other in ("fixed", "plain")
    }
    say(f"temperature {temperature}: {found}")
    return found


def rate(turns: Sequence[tuple[int, float]]) -> float:
    """Tokens a second."""
    return sum(tokens for tokens, _ in turns) / sum(seconds for _, seconds in turns)


def against(
    ours: Sequence[tuple[int, float]], others: Sequence[tuple[int, float]]
) -> dict[str, float]:
    """Speed relative to another arm's on the same requests, with 95 %."""
    rng = np.random.default_rng(0)
    own, other = np.array(ours), np.array(others)
    picked = rng.integers(len(own), size=(RESAMPLES, len(own)))
    sums, rivals = own[picked].sum(axis=1), other[picked].sum(axis=1)
    ratios = sums[:, 0] / sums[:, 1] / (rivals[:, 0] / rivals[:, 1])
    low, high = np.quantile(ratios, (0.025, 0.975))
    return {"ratio": rate(ours) / rate(others), "low": float(low), "high": float(high)}


def rounds_of(traces: Iterable[Trace]) -> list[Round]:
    """Rounds of one request after another, as far as their drafts were whole."""
    return [
        (list(one.considered.confidence[::FIGURES]), one.num_accepted)
        for trace in traces for one in trace.rounds
        if one.considered is not None and len(one.draft_ids) == MAX_DRAFT
    ]  # fmt: skip


def hindsight(rounds: Sequence[Round], prices: Prices, by_k: Sequence[float]) -> dict[str, Any]:
    """Speeds, in tokens for each plain step's time."""
    kept = np.array([num for _, num in rounds])
    ks, times = np.arange(MAX_DRAFT + 1), np.array([1.0, *by_k])
    by_fixed = (1 + np.minimum(kept[:, None], ks)).mean(axis=0) / times
    tokens, oracle = 1 + np.minimum(kept[:, None], ks), np.full(len(kept), by_fixed.argmax())
    for _ in range(10):
        speed = tokens[np.arange(len(kept)), oracle].mean() / times[oracle].mean()
        oracle = (tokens - speed * times).argmax(axis=1)
    model, num_tokens, spent = EndingModel(MAX_DRAFT), 0.0, 0.0
    ending, reached = model.best(prices)
    for number, (tops, num_kept) in enumerate(rounds):
        end, seen = lengths(ending, tops, MAX_DRAFT)
        if number >= len(rounds) // 4:
            num_tokens += 1 + min(num_kept, end)
            spent += prices.base_s + prices.pass_s * (seen - 1) + sum(prices.rows_s[:end])
        # As in service, only what was drafted is learned from.
        model.learn(tops[:seen], end, min(num_kept, end))
        if number % 64 == 63:
            ending, reached = model.best(prices, reached)
    best, ends = float(by_fixed.max()), num_tokens / spent
    return {
        "best_k": int(by_fixed.argmax()), "best_fixed": best, "ends": ends, "oracle": float(speed),
        "gain": ends / best - 1, "share": (ends - best) / (float(speed) - best),
        "num_rounds": len(rounds),
    }  # fmt: skip


def rows_of(found: Mapping[str, Any]) -> Iterator[Row]:
    """The claims."""
    for name, one in found["live"].items():
        where = f"bundled target, {name}, batch 1, live"
        measure = "ending drafts early: speed over the same policy without"
        yield at_least(where, measure, one["ends against fixed"]["ratio"], 1.0)
        measure = "ending drafts early: speed over plain decoding"
        yield at_least(where, measure, one["ends against plain"]["ratio"], 0.985)
    known = found["hindsight"]
    where = "bundled target, temperature 0.7, batch 1, traces with every K, times of the live runs"
    yield at_least(where, "ending drafts early: speed over the best fixed K", 1 + known["gain"], 1)
    measure = "share of the gap between best fixed K and oracle"
    yield at_least(where, measure, known["share"], 0.3)


def main(
    run_dir: Annotated[Path, typer.Option(help="folder of the traces")],
    seconds: Annotated[float, typer.Option(help="of traces, and of each live run")] = 150.0,
    own_time: Annotated[bool, typer.Option(help="clocks count the engine's thread alone")] = False,
    out: Out = RESULTS / "early_ends.json",
) -> None:
    """Measure both."""
    torch.set_num_threads(1)
    if own_time:
        time.perf_counter = time.thread_time
    settings = settings_of(run_dir)
    if not (run_dir / "traces").exists():
        service, _ = build(settings)
        generate(service, settings, [BATCH], seconds)
        service.engine.stop()
    rounds = rounds_of(read_traces(settings.buffer.url, run_dir))
    lived = {f"temperature {t}": live(t, seconds) for t in (0.7, 0.0)}
    measured = [one["ending"]["prices"] for one in lived.values()]
    by_k = [fmean(own) for own in zip(*(one["by_k"] for one in measured), strict=True)]
    rows_s = [fmean(own) for own in zip(*(one["rows_s"] for one in measured), strict=True)]
    prices = Prices(
        fmean(one["base_s"] for one in measured), fmean(one["pass_s"] for one in measured), rows_s
    )
    found = {
        "own_time": own_time, "live": lived, "hindsight": hindsight(rounds, prices, by_k),
        "prices": {**prices._asdict(), "by_k": by_k},
    }  # fmt: skip
    say(f"{found['hindsight']}")
    write_result(out, found)
    write_rows("early_ends", rows_of(found), SOURCE, out.parent)
    say(f"written: {out}")


if __name__ == "__main__":
    typer.run(main)
