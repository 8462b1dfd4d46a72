"""What pinned numerics cost on a real target, and how often a seeded answer changes without them.

    python -m benchmarks.numerics --run-dir runs/bench_real/0     # a finished demo's newest drafter
    python -m benchmarks.numerics --run-dir runs/bench_real/0 --parts flips --state runs/flips

``engine.numerics: pinned`` promises that a seeded answer does not depend on what is drafted, on the
other requests of the batch, or on a restart. ``flips`` counts answers that do: chat requests of
four domains are answered with seeds at temperature 0.7, first by plain decoding with ``--batch``
requests at a time, then with K = 1, 2, 4 and 7, with the policy's own choice and with batches of 1,
8 and 128, and in all these ways again by an engine that was built anew (``harness/flips.py``).
2,000,000 tokens take two minutes at 20,000 tokens/s, beside the time to build two engines. With
``--state`` a run goes on where the former one ended: its answers are compared with those of the
processes before it.

``price`` keeps both engines loaded and compares their speed in turn: tokens per second with a full
batch, plain and at K = 4, pinned over fast, medians of the turns.

Writes ``--out`` and ``rows/numerics.json`` beside it; figures of a part
that was not measured stay.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from benchmarks.harness.engines import build, release
from benchmarks.harness.flips import Count, Kept, Side, count, load, name_of, save
from benchmarks.harness.loops import full_window
from benchmarks.harness.results import (
    RESULTS,
    Out,
    Row,
    at_least,
    at_most,
    known,
    say,
    write_result,
    write_rows,
)
from benchmarks.real.choosing import ARM_DOMAINS, Traffic, prompt_ids, settings_for
from configs.schema import Settings
from examples.machine import hardware, machine, versions
from examples.traffic.chat import Domain, chat_prompts
from serving.requests import Request
from targets.find import target_folder
from targets.tokenizer import load_tokenizer

PINNED, FAST = "pinned", "fast"
TEMPERATURE = 0.7
MAX_TOKENS = 512
NUMERICS = (PINNED, FAST)
PRICE, FLIPS = "price", "flips"
PARTS = (PRICE, FLIPS)
TOKENS = 2_000_000
"""Tokens compared by pinned numerics; by fast ones, which change some, a quarter."""
SOURCE = "python -m benchmarks.numerics --parts"


def mixed(traffic: Traffic) -> Iterator[tuple[Domain, int]]:
    """(domain, number of its prompt), the domains in turn, each prompt once."""
    most = max(len(prompts) for prompts in traffic.prompts.values())
    for number in range(most):
        yield from ((d, number) for d, found in traffic.prompts.items() if number < len(found))


def requests_of(traffic: Traffic) -> list[Request]:
    """All requests of all domains, each with its own name."""
    found = {}
    for domain, number in mixed(traffic):
        request = next(traffic.requests(domain, number, frozenset(), domain))
        seed = request.sampling.seed
        assert seed is not None
        name = name_of(request.prompt_ids, seed)
        found[name] = replace(request, id=name)
    return list(found.values())


def made_with(settings: Settings) -> dict[str, Any]:
    """All that a seeded answer may depend on."""
    return {
        "target": settings.target,
        "dtype": settings.dtype,
        "numerics": settings.engine.numerics,
        "temperature": TEMPERATURE,
        "max_tokens": MAX_TOKENS,
        "gpu": sorted(set(hardware()["gpu"])),
        "torch": versions()["torch"],
    }


def flips_of(
    path: Path | None,
    settings: Settings,
    make: Callable[[], Side],
    requests: Sequence[Request],
    batch: int,
    num_tokens: int,
    seconds: float,
) -> Kept:
    """Count by one numerics, on from what ``path`` holds.

    Raises:
        ValueError: that was made with another target, numerics or device.
    """
    made = made_with(settings)
    kept = Kept(made) if path is None else load(path, made)

    def saved() -> None:
        if path is not None:
            save(path, kept)

    count(kept, make, requests, batch, num_tokens, seconds, saved)
    saved()
    return kept


def speed(
    side: Side, traffic: Traffic, batch: int, draft_k: int, turn: int, seconds: float
) -> float:
    """Tokens per second with a batch that stays full."""
    drafters = side.play(draft_k) or frozenset()
    requests = traffic.requests(ARM_DOMAINS[turn % len(ARM_DOMAINS)], 97 * turn, drafters, "speed")
    window = full_window(side.service.engine, requests, batch, seconds / 4, seconds)
    return window.num_tokens / window.seconds


def price(
    sides: dict[str, Side], traffic: Traffic, batches: list[int], turns: int, seconds: float
) -> list[dict[str, Any]]:
    """Pinned over fast, both in turn on the same requests."""
    rows = []
    for batch in batches:
        for draft_k in (0, 4):
            found: dict[str, list[float]] = {PINNED: [], FAST: []}
            for turn in range(turns):
                for name in (PINNED, FAST) if turn % 2 else (FAST, PINNED):
                    found[name].append(speed(sides[name], traffic, batch, draft_k, turn, seconds))
            ratios = [p / f for p, f in zip(found[PINNED], found[FAST], strict=True)]
            rows.append(
                {
                    "batch": batch,
                    "draft_k": draft_k,
                    "pinned_over_fast": statistics.median(ratios),
                    "pinned_tokens_per_s": statistics.median(found[PINNED]),
                    "fast_tokens_per_s": statistics.median(found[FAST]),
                }
            )
            say(str(rows[-1]))
    return rows


def flip_rows(name: str, kept: Kept) -> Iterator[Row]:
    """What was counted, to publish."""
    total = kept.total
    where = f"SmolLM2-135M, temperature {TEMPERATURE}, seeded, {name} numerics"
    across = "across K, batch and restart"
    if name == PINNED:
        yield at_least(where, "tokens compared", total.tokens, TOKENS)
        yield at_most(where, f"answers that changed {across}", total.flips, 0)
        return
    yield at_least(where, "tokens compared", total.tokens, None)
    rate = total.flips_per_million
    yield at_least(where, f"changed answers per million tokens {across}", rate, None)


def price_rows(prices: Sequence[dict[str, Any]]) -> Iterator[Row]:
    """What pinned numerics cost, to publish."""
    for row in prices:
        how = f"K = {row['draft_k']}" if row["draft_k"] else "plain"
        where = f"SmolLM2-135M, batch {row['batch']}, {how}"
        ratio = row["pinned_over_fast"]
        yield at_least(where, "tokens/s, pinned over fast", ratio, None)


def figures_of(name: str, kept: Kept) -> dict[str, Any]:
    """What was counted by one numerics, in full."""

    def told(total: Count) -> dict[str, Any]:
        return {
            "tokens": total.tokens,
            "flips": total.flips,
            "flips_per_million": total.flips_per_million,
            "flips_per_million_below": total.flips_per_million_below,
            "cut_short": total.cut_short,
            "accepted": total.accepted,
            "tokens_per_s": total.tokens_per_s,
        }

    return {
        "numerics": name,
        "total": told(kept.total),
        "ways": kept.rows(),
        "examples": kept.examples,
    }


def merged(out: Path, part: str, rows: list[dict[str, Any]], key: str) -> dict[str, Any]:
    """Rows of a part beside those of a former result that were not measured again. Rows measured
    with other hardware, versions or commit carry their own ``machine``."""
    former = json.loads(out.read_text()) if out.exists() else {}
    where = former.get("machine")
    other = {} if where == machine() else {"machine": where}
    old = {name: [{**other, **row} for row in former.get(name, [])] for name in PARTS}
    measured = {row[key] for row in rows}
    return {**old, part: [row for row in old[part] if row[key] not in measured] + rows}


def main(
    run_dir: Annotated[
        Path,
        typer.Option(help="run folder whose newest drafter is served; a random one if it is new"),
    ],
    out: Out = RESULTS / "numerics.json",
    parts: Annotated[str, typer.Option(help="price, flips")] = "price,flips",
    numerics: Annotated[str, typer.Option(help="of flips: pinned, fast")] = "pinned,fast",
    state: Annotated[
        Path | None, typer.Option(help="folder from which flips go on, and where they are kept")
    ] = None,
    tokens: Annotated[int, typer.Option(help="to compare by pinned numerics")] = TOKENS,
    batch: Annotated[int, typer.Option(help="requests at a time, unless said")] = 96,
    batches: Annotated[str, typer.Option(help="of the comparison of speed")] = "1,8,32,128",
    prompts: Annotated[int, typer.Option(help="of each domain")] = 3000,
    turns: int = 4,
    turn_s: float = 0.6,
    budget_s: Annotated[float, typer.Option(help="seconds in all")] = 300.0,
    device: str = "cuda",
) -> None:
    """Count changed answers, and compare speed."""
    began = time.monotonic()
    chosen = known("parts", parts.split(","), PARTS)
    names = known("numerics", numerics.split(","), NUMERICS)

    def settings_of(name: str) -> Settings:
        return settings_for(
            run_dir,
            device,
            "engine.max_batch=128",
            "drafter.max_draft=7",
            f"engine.numerics={name}",
            "engine.kv_memory_fraction=0.25",
        )

    def made(name: str) -> Side:
        release(torch.device(device))
        return Side(*build(settings_of(name)))

    settings = settings_of(PINNED)
    tokenizer = load_tokenizer(target_folder(settings.target, settings.target_cache))
    found = chat_prompts(dict.fromkeys(ARM_DOMAINS, prompts), seed=11, may_lack=True)
    ids = {d: [(prompt_ids(tokenizer, p), p.seed(0)) for p in asked] for d, asked in found.items()}
    traffic = Traffic(ids, TEMPERATURE, MAX_TOKENS)
    say(f"{sum(map(len, ids.values()))} prompts after {time.monotonic() - began:.1f} s")

    if PRICE in chosen:
        sides = {name: made(name) for name in NUMERICS}
        sizes = [int(size) for size in batches.split(",")]
        prices = price(sides, traffic, sizes, turns, turn_s)
        write_result(out, merged(out, PRICE, prices, "batch"))
        write_rows("numerics", price_rows(prices), f"{SOURCE} {PRICE}", out.parent)
        del sides
    if FLIPS in chosen:
        requests = requests_of(traffic)
        goals = {PINNED: tokens, FAST: tokens // 4}
        for name in names:
            others = sum(goals[n] for n in names[names.index(name) :])
            left = budget_s - (time.monotonic() - began)
            path = None if state is None else state / f"{name}.json"
            kept = flips_of(
                path, settings_of(name), partial(made, name), requests, batch, goals[name],
                left * goals[name] / others,
            )  # fmt: skip
            write_result(out, merged(out, FLIPS, [figures_of(name, kept)], "numerics"))
            source = f"{SOURCE} {FLIPS} --numerics {name}"
            write_rows("numerics", flip_rows(name, kept), source, out.parent)
    say(f"done after {time.monotonic() - began:.1f} s")


if __name__ == "__main__":
    typer.run(main)
