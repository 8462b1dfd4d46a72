"""Greedy requests to the real engine get the same bytes with and without drafts.

Drafter and K change every step; batches grow and shrink; prompts have mixed lengths and cached
prefixes; the server's own swapper swaps drafter weights every 50 steps. The plain answers come from
an engine without a drafter, in batches of another size.

With ``engine.numerics: pinned`` no byte may differ. With ``fast``, rounding depends on the shape of
the batch, so the choice may differ where two tokens tie within that rounding. In that case plain
answers at both batch sizes are also compared, and differences are measured against the rounding
(``oracles/greedy.py``).
"""

from __future__ import annotations

import random
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks.harness.engines import release
from benchmarks.lossless.engines import (
    MAX_BATCH,
    PLAIN_BATCH,
    SWAP_EVERY,
    Run,
    Swaps,
    engine_of,
    in_flight,
    measure_runs,
    texts,
)
from oracles.engines import run
from oracles.greedy import compared, greedy_requests, random_prompts
from serving.service import Service

RUNS = (
    Run("bundled", "float32", "pinned", 0.75),
    Run("tiny", "float32", "pinned", 0.25),
    Run("bundled", "bfloat16", "pinned", 0.25),
    Run("bundled", "float32", "fast", 0.25),
    Run("bundled", "bfloat16", "fast", 0.25),
)
"""The first two together decode the requested number of prompts."""
RUNS_ON_CPU = (Run("bundled", "float32", "fast", 0.75), Run("tiny", "float32", "fast", 0.25))
"""Only a GPU can pin numerics."""


def planned(device: torch.device) -> tuple[Run, ...]:
    """The runs for a device."""
    return RUNS if device.type == "cuda" else RUNS_ON_CPU


def measure(
    device: torch.device, num_prompts: int, budget_s: float, keep: Callable[[dict[str, Any]], None]
) -> None:
    """See ``measure_runs``."""

    def text_of(row: dict[str, Any]) -> str:
        differ = f"{row['mismatches']} of {row['prompts']} differ"
        return f"{differ}, plain against plain {row['plain_against_plain']}"

    runs = planned(device)
    measure_runs("greedy", runs, device, num_prompts, budget_s, row_of, keep, text_of)


def row_of(chosen: Run, device: torch.device, count: int) -> dict[str, Any]:
    started = time.perf_counter()
    numbers = random.Random(7)
    with engine_of(chosen, device, PLAIN_BATCH, None) as service:
        prompts = _prompts(chosen, service, numbers, count)
        lengths = [numbers.randint(8, 32) for _ in prompts]
        plain = list(greedy_requests(prompts, lengths, num_top=2, max_draft=0))
        wanted = run(service.engine, plain)
    release(device)
    with (
        tempfile.TemporaryDirectory() as folder,
        engine_of(chosen, device, MAX_BATCH, Path(folder)) as service,
    ):
        again = run(service.engine, plain)
        swaps = Swaps(service, SWAP_EVERY)
        drafted = list(greedy_requests(prompts, lengths))
        got = run(service.engine, drafted, swaps.between, in_flight)
        swaps.end()
        num_swaps = service.figures().swaps["swapped"]
        figures = service.engine.figures()
        row = compared(chosen.target, MAX_BATCH, prompts, wanted, again, got, figures, num_swaps)
        more = {
            "dtype": chosen.dtype,
            "numerics": chosen.numerics,
            "steps": swaps.num_steps,
            "texts_that_differ": sum(wanted[name].text != got[name].text for name in wanted),
            "seconds": time.perf_counter() - started,
        }
    release(device)
    return {**row, **more}


def _prompts(chosen: Run, service: Service, numbers: random.Random, count: int) -> list[list[int]]:
    if chosen.target != "bundled":
        return random_prompts(numbers, count, service.model.vocab_size)
    encoded = [
        service.model.tokenizer(t, add_special_tokens=False)["input_ids"] for t in texts(seed=3)
    ]
    return [ids[: numbers.randint(1, 200)] for ids in numbers.choices(encoded, k=count)]


def is_complete(rows: list[dict[str, Any]], device: torch.device) -> bool:
    """True if all planned runs were measured."""
    return len(rows) == len(planned(device))


def is_sound(rows: list[dict[str, Any]]) -> bool:
    """True if nothing differs with pinned numerics, or if there are no rows. Differences with fast
    numerics are only reported."""
    pinned = [row for row in rows if row["numerics"] == "pinned"]
    differences = ("mismatches", "plain_against_plain", "texts_that_differ", "rounding")
    return not any(row[name] for row in pinned for name in differences)


def summary(rows: list[dict[str, Any]], device: torch.device) -> dict[str, Any]:
    """Totals per numerics mode; prompts are distinct within a run only."""
    counted = (
        "prompts", "distinct_prompts", "tokens", "swaps", "drafted_tokens", "accepted_tokens",
        "plain_against_plain", "mismatches", "mismatches_beyond_ties", "texts_that_differ",
        "seconds",
    )  # fmt: skip
    kinds = sorted({row["numerics"] for row in rows}, reverse=True)
    return {
        kind: {name: sum(row[name] for row in rows if row["numerics"] == kind) for name in counted}
        for kind in kinds
    } | {"switch": "engine.numerics: pinned", "complete": is_complete(rows, device)}
