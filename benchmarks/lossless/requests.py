"""Random requests to the real engine get the same answer with and without drafts.

Requests use every sampling field: temperature, truncation, penalties, biases, stops, log
probabilities (``oracles/random_requests.py``). Each is greedy or has a seed, so the whole answer is
compared: token ids, text, finish reason, log probabilities and the counts of ``usage``. The plain
answers come from an engine without a drafter; the others from one whose batches grow and shrink,
whose drafter and K change every step, and whose weights are swapped every 50 steps.

On a GPU numerics are pinned, so nothing may differ, not even the last bit of a log probability.
Numerics cannot be pinned on a CPU; there the engines compute in float64 and log probabilities are
compared within a tolerance.

Each row counts what was drafted, per field in use.
"""

from __future__ import annotations

import random
import tempfile
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, astuple, dataclass, fields, replace
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
from oracles.engines import Collected, run
from oracles.random_requests import TOLERANCE, Answer, parted_in, random_requests, with_ends
from serving.engine.loop import Engine
from serving.requests import Request, SamplingParams
from serving.service import Service

RUNS = (Run("bundled", "bfloat16", "pinned", 0.5), Run("bundled", "float32", "pinned", 0.5))
RUNS_ON_CPU = (Run("tiny", "float64", "fast", 0.5), Run("bundled", "float64", "fast", 0.5))
_MOST_PROMPT = 120
_LENGTHS = (*range(8, 41), 1, 2, 3)
"""Values of ``max_tokens``."""
_SHARE_SCORED = 0.5
"""Share of the random requests with log probabilities that keep them; drafts are shorter in a batch
with such requests."""
_NUM_TOLD = 5
"""Maximum number of differing requests that a row lists in full."""

USES: dict[str, Callable[[SamplingParams], bool]] = {
    "greedy": lambda p: p.temperature == 0,
    "sampled": lambda p: p.temperature > 0,
    "top_p": lambda p: p.top_p < 1,
    "top_k": lambda p: p.top_k is not None,
    "min_p": lambda p: p.min_p > 0,
    "presence_penalty": lambda p: p.presence_penalty != 0,
    "frequency_penalty": lambda p: p.frequency_penalty != 0,
    "repetition_penalty": lambda p: p.repetition_penalty != 1,
    "logit_bias": lambda p: bool(p.logit_bias),
    "stop": lambda p: bool(p.stop),
    "stop_token_ids": lambda p: bool(p.stop_token_ids),
    "logprobs": lambda p: p.logprobs is not None,
}
"""Field -> whether a request uses it."""


@dataclass(frozen=True, slots=True)
class Drafted:
    """What was drafted for one request, or for several together."""

    requests: int = 0
    requests_drafted_for: int = 0
    steps: int = 0
    drafted_tokens: int = 0
    accepted_tokens: int = 0

    @classmethod
    def of(cls, collected: Collected) -> Drafted:
        assert collected.last is not None
        spent = collected.last.stats
        return cls(1, int(spent.proposed > 0), spent.steps, spent.proposed, spent.accepted)

    def __add__(self, other: Drafted) -> Drafted:
        return Drafted(*map(sum, zip(astuple(self), astuple(other), strict=True)))


def measure(
    device: torch.device, count: int, budget_s: float, keep: Callable[[dict[str, Any]], None]
) -> None:
    """See ``measure_runs``; ``count`` is the total number of requests."""

    def text_of(row: dict[str, Any]) -> str:
        drafted_for = row["drafted"]["requests_drafted_for"]
        differ = f"{row['mismatches']} of {row['requests']} differ"
        return f"{differ}, {drafted_for} were drafted for"

    runs = RUNS if device.type == "cuda" else RUNS_ON_CPU
    measure_runs("requests", runs, device, count, budget_s, row_of, keep, text_of)


def row_of(chosen: Run, device: torch.device, count: int) -> dict[str, Any]:
    """Compare plain and drafted answers to ``count`` distinct requests."""
    started = time.perf_counter()
    numbers = random.Random(f"{chosen.target} {chosen.dtype}")
    asked, wanted = _plain(chosen, device, numbers, count)
    with (
        tempfile.TemporaryDirectory() as folder,
        engine_of(chosen, device, MAX_BATCH, Path(folder)) as service,
    ):
        swaps = Swaps(service, SWAP_EVERY)
        order = numbers.sample(asked, len(asked))
        collected = run(service.engine, order, swaps.between, in_flight)
        swaps.end()
        num_swaps = service.figures().swaps["swapped"]
    release(device)
    got = {name: Answer.of(each) for name, each in collected.items()}
    drafted = {name: Drafted.of(each) for name, each in collected.items()}
    tolerance = 0.0 if chosen.numerics == "pinned" else TOLERANCE
    return {
        "target": chosen.target,
        "dtype": chosen.dtype,
        "numerics": chosen.numerics,
        "max_batch": MAX_BATCH,
        **_compared(asked, wanted, got, tolerance),
        "swaps": num_swaps,
        "steps": swaps.num_steps,
        "drafted": asdict(sum(drafted.values(), Drafted())),
        "by_field": {field: asdict(_sum(asked, drafted, uses)) for field, uses in USES.items()},
        "seconds": time.perf_counter() - started,
    }


def _plain(
    chosen: Run, device: torch.device, numbers: random.Random, count: int
) -> tuple[list[Request], dict[str, Answer]]:
    """Requests and their answers without drafts. Stops are taken from answers to the same requests
    without stops."""
    with engine_of(chosen, device, PLAIN_BATCH, None) as service:
        first = _requests(chosen, service, numbers, count)
        whole = _answers(service.engine, first)
        asked = [with_ends(numbers, request, whole[request.id]) for request in first]
        wanted = _answers(service.engine, asked)
        assert service.figures().num_draft_tokens == 0
    release(device)
    return asked, wanted


def _requests(chosen: Run, service: Service, numbers: random.Random, count: int) -> list[Request]:
    """Requests without stops. Prompts are text for the bundled target, and random tokens for a
    target with random weights."""
    made = [longer(numbers, r) for r in random_requests(numbers, count, service.model.vocab_size)]
    if chosen.target == "bundled":
        chosen_texts = numbers.choices(texts(seed=5), k=count)
        read = [
            service.model.tokenizer(t, add_special_tokens=False)["input_ids"] for t in chosen_texts
        ]
        made = [_reading(numbers, *each) for each in zip(made, read, strict=True)]
    assert len({(r.prompt_ids, r.sampling) for r in made}) == count, "two requests are equal"
    return made


def longer(numbers: random.Random, request: Request) -> Request:
    """The request with a longer answer, so that something is drafted."""
    kept = request.sampling.logprobs if numbers.random() < _SHARE_SCORED else None
    shape = replace(request.sampling, max_tokens=numbers.choice(_LENGTHS), logprobs=kept)
    return replace(request, sampling=shape)


def _reading(numbers: random.Random, request: Request, ids: list[int]) -> Request:
    """The request with the beginning of a text as its prompt, and biases on that prompt's
    tokens."""
    prompt = tuple(ids[: numbers.randint(1, _MOST_PROMPT)])
    likely = numbers.sample(sorted(set(prompt)), len(set(prompt)))
    biases = zip(likely, (bias for _, bias in request.sampling.logit_bias), strict=False)
    return replace(
        request, prompt_ids=prompt, sampling=replace(request.sampling, logit_bias=tuple(biases))
    )


def _answers(engine: Engine, requests: list[Request]) -> dict[str, Answer]:
    return {name: Answer.of(got) for name, got in run(engine, requests).items()}


def _sum(
    asked: list[Request], drafted: dict[str, Drafted], uses: Callable[[SamplingParams], bool]
) -> Drafted:
    """Totals over the requests that use a field."""
    return sum((drafted[r.id] for r in asked if uses(r.sampling)), Drafted())


def _compared(
    asked: list[Request], wanted: dict[str, Answer], got: dict[str, Answer], tolerance: float
) -> dict[str, Any]:
    parted = {r.id: parted_in(wanted[r.id], got[r.id], tolerance) for r in asked}
    wrong = [r for r in asked if parted[r.id]]
    return {
        "requests": len(asked),
        "tokens": sum(len(answer.token_ids) for answer in wanted.values()),
        "ended_by_stop": sum(answer.finish_reason == "stop" for answer in wanted.values()),
        "logprob_tolerance": tolerance,
        "mismatches": len(wrong),
        "mismatches_by_part": {
            part.name: sum(part.name in parts for parts in parted.values())
            for part in fields(Answer)
        },
        "mismatches_by_field": {
            field: sum(uses(r.sampling) for r in wrong) for field, uses in USES.items()
        },
        "first_mismatches": [
            {
                "request": asdict(request),
                "wanted": asdict(wanted[request.id]),
                "got": asdict(got[request.id]),
            }
            for request in wrong[:_NUM_TOLD]
        ],
    }


def untried(rows: list[dict[str, Any]]) -> list[str]:
    """Fields that no drafted request used, so that the rows prove nothing about them."""
    return [f for f in USES if not any(row["by_field"][f]["drafted_tokens"] for row in rows)]


def is_sound(rows: list[dict[str, Any]]) -> bool:
    """True if nothing differs and every field was used by a request that was drafted for."""
    return not any(row["mismatches"] for row in rows) and not (rows and untried(rows))


def summary(rows: list[dict[str, Any]], count: int) -> dict[str, Any]:
    """Totals; ``count`` requests were planned."""
    names = ("requests", "tokens", "ended_by_stop", "swaps", "mismatches", "seconds")
    return {
        "requests_planned": count,
        "complete": sum(row["requests"] for row in rows) >= count,
        **{name: sum(row[name] for row in rows) for name in names},
        "drafted": asdict(_total(row["drafted"] for row in rows)),
        "by_field": {f: asdict(_total(row["by_field"][f] for row in rows)) for f in USES},
        "fields_never_drafted_for": untried(rows),
    }


def _total(figures: Iterable[dict[str, int]]) -> Drafted:
    return sum((Drafted(**each) for each in figures), Drafted())
