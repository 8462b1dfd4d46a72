"""Greedy requests get the same bytes with drafts as without, by the real engine and its programs.

Drafts of any length by any drafter, a new choice every step; batches that grow and shrink; prompts
of mixed lengths, cached prefixes; drafter weights swapped every 50 steps by the server's own
swapper. The plain answers come from an engine without a drafter, in batches of another size.

``engine.numerics: pinned`` is the switch under which no byte may differ. By ``fast`` numerics a
pass rounds as its shape makes it, and where two tokens tie within that rounding, the choice may
differ: there plain answers in both batch sizes are compared as well, and what differs is measured
against the rounding (``benchmarks/lossless.py``).
"""

from __future__ import annotations

import random
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks.engine.engines import Place, release
from benchmarks.lossless_gpu.engines import (
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
from benchmarks.lossless_rows import compared, greedy_requests, random_prompts
from oracles.engines import run
from serving.service import Service

RUNS = (
    Run("bundled", "float32", "pinned", 0.75),
    Run("tiny", "float32", "pinned", 0.25),
    Run("bundled", "bfloat16", "pinned", 0.25),
    Run("bundled", "float32", "fast", 0.25),
    Run("bundled", "bfloat16", "fast", 0.25),
)
"""The first two decode all the prompts that were asked for between them."""
RUNS_ON_CPU = (Run("bundled", "float32", "fast", 0.75), Run("tiny", "float32", "fast", 0.25))
"""Numerics can be pinned on a GPU only."""


def planned(device: torch.device) -> tuple[Run, ...]:
    """The runs of a device."""
    return RUNS if Place(device).is_gpu else RUNS_ON_CPU


def measure(
    device: torch.device, num_prompts: int, budget_s: float, keep: Callable[[dict[str, Any]], None]
) -> None:
    """See ``measure_runs``."""

    def told(row: dict[str, Any]) -> str:
        differ = f"{row['mismatches']} of {row['prompts']} differ"
        return f"{differ}, plain against plain {row['plain_against_plain']}"

    runs, place = planned(device), Place(device)
    measure_runs("greedy", runs, place, num_prompts, budget_s, _row, keep, told)


def _row(chosen: Run, place: Place, count: int) -> dict[str, Any]:
    started = time.perf_counter()
    numbers = random.Random(7)
    with engine_of(chosen, place, PLAIN_BATCH, None) as service:
        prompts = _prompts(chosen, service, numbers, count)
        lengths = [numbers.randint(8, 32) for _ in prompts]
        plain = list(greedy_requests(prompts, lengths, num_top=2, max_draft=0))
        wanted = run(service.engine, plain)
    release(place)
    with (
        tempfile.TemporaryDirectory() as folder,
        engine_of(chosen, place, MAX_BATCH, Path(folder)) as service,
    ):
        again = run(service.engine, plain)
        swaps = Swaps(service, SWAP_EVERY)
        drafted = list(greedy_requests(prompts, lengths))
        got = run(service.engine, drafted, swaps.between, in_flight)
        swaps.end()
        row = compared(chosen.target, MAX_BATCH, prompts, wanted, again, got, service.engine)
        more = {
            "dtype": chosen.dtype,
            "numerics": chosen.numerics,
            "swaps": service.figures().swaps["swapped"],
            "steps": swaps.num_steps,
            "texts_that_differ": sum(wanted[name].text != got[name].text for name in wanted),
            "seconds": time.perf_counter() - started,
        }
    release(place)
    return {**row, **more}


def _prompts(chosen: Run, service: Service, numbers: random.Random, count: int) -> list[list[int]]:
    if chosen.target != "bundled":
        return random_prompts(numbers, count, service.model.vocab_size)
    encoded = [
        service.model.tokenizer(t, add_special_tokens=False)["input_ids"] for t in texts(seed=3)
    ]
    return [ids[: numbers.randint(1, 200)] for ids in numbers.choices(encoded, k=count)]


def is_complete(rows: list[dict[str, Any]], device: torch.device) -> bool:
    """Every planned run is there."""
    return len(rows) == len(planned(device))


def is_sound(rows: list[dict[str, Any]]) -> bool:
    """By pinned numerics nothing differs, true of no rows too; what fast ones do is told and not
    judged."""
    pinned = [row for row in rows if row["numerics"] == "pinned"]
    differences = ("mismatches", "plain_against_plain", "texts_that_differ", "rounding")
    return not any(row[name] for row in pinned for name in differences)


def summary(rows: list[dict[str, Any]], device: torch.device) -> dict[str, Any]:
    """Totals by numerics; prompts that are distinct are so within a run."""
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
