"""Random requests get the same answer with drafts as without, by the real engine and its programs.

Requests use every field of a client: temperature, truncation, penalties, biases, stops, log
probabilities (``oracles/random_requests.py``); each is greedy or has a seed, so that the whole
answer is compared: token ids, text, why it ended, log probabilities, and the counts that
``usage`` is made of. The plain answers come from an engine without a drafter, the others from one whose batches grow
and shrink, whose K and drafter are drawn anew every step and whose weights are swapped every 50.

Numerics are pinned on a GPU, so nothing may differ, not even the last bit of a log probability; a
CPU cannot pin them, and computes in float64 instead, to a tolerance.

Each row counts what was drafted, by the fields in use.
"""

from __future__ import annotations

import random
import tempfile
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, fields, replace
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
from oracles.engines import run
from oracles.random_requests import TOLERANCE, Answer, parted_in, random_requests, with_ends
from serving.engine.loop import Engine
from serving.engine.sequence import Sequence
from serving.requests import Request, SamplingParams
from serving.service import Service

RUNS = (Run("bundled", "bfloat16", "pinned", 0.5), Run("bundled", "float32", "pinned", 0.5))
RUNS_ON_CPU = (Run("tiny", "float64", "fast", 0.5), Run("bundled", "float64", "fast", 0.5))
_MOST_PROMPT = 120
_LENGTHS = (*range(8, 41), 1, 2, 3)
"""Values of ``max_tokens``."""
_SHARE_SCORED = 0.5
"""Of the random requests with log probabilities, beside which drafts are shorter: the others go
without them."""
_NUM_TOLD = 5
"""Requests that were answered otherwise and are written down whole."""

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
    rounds: int = 0
    """That proposed something."""
    drafted_tokens: int = 0
    accepted_tokens: int = 0

    @classmethod
    def of(cls, sequence: Sequence) -> Drafted:
        rounds = sum(bool(r.draft_ids) for r in sequence.rounds)
        return cls(1, int(rounds > 0), rounds, sequence.num_proposed, sequence.num_accepted)

    def __add__(self, other: Drafted) -> Drafted:
        return Drafted(
            self.requests + other.requests,
            self.requests_drafted_for + other.requests_drafted_for,
            self.rounds + other.rounds,
            self.drafted_tokens + other.drafted_tokens,
            self.accepted_tokens + other.accepted_tokens,
        )


def measure(
    device: torch.device, count: int, budget_s: float, keep: Callable[[dict[str, Any]], None]
) -> None:
    """See ``measure_runs``; ``count`` requests in all."""

    def told(row: dict[str, Any]) -> str:
        drafted_for = row["drafted"]["requests_drafted_for"]
        differ = f"{row['mismatches']} of {row['requests']} differ"
        return f"{differ}, {drafted_for} were drafted for"

    place = Place(device)
    runs = RUNS if place.is_gpu else RUNS_ON_CPU
    measure_runs("requests", runs, place, count, budget_s, row_of, keep, told)


def row_of(chosen: Run, place: Place, count: int) -> dict[str, Any]:
    """Plain and drafted answers to ``count`` distinct requests, compared."""
    started = time.perf_counter()
    numbers = random.Random(f"{chosen.target} {chosen.dtype}")
    asked, wanted = _plain(chosen, place, numbers, count)
    with (
        tempfile.TemporaryDirectory() as folder,
        engine_of(chosen, place, MAX_BATCH, Path(folder)) as service,
    ):
        finished: dict[str, Drafted] = {}
        service.engine.on_finished = lambda s: finished.update({s.request.id: Drafted.of(s)})
        swaps = Swaps(service, SWAP_EVERY)
        order = numbers.sample(asked, len(asked))
        got = _answers(service.engine, order, swaps.between, in_flight)
        swaps.end()
        num_swaps = service.figures().swaps["swapped"]
    release(place)
    tolerance = 0.0 if chosen.numerics == "pinned" else TOLERANCE
    return {
        "target": chosen.target,
        "dtype": chosen.dtype,
        "numerics": chosen.numerics,
        "max_batch": MAX_BATCH,
        **_compared(asked, wanted, got, tolerance),
        "swaps": num_swaps,
        "steps": swaps.num_steps,
        "drafted": asdict(sum(finished.values(), Drafted())),
        "by_field": {field: asdict(_sum(asked, finished, uses)) for field, uses in USES.items()},
        "seconds": time.perf_counter() - started,
    }


def _plain(
    chosen: Run, place: Place, numbers: random.Random, count: int
) -> tuple[list[Request], dict[str, Answer]]:
    """Requests, and their answers without drafts; stops are found in answers to the same requests
    without them."""
    with engine_of(chosen, place, PLAIN_BATCH, None) as service:
        first = _requests(chosen, service, numbers, count)
        whole = _answers(service.engine, first)
        asked = [with_ends(numbers, request, whole[request.id]) for request in first]
        wanted = _answers(service.engine, asked)
        assert service.figures().num_draft_tokens == 0
    release(place)
    return asked, wanted


def _requests(chosen: Run, service: Service, numbers: random.Random, count: int) -> list[Request]:
    """No stops yet. The bundled target reads text; one with random weights what ``random_requests``
    makes up."""
    made = [_longer(numbers, r) for r in random_requests(numbers, count, service.model.vocab_size)]
    if chosen.target == "bundled":
        chosen_texts = numbers.choices(texts(seed=5), k=count)
        read = [
            service.model.tokenizer(t, add_special_tokens=False)["input_ids"] for t in chosen_texts
        ]
        made = [_reading(numbers, *each) for each in zip(made, read, strict=True)]
    assert len({(r.prompt_ids, r.sampling) for r in made}) == count, "one was made twice"
    return made


def _longer(numbers: random.Random, request: Request) -> Request:
    """Long enough to be drafted for."""
    kept = request.sampling.logprobs if numbers.random() < _SHARE_SCORED else None
    shape = replace(request.sampling, max_tokens=numbers.choice(_LENGTHS), logprobs=kept)
    return replace(request, sampling=shape)


def _reading(numbers: random.Random, request: Request, ids: list[int]) -> Request:
    """The beginning of a text as its prompt, biases of tokens that are likely after it."""
    prompt = tuple(ids[: numbers.randint(1, _MOST_PROMPT)])
    likely = numbers.sample(sorted(set(prompt)), len(set(prompt)))
    biases = zip(likely, (bias for _, bias in request.sampling.logit_bias), strict=False)
    return replace(
        request, prompt_ids=prompt, sampling=replace(request.sampling, logit_bias=tuple(biases))
    )


def _answers(engine: Engine, requests: list[Request], *how: Any) -> dict[str, Answer]:
    """
    Args:
        how: to run the engine, see ``oracles.engines.run``.
    """
    return {name: Answer.of(got) for name, got in run(engine, requests, *how).items()}


def _sum(
    asked: list[Request], finished: dict[str, Drafted], uses: Callable[[SamplingParams], bool]
) -> Drafted:
    """Over the requests that use a field; one that failed was not finished."""
    own = (finished.get(r.id, Drafted(requests=1)) for r in asked if uses(r.sampling))
    return sum(own, Drafted())


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
    """Fields whose requests nobody drafted for: of those the rows say nothing."""
    return [f for f in USES if not any(row["by_field"][f]["rounds"] for row in rows)]


def is_sound(rows: list[dict[str, Any]]) -> bool:
    """Nothing differs, and requests that use a field were drafted for, whatever the field."""
    return not any(row["mismatches"] for row in rows) and not (rows and untried(rows))


def summary(rows: list[dict[str, Any]], count: int) -> dict[str, Any]:
    """Totals; ``count`` requests were asked for."""
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
