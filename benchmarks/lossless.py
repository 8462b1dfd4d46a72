"""Does drafting change the output? Counts differences, on two CPU cores.

    python -m benchmarks.lossless        # a quarter of an hour

* ``law``: sampled requests follow the target's joint law: chi-squared at p = 1e-9 for every
  setting, kind of drafter and rule, 400,000 samples each (``oracles/joint_law.py``).
* ``requests``: greedy and seeded requests that use every field of a client (penalties, biases,
  truncation, stops, log probabilities) get the same answer as without drafts, in float64.
* ``greedy``: in float32, batches of 1 to 64 requests of mixed lengths, with drafter weights swapped
  every 50 steps, get the same tokens as without drafts in batches of another size. Random targets
  and the bundled one. Batches of different shapes round differently, so plain answers in both batch
  sizes are compared as well: ``rounding`` is the largest difference of a log probability between
  them.
  Where a drafted answer differs, ``gap`` is the difference of the two best log probabilities; a gap
  of at most twice the rounding is a tie.

Writes ``benchmarks/results/lossless.json``.
"""

from __future__ import annotations

import json
import random
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from benchmarks.harness.results import write_result
from benchmarks.lossless_gpu.engines import Run, Swaps, engine_of
from examples import corpus
from oracles.engines import make_engine, random_model, run
from oracles.greedy import compared, greedy_requests, law_row, random_prompts
from oracles.joint_law import REGIMES, SETTINGS, expected_law, sample, tables_of
from oracles.random_requests import (
    DRAFTERS,
    Answer,
    differing,
    exact_engine,
    random_requests,
    scramble,
    twice,
    with_ends,
)
from serving.engine.loop import Engine
from serving.requests import Request

NUM_PROCESSES = 2
VOCAB_SIZE = 288
EOS = frozenset({40, 41, 42})
SWAP_EVERY = 50
"""Steps between swaps."""
KINDS = (*DRAFTERS, "swapped at every step")
SHARE_BUNDLED = 0.1
"""Share of the greedy prompts for the bundled target; the random ones get the others."""
SHARES = {1: 0.02, 4: 0.08, 16: 0.3, 64: 0.6}
"""Largest batch -> share of the random target's prompts."""


def law(regime: str, rule: str, num_samples: int) -> list[dict[str, Any]]:
    """Measure one row per setting."""
    torch.set_num_threads(1)
    tables, rows = tables_of(regime), []
    for number, setting in enumerate(SETTINGS):
        counts, rate = sample(setting, tables, rule, num_samples, seed=100 + number)
        wanted = expected_law(setting, tables)
        rows.append(law_row(setting.name, regime, rule, counts, rate, wanted))
    return rows


def requests(kind: str, count: int) -> dict[str, Any]:
    """Compare plain and drafted answers to ``count`` requests; each is sent twice."""
    torch.set_num_threads(1)
    numbers = random.Random(kind)
    model = random_model("qwen3", vocab_size=VOCAB_SIZE).double()
    swaps = kind not in DRAFTERS

    def plain(asked: list[Request]) -> dict[str, Answer]:
        engine = exact_engine(model, "random", eos_ids=EOS, max_draft=0, max_batch=8)
        return {name: Answer.of(got) for name, got in run(engine, asked).items()}

    first = random_requests(numbers, count // 2, VOCAB_SIZE)
    whole = plain(first)
    asked = twice(with_ends(numbers, r, whole[r.id]) for r in first)
    wanted = plain(asked)
    engine = exact_engine(model, "random" if swaps else kind, eos_ids=EOS, max_batch=13)
    between = scramble if swaps else lambda _engine, _step: None
    got = {name: Answer.of(answer) for name, answer in run(engine, asked, between).items()}
    figures = engine.figures()
    return {
        "drafter": kind,
        "requests": len(asked),
        "adjusting_logits": sum(r.sampling.adjusts_logits for r in asked),
        "ended_by_stop": sum(answer.finish_reason == "stop" for answer in wanted.values()),
        "drafted_tokens": figures.num_draft_tokens,
        "accepted_tokens": figures.num_accepted_tokens,
        "mismatches": len(differing(wanted, got)),
    }


def greedy_random(architecture: str, max_batch: int, count: int) -> dict[str, Any]:
    """Compare answers of a random target with random drafters, in float32."""
    torch.set_num_threads(1)
    numbers = random.Random(max_batch)
    prompts = random_prompts(numbers, count, VOCAB_SIZE)

    def engine(batch: int, max_draft: int) -> Engine:
        model = random_model(architecture, vocab_size=VOCAB_SIZE)
        pages = batch * 32 + 64
        return make_engine(model, max_batch=batch, max_draft=max_draft, num_pages=pages)

    lengths = [numbers.randint(8, 48) for _ in prompts]
    plain = list(greedy_requests(prompts, lengths, num_top=2, max_draft=0))
    wanted = run(engine(12, 0), plain)
    drafting = engine(max_batch, 8)
    again = run(drafting, plain)
    got = run(drafting, list(greedy_requests(prompts, lengths)), _scramble_every)
    name, figures = f"random {architecture}", drafting.figures()
    return compared(name, max_batch, prompts, wanted, again, got, figures, drafting.version)


def greedy_bundled(max_batch: int, count: int) -> dict[str, Any]:
    """Compare answers of the bundled target; its first drafter and random weights alternate."""
    torch.set_num_threads(1)
    per_domain = -(-count // len(corpus.DOMAINS))
    texts = [t for d in corpus.DOMAINS for t in corpus.prompts(d, per_domain, seed=max_batch)]
    numbers = random.Random(max_batch)
    texts = numbers.sample(texts, count)
    lengths = [numbers.randint(8, 48) for _ in texts]
    bundled, cpu = Run("bundled", "float32", "fast", 1.0), torch.device("cpu")
    with engine_of(bundled, cpu, 12, None) as service:
        prompts = [service.tokenizer(t, add_special_tokens=False)["input_ids"] for t in texts]
        plain = list(greedy_requests(prompts, lengths, num_top=2, max_draft=0))
        wanted = run(service.engine, plain)
    with (
        tempfile.TemporaryDirectory() as folder,
        engine_of(bundled, cpu, max_batch, Path(folder)) as service,
    ):
        again = run(service.engine, plain)
        swaps = Swaps(service, SWAP_EVERY)
        drafted = list(greedy_requests(prompts, lengths))
        got = run(service.engine, drafted, swaps.between)
        swaps.end()
        num_swaps = service.figures().swaps["swapped"]
        figures = service.engine.figures()
    return compared("bundled", max_batch, prompts, wanted, again, got, figures, num_swaps)


def _scramble_every(engine: Engine, step: int) -> None:
    if step % SWAP_EVERY == 0:
        scramble(engine, step)


def main(
    out: Annotated[Path, typer.Option(help="result file")] = Path(
        "benchmarks/results/lossless.json"
    ),
    num_samples: Annotated[int, typer.Option(help="per setting")] = 400_000,
    num_requests: Annotated[int, typer.Option(help="over all kinds")] = 2_000,
    num_prompts: Annotated[int, typer.Option(help="decoded greedily")] = 4_000,
) -> None:
    """Count differences."""
    started = time.time()
    bundled = round(num_prompts * SHARE_BUNDLED)
    others = {batch: round((num_prompts - bundled) * share) for batch, share in SHARES.items()}
    with ProcessPoolExecutor(NUM_PROCESSES, mp_context=get_context("spawn")) as pool:
        bundled_runs = [pool.submit(greedy_bundled, batch, bundled // 2) for batch in (5, 32)]
        random_runs = [
            pool.submit(greedy_random, architecture, batch, count // 2)
            for batch, count in others.items()
            for architecture in ("qwen3", "llama")
        ]
        request_runs = [pool.submit(requests, kind, num_requests // len(KINDS)) for kind in KINDS]
        law_runs = [
            pool.submit(law, regime, rule, num_samples)
            for regime in REGIMES
            for rule in ("block", "standard")
        ]
        greedy_rows = [r.result() for r in (*bundled_runs, *random_runs)]
        request_rows = [r.result() for r in request_runs]
        law_rows = [row for r in law_runs for row in r.result()]
    counted = ("drafted_tokens", "accepted_tokens", "mismatches")
    summary = {
        "law": {
            "runs": len(law_rows),
            "samples_each": num_samples,
            "rejected_at_1e-9": sum(r["chi_squared_over_limit"] > 1 for r in law_rows),
            "largest_chi_squared_over_limit": max(r["chi_squared_over_limit"] for r in law_rows),
        },
        "requests": _totals(request_rows, "requests", *counted),
        "greedy": _totals(
            greedy_rows,
            "prompts",
            "distinct_prompts",
            *counted,
            "mismatches_beyond_ties",
            "plain_against_plain",
        ),
        "seconds": time.time() - started,
    }
    rows = {"law": law_rows, "requests": request_rows, "greedy": greedy_rows}
    write_result(out, {"summary": summary, **rows})
    print(json.dumps(summary, indent=2))


def _totals(rows: list[dict[str, Any]], *names: str) -> dict[str, int]:
    return {name: sum(row[name] for row in rows) for name in names}


if __name__ == "__main__":
    typer.run(main)
