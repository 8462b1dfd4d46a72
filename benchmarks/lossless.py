"""Does drafting change what comes out? Counts, on two CPU cores.

    python -m benchmarks.lossless        # a quarter of an hour

* ``law``: sampled requests follow the target's joint law: chi-squared at p = 1e-9 of every setting
  by every kind of drafter by both rules, 400,000 samples each (``tests/joint_law.py``).
* ``requests``: greedy and seeded requests that use every field of a client (penalties, biases,
  truncation, stops, log probabilities) get the same answer as without drafts, float64.
* ``greedy``: float32, batches of 1 to 64 requests of mixed lengths, drafter weights swapped every
  50 steps: the same tokens as without drafts in batches of another size. Random targets and the
  bundled one. Passes of different shapes round differently, so plain answers in both batch sizes
  are compared as well: ``rounding`` is the most that a log probability moved between them. Where
  the drafted answer differs, ``gap`` is the difference of the two best log probabilities; one of
  at most twice the rounding is a tie.

Writes ``benchmarks/results/lossless.json``.
"""

from __future__ import annotations

import itertools
import json
import random
import tempfile
import time
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from benchmarks.result import write_result
from configs.load import load_settings
from examples import corpus
from serving.build import build_engine
from serving.engine import Engine
from serving.types import Request, SamplingParams
from tests.engines import Collected, RandomPolicy, make_engine, random_model, run
from tests.joint_law import (
    REGIMES,
    SETTINGS,
    chi_squared_excess,
    expected_law,
    sample,
    tables_of,
)
from tests.random_requests import (
    DRAFTERS,
    Answer,
    differing,
    exact_engine,
    random_requests,
    scramble,
    twice,
    with_ends,
)

NUM_PROCESSES = 2
VOCAB_SIZE = 288
EOS = frozenset({40, 41, 42})
SWAP_EVERY = 50
"""Steps."""
KINDS = (*DRAFTERS, "swapped at every step")
SHARE_BUNDLED = 0.1
"""Of the greedy prompts; the others go to the random target."""
SHARES = {1: 0.02, 4: 0.08, 16: 0.3, 64: 0.6}
"""Largest batch -> share of the random target's prompts."""


def law(regime: str, rule: str, num_samples: int) -> list[dict[str, Any]]:
    """One row for each setting."""
    torch.set_num_threads(1)
    tables, rows = tables_of(regime), []
    for number, setting in enumerate(SETTINGS):
        counts, rate = sample(setting, tables, rule, num_samples, seed=100 + number)
        wanted = expected_law(setting, tables)
        rows.append(
            {
                "setting": setting.name,
                "regime": regime,
                "rule": rule,
                "acceptance": rate,
                "chi_squared_over_limit": chi_squared_excess(counts, wanted),
                "total_variation": float((counts / counts.sum() - wanted).abs().sum() / 2),
            }
        )
    return rows


def requests(kind: str, count: int) -> dict[str, Any]:
    """Plain and drafted answers to ``count`` requests, half of them asked a second time."""
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
    """Random target and drafters, in float32."""
    torch.set_num_threads(1)
    numbers = random.Random(max_batch)
    prompts = _prompts(numbers, count)

    def engine(batch: int, max_draft: int) -> Engine:
        model = random_model(architecture, vocab_size=VOCAB_SIZE)
        pages = batch * 32 + 64
        return make_engine(model, max_batch=batch, max_draft=max_draft, num_pages=pages)

    lengths = [numbers.randint(8, 48) for _ in prompts]
    plain = list(_greedy(prompts, lengths, num_top=2, max_draft=0))
    wanted = run(engine(12, 0), plain)
    drafting = engine(max_batch, 8)
    again = run(drafting, plain)
    got = run(drafting, list(_greedy(prompts, lengths)), _scramble_every)
    return _compared(f"random {architecture}", max_batch, wanted, again, got, drafting)


def _prompts(numbers: random.Random, count: int) -> list[list[int]]:
    """Of 1 to 60 tokens; some begin alike. Each occurs twice, far apart: nothing foretells a random
    target but the suffix index, once it has seen the answer."""
    stem = [numbers.randrange(VOCAB_SIZE) for _ in range(40)]
    fresh = [
        stem[: numbers.choice((0, 0, 8, 40))]
        + [numbers.randrange(VOCAB_SIZE) for _ in range(numbers.randint(1, 20))]
        for _ in range(-(-count // 2))
    ]
    return (fresh + numbers.sample(fresh, len(fresh)))[:count]


def greedy_bundled(max_batch: int, count: int) -> dict[str, Any]:
    """The bundled target, and its first drafter in turn with random weights."""
    torch.set_num_threads(1)
    per_domain = -(-count // len(corpus.DOMAINS))
    texts = [t for d in corpus.DOMAINS for t in corpus.prompts(d, per_domain, seed=max_batch)]
    numbers = random.Random(max_batch)
    texts = numbers.sample(texts, count)
    lengths = [numbers.randint(8, 48) for _ in texts]

    def engine(batch: int, folder: str) -> Engine:
        chosen = [f"run_dir={folder}", f"engine.max_batch={batch}", "policy.kind=fixed"]
        made = build_engine(load_settings([Path("configs/demo.yaml")], chosen, {})).engine
        made.policy = RandomPolicy()
        made.on_rounds = made.between_steps = None  # weights change here, not by the swapper
        return made

    with tempfile.TemporaryDirectory() as folder:
        drafting = engine(max_batch, folder)
        prompts = [drafting.tokenizer(t, add_special_tokens=False)["input_ids"] for t in texts]
        plain = list(_greedy(prompts, lengths, num_top=2, max_draft=0))
        wanted = run(engine(12, folder), plain)
        again = run(drafting, plain)
        got = run(drafting, list(_greedy(prompts, lengths)), _alternate(drafting))
    return _compared("bundled", max_batch, wanted, again, got, drafting)


def _greedy(
    prompts: list[list[int]],
    lengths: list[int],
    num_top: int | None = None,
    max_draft: int | None = None,
) -> Iterable[Request]:
    for number, (prompt, length) in enumerate(zip(prompts, lengths, strict=True)):
        sampling = SamplingParams(
            temperature=0.0, max_tokens=length, logprobs=num_top, ignore_eos=True
        )
        yield Request(str(number), tuple(prompt), sampling, max_draft=max_draft, capture=True)


def _scramble_every(engine: Engine, step: int) -> None:
    if step % SWAP_EVERY == 0:
        scramble(engine, step)


def _alternate(engine: Engine) -> Any:
    """Its own weights and noise in turn."""
    neural = engine.drafting.neural
    assert neural is not None
    own = [parameter.detach().clone() for parameter in neural.module.parameters()]

    def between(engine: Engine, step: int) -> None:
        if step % SWAP_EVERY:
            return
        if step // SWAP_EVERY % 2:
            return scramble(engine, step)
        with torch.no_grad():
            for parameter, value in zip(neural.module.parameters(), own, strict=True):
                parameter.copy_(value)
        neural.version += 1

    return between


def _compared(
    target: str,
    max_batch: int,
    wanted: dict[str, Collected],
    again: dict[str, Collected],
    got: dict[str, Collected],
    engine: Engine,
) -> dict[str, Any]:
    """``again``: plain answers in batches of the size that drafted ones have."""
    figures = engine.figures()
    rounding = max(_moved(plain, again[name]) for name, plain in wanted.items())
    gaps = [_gap(plain, got[name]) for name, plain in wanted.items()]
    parted = [gap for gap in gaps if gap is not None]
    return {
        "target": target,
        "max_batch": max_batch,
        "prompts": len(wanted),
        "tokens": sum(len(c.token_ids) for c in wanted.values()),
        "swaps": engine.version,
        "drafted_tokens": figures.num_draft_tokens,
        "accepted_tokens": figures.num_accepted_tokens,
        "rounding": rounding,
        "plain_against_plain": sum(_gap(p, again[n]) is not None for n, p in wanted.items()),
        "mismatches": len(parted),
        "mismatches_beyond_ties": sum(gap > 2 * rounding for gap in parted),
        "gap": parted,
    }


def _moved(one: Collected, other: Collected) -> float:
    """Most that a log probability differs between two answers, up to where they part."""
    pairs = zip(one.logprobs, other.logprobs, strict=True)
    equal = itertools.takewhile(lambda pair: pair[0].token_id == pair[1].token_id, pairs)
    return max((abs(a.logprob - b.logprob) for a, b in equal), default=0.0)


def _gap(plain: Collected, other: Collected) -> float | None:
    """Best minus second best log probability where two answers part; ``None`` if they do not."""
    if plain.token_ids == other.token_ids:
        return None
    pairs = zip(plain.token_ids, other.token_ids, strict=True)
    at = next(place for place, (one, another) in enumerate(pairs) if one != another)
    (_, best), (_, second) = plain.logprobs[at].top
    return best - second


def main(
    out: Annotated[Path, typer.Option(help="where the result goes")] = Path(
        "benchmarks/results/lossless.json"
    ),
    num_samples: Annotated[int, typer.Option(help="of each setting")] = 400_000,
    num_requests: Annotated[int, typer.Option(help="of every kind")] = 2_000,
    num_prompts: Annotated[int, typer.Option(help="decoded greedily")] = 4_000,
) -> None:
    """Count what differs."""
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
            greedy_rows, "prompts", *counted, "mismatches_beyond_ties", "plain_against_plain"
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
