"""Logs of steps whose law is known, as a server would have written them."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np

from buffer.backends import open_backend
from buffer.codec import encode_trace
from buffer.interface import TraceLimits
from buffer.records import Round, Rounds, Sampling, Trace
from policies.groups import group_of
from policies.interface import CostSample
from policies.logged import LoggedRow, LoggedStep

_LIMITS = TraceLimits(segment_bytes=1 << 20, max_bytes=1 << 26, ttl_s=1e6, sync_interval_s=0.0)
DRAFTER = "eagle3"
HAZARDS = (0.8, 0.7, 0.6, 0.55, 0.5, 0.5, 0.45, 0.4)
MAX_DRAFT = len(HAZARDS)


def step_s(k: int, batch: int) -> float:
    """Seconds of a step: verification of every token costs more the larger the batch is."""
    return 0.01 * (1 + 0.05 * k + 0.004 * k * batch + (0.02 if k else 0.0))


def profile(batches: Sequence[int] = (1, 2, 4, 8, 16, 32, 64)) -> list[CostSample]:
    return [
        CostSample(DRAFTER if k else "none", k, batch, step_s(k, batch), 0.0)
        for batch in batches
        for k in range(MAX_DRAFT + 1)
    ]


TEMPERATURE = 0.7
GROUP = group_of(0, TEMPERATURE)


def expected_tokens(k: int, hazards: Sequence[float] = HAZARDS) -> float:
    """Of one row."""
    total = survival = 1.0
    for hazard in hazards[:k]:
        survival *= hazard
        total += survival
    return total


def drawn(rng: random.Random, k: int, hazards: Sequence[float]) -> LoggedRow:
    kept = 0
    while kept < k and rng.random() < hazards[kept]:
        kept += 1
    return LoggedRow(k, kept, group=GROUP)


def log(
    num_steps: int,
    choose: Callable[[random.Random, int], tuple[int, float]],
    batches: Sequence[int] = (1, 8, 32),
    hazards: Callable[[int], Sequence[float]] = lambda at: HAZARDS,
    seed: int = 0,
    noise: float = 0.05,
) -> list[LoggedStep]:
    """Steps whose K a behaviour policy chose.

    Args:
        choose: (random numbers, batch) -> K and its probability.
        hazards: number of the step -> acceptance by position.
    """
    rng = random.Random(seed)
    steps = []
    for at in range(num_steps):
        batch = batches[at * len(batches) // num_steps]
        k, propensity = choose(rng, batch)
        steps.append(
            LoggedStep(
                drafter=DRAFTER if k else "none",
                draft_k=k,
                batch=batch,
                propensity=propensity,
                policy="test",
                version=0,
                step_s=step_s(k, batch) * rng.lognormvariate(0, noise),
                rows=tuple(drawn(rng, k, hazards(at)) for _ in range(batch)),
            )
        )
    return steps


def any_k(rng: random.Random, batch: int) -> tuple[int, float]:
    """All K as likely."""
    return rng.randint(0, MAX_DRAFT), 1 / (MAX_DRAFT + 1)


def always(k: int) -> Callable[[random.Random, int], tuple[int, float]]:
    return lambda rng, batch: (k, 1.0)


def traces_of(steps: Sequence[LoggedStep], num_steps_each: int = 50) -> list[Trace]:
    """Traces as a server's recorder would have written them: request r is row r of so many steps,
    all of one batch."""
    traces = []
    for start in range(0, len(steps), num_steps_each):
        stretch = steps[start : start + num_steps_each]
        for r in range(max(len(step.rows) for step in stretch)):
            rounds, anchor = [], 1
            for at, step in enumerate(stretch, start):
                if r >= len(step.rows):
                    continue
                row = step.rows[r]
                ids = (3,) * row.num_verified
                kind = step.drafter if ids or row.considered else "none"
                rounds.append(
                    Round(
                        anchor, kind, step.version, ids, None,
                        (-0.5,) * min(row.num_accepted + 1, len(ids)), row.num_accepted, 5,
                        step.draft_k, step.propensity, step.batch, step.step_s,
                        policy=step.policy, step=at, considered=row.considered,
                        notes=step.notes, is_timed=step.is_timed,
                    )
                )  # fmt: skip
                anchor += 1 + row.num_accepted
            traces.append(
                Trace(
                    producer="server", epoch=1, seq=len(traces), request_id=f"r{len(traces)}",
                    tenant="default", target_fingerprint="ab" * 32,
                    sampling=Sampling({"temperature": TEMPERATURE}), prompt_length=2,
                    token_ids=np.full(anchor + 1, 5, np.int32), rounds=Rounds.of(rounds),
                    features=None, finished_unix_ms=start,
                )
            )  # fmt: skip
    return traces


def append_unreadable(run_dir: Path, number: int) -> None:
    """Append so many records that are no traces."""
    with open_backend("log:", run_dir).open_trace_writer(_LIMITS) as writer:
        for _ in range(number):
            writer.append(b"no trace")


def write_run(run_dir: Path, steps: Sequence[LoggedStep]) -> None:
    """A run folder with these steps, and a profile of step times."""
    with open_backend("log:", run_dir).open_trace_writer(_LIMITS) as writer:
        for trace in traces_of(steps):
            writer.append(encode_trace(trace))
    samples = [asdict(sample) for sample in profile()]
    (run_dir / "step_times.json").write_text(json.dumps({"facts": {}, "samples": samples}))
