"""What pinned numerics cost on a real target, and how often a seeded answer changes without them.

    python -m benchmarks.numerics --run-dir runs/bench_real/0     # a finished demo's newest drafter

``engine.numerics: pinned`` promises that a seeded answer does not depend on what is drafted, on the
other requests of the batch, or on a restart. Under each numerics, chat requests of four domains are
answered with seeds at temperature 0.7, first by plain decoding with ``--batch`` requests at a time,
then once for every other way: K = 1, 2, 4 and 7, the policy's own choice, batches of 1, 8 and 128,
and by an engine that was built again. A flip is an answer that differs from the first one; of it,
only the first differing token is counted, since all that follows has another prefix.

Both engines stay loaded, and their speed is compared in turn: tokens per second with a full batch,
plain and at K = 4, pinned over fast, medians of the turns.

Writes ``numerics.json`` and ``rows/numerics.json`` in ``benchmarks/results``.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from benchmarks.harness.arms import LEARNED
from benchmarks.harness.engines import build, release
from benchmarks.harness.loops import Feed, clear, full_window
from benchmarks.harness.policy import PolicySwitch
from benchmarks.harness.results import (
    RESULTS,
    Out,
    Row,
    at_least,
    at_most,
    say,
    write_result,
    write_rows,
)
from benchmarks.real.choosing import ARM_DOMAINS, Traffic, prompt_ids, settings_for
from examples.traffic.chat import chat_prompts
from policies.fixed import FixedPolicy
from serving.requests import Output, Request
from serving.service import Service
from targets.find import target_folder
from targets.tokenizer import load_tokenizer

PINNED, FAST = "pinned", "fast"
TEMPERATURE = 0.7
MAX_TOKENS = 512
MOST_TOKENS = {PINNED: 2_000_000, FAST: 500_000}
"""Tokens that are compared under each numerics, unless time runs out before."""


@dataclass(frozen=True, slots=True)
class Way:
    """One way to decode the same requests."""

    name: str
    batch: int
    draft_k: int | None
    """``None``: the policy chooses."""
    rebuilt: bool = False


@dataclass(slots=True)
class Compared:
    """Answers of one way beside those of the first."""

    answers: int = 0
    tokens: int = 0
    """Tokens up to the first difference, that one included."""
    flips: int = 0


@dataclass(slots=True)
class Side:
    """An engine under one numerics."""

    service: Service
    policy: PolicySwitch

    def play(self, draft_k: int | None) -> frozenset[str] | None:
        """Play a fixed K, or the settings' own policy; returns the drafters a request may use."""
        if draft_k is None:
            self.policy.play(None)
            return None
        kind = LEARNED if draft_k else "none"
        self.policy.play(FixedPolicy(kind, draft_k, needs_match=False))
        return frozenset({LEARNED}) if draft_k else frozenset()


def ways(batch: int) -> Iterator[Way]:
    """All ways but the first, plain decoding with ``batch`` requests at a time."""
    yield from (Way(f"K = {k}", batch, k) for k in (1, 2, 4, 7))
    yield Way("the policy's choice", batch, None)
    yield Way("batch 128, K = 4", 128, 4)
    yield Way("batch 8, K = 4", 8, 4)
    yield Way("batch 1, plain", 1, 0)
    yield Way("after a restart, K = 4", batch, 4, rebuilt=True)


def mixed(traffic: Traffic) -> Iterator[tuple[str, int]]:
    """(domain, number of its prompt), the domains in turn, each prompt once."""
    most = max(len(prompts) for prompts in traffic.prompts.values())
    for number in range(most):
        yield from ((d, number) for d, found in traffic.prompts.items() if number < len(found))


@torch.inference_mode()
def answer(
    side: Side, traffic: Traffic, way: Way, most: int, seconds: float
) -> dict[str, list[int]]:
    """Tokens of finished answers by request id, until ``most`` tokens or ``seconds`` are over."""
    drafters = side.play(way.draft_k)
    found: dict[str, list[int]] = {}
    over: set[str] = set()

    def requests() -> Iterator[Request]:
        for domain, number in mixed(traffic):
            request = next(traffic.requests(domain, number, drafters or frozenset(), domain))
            yield request

    def each(request: Request, output: Output) -> None:
        found.setdefault(request.id, []).extend(output.token_ids)
        if output.finish_reason in ("stop", "length"):  # others were cancelled at the end
            over.add(request.id)

    engine = side.service.engine
    clear(engine)
    feed = Feed(engine, requests(), way.batch, each=each)
    until = time.monotonic() + seconds
    while engine.inbox.num_inflight() and feed.num_tokens < most and time.monotonic() < until:
        feed.run(0.5)
    if feed.num_tokens < most and time.monotonic() < until:
        feed.finish()
    feed.stop()
    return {name: tokens for name, tokens in found.items() if name in over}


def compare(first: dict[str, list[int]], other: dict[str, list[int]]) -> Compared:
    """Count flips over the answers that both have."""
    done = Compared()
    for name in first.keys() & other.keys():
        ours, theirs = first[name], other[name]
        same = next(
            (n for n, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b),
            min(len(ours), len(theirs)),
        )
        differs = ours != theirs
        done.answers += 1
        done.tokens += same + differs
        done.flips += differs
    return done


def count_flips(
    sides: dict[str, Side],
    numerics: str,
    traffic: Traffic,
    batch: int,
    seconds: float,
    rebuild: Any,
) -> list[dict[str, Any]]:
    """Rows of all ways under one numerics."""
    began = time.monotonic()
    all_ways = list(ways(batch))
    share = MOST_TOKENS[numerics] // (len(all_ways) - 1)
    first = answer(sides[numerics], traffic, Way("plain", batch, 0), share, seconds / 6)
    say(f"{numerics}: {sum(map(len, first.values()))} tokens to compare with")
    rows = []
    for number, way in enumerate(all_ways):
        left = seconds - (time.monotonic() - began)
        side = rebuild(numerics) if way.rebuilt else sides[numerics]
        found = answer(side, traffic, way, share, left / (len(all_ways) - number))
        done = compare(first, found)
        rows.append(
            {
                "numerics": numerics,
                "way": way.name,
                "answers": done.answers,
                "tokens": done.tokens,
                "flips": done.flips,
            }
        )
        say(f"{numerics}, {way.name}: {rows[-1]}")
    return rows


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


def claims(flips: list[dict[str, Any]], prices: list[dict[str, Any]]) -> Iterator[Row]:
    """The rows to publish."""
    for name in (PINNED, FAST):
        of_it = [row for row in flips if row["numerics"] == name]
        if not of_it:
            continue
        tokens, changed = sum(r["tokens"] for r in of_it), sum(r["flips"] for r in of_it)
        where = f"SmolLM2-135M, temperature {TEMPERATURE}, seeded, {name} numerics"
        if name == PINNED:
            yield at_least(where, "tokens compared", tokens, 2_000_000)
            yield at_most(where, "answers that changed across K, batch and restart", changed, 0)
        else:
            yield at_least(where, "tokens compared", tokens, None)
            rate = 1e6 * changed / max(tokens, 1)
            yield at_least(where, "changed answers per million tokens", rate, None)
    for row in prices:
        how = f"K = {row['draft_k']}" if row["draft_k"] else "plain"
        yield at_least(
            f"SmolLM2-135M, batch {row['batch']}, {how}",
            "tokens/s, pinned over fast",
            row["pinned_over_fast"],
            None,
        )


def main(
    run_dir: Annotated[Path, typer.Option(help="run folder whose newest drafter is served")],
    out: Out = RESULTS / "numerics.json",
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

    def made(numerics: str) -> Side:
        settings = settings_for(
            run_dir,
            device,
            "engine.max_batch=128",
            "drafter.max_draft=7",
            f"engine.numerics={numerics}",
            "engine.kv_memory_fraction=0.25",
        )
        return Side(*build(settings))

    sides = {name: made(name) for name in (PINNED, FAST)}
    settings = settings_for(run_dir, device)
    tokenizer = load_tokenizer(target_folder(settings.target, settings.target_cache))
    found = chat_prompts(dict.fromkeys(ARM_DOMAINS, prompts), seed=11, may_lack=True)
    ids = {d: [(prompt_ids(tokenizer, p), p.seed(0)) for p in asked] for d, asked in found.items()}
    traffic = Traffic(ids, TEMPERATURE, MAX_TOKENS)
    say(f"both engines ready after {time.monotonic() - began:.1f} s")

    sizes = [int(size) for size in batches.split(",")]
    prices = price(sides, traffic, sizes, turns, turn_s)
    flips: list[dict[str, Any]] = []
    left = budget_s - (time.monotonic() - began)
    for name, share in ((PINNED, 0.8), (FAST, 0.2)):
        flips += count_flips(sides, name, traffic, batch, left * share, made)
        write_result(out, {"flips": flips, "price": prices})
        write_rows("numerics", claims(flips, prices), "python -m benchmarks.numerics")
        release(torch.device(device))
    say(f"done after {time.monotonic() - began:.1f} s")


if __name__ == "__main__":
    typer.run(main)
