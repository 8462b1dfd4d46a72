"""What Learning to Draft gains at batch 1, where every K of every round is known.

    python -m benchmarks.learned_lengths --run-dir runs/lengths        # seven minutes on two cores

The engine decodes sampled text of three domains with the bundled drafter, eight requests at a time,
drafts eight tokens in every round and verifies all of them. So a round tells exactly what each K
from 0 to 8 would have brought. The rounds of one request after another are a log of batch 1. What a
round brings does not depend on step times, so one log is judged under several of them, stated here
and not measured: a constant for drafting at all, and a slope.

``ltd`` is fitted from full information on three quarters of the steps and judged on the rest
against the best fixed K, as ``trainer policy`` does, for several seeds. Traces in the folder are
used again. Writes ``learned_lengths.json`` and ``rows/learned_lengths.json`` in
``benchmarks/results``.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator
from pathlib import Path
from statistics import fmean
from typing import Annotated, Any

import numpy as np
import torch
import typer

from benchmarks.harness.arms import LEARNED
from benchmarks.harness.engines import DEMO, build
from benchmarks.harness.results import RESULTS, Out, Row, at_least, say, write_result, write_rows
from benchmarks.policies import generate
from buffer.records import Trace
from buffer.traces import traces_in
from configs.load import load_settings
from configs.schema import Settings
from policies.evaluation import best_ks, rate_of
from policies.interface import CostSample
from policies.logged import LoggedRow, LoggedStep
from policies.replayed_log import ReplayedLog
from policies.run_log import open_traces
from trainer.ltd import FullInformation, fit_full_information, judge_network, split

SOURCE = "python -m benchmarks.learned_lengths"
BATCH, MAX_DRAFT = 8, 8
TIMES = {
    "0.12 + 0.17 K": (0.12, 0.17),
    "0.02 + 0.10 K": (0.02, 0.10),
    "0.02 + 0.05 K": (0.02, 0.05),
}
"""Time that a draft of K tokens adds to a step, in plain steps: like the bundled target on a CPU,
and like larger targets on a GPU."""
PLAIN_S = 0.01


def settings_of(folder: Path) -> Settings:
    """Eight draft tokens for every request, with the figures of each, and nothing cut."""
    chosen = [
        f"run_dir={folder}", f"engine.max_batch={BATCH}", "engine.max_model_len=512",
        "drafter.suffix.enabled=false", "policy.kind=confidence",
        "policy.confidence.threshold=1e-9", "policy.cutting.packed=false",
        f"policy.draft_k={MAX_DRAFT}", "policy.guard=false", "swap.enabled=false",
    ]  # fmt: skip
    return load_settings([DEMO], chosen, {})


def alone(traces: Iterable[Trace]) -> list[LoggedStep]:
    """Rounds of one request after another, as far as their drafts were whole. K as logged is drawn,
    so that features of the log are those of any policy."""
    rng = random.Random(1)
    return [
        LoggedStep(
            LEARNED, rng.randint(1, MAX_DRAFT), 1, 1.0, "", one.version, PLAIN_S,
            (LoggedRow(len(one.draft_ids), one.num_accepted),), is_timed=False,
        )
        for trace in traces for one in trace.rounds if len(one.draft_ids) == MAX_DRAFT
    ]  # fmt: skip


def judged(steps: list[LoggedStep], fixed: float, slope: float, seeds: int) -> dict[str, Any]:
    """Gates of several fits, and what an oracle of each round would gain."""
    times = [1.0, *(1 + fixed + slope * k for k in range(1, MAX_DRAFT + 1))]
    samples = [
        CostSample(LEARNED if k else "none", k, 1, PLAIN_S * one, 0.0)
        for k, one in enumerate(times)
    ]
    log = ReplayedLog.of(steps, LEARNED, samples, MAX_DRAFT)
    rows = split(log, 0.25)
    held_out = log.rows(~rows)
    ks = best_ks(held_out, log.rows(rows))
    best = rate_of(held_out, ks)
    at, oracle = np.arange(len(ks)), ks
    for _ in range(10):
        rate = held_out.tokens[at, oracle].sum() / held_out.seconds[at, oracle].sum()
        oracle = (held_out.tokens - rate * held_out.seconds).argmax(axis=1)
    gates = []
    for seed in range(seeds):
        network = fit_full_information(log, rows, FullInformation(seed=seed))
        gate = judge_network(network, log, rows)
        say(f"{fixed} + {slope} K, seed {seed}: {gate.to_line()}")
        gates.append({"gain": gate.gain, "low": gate.low, "passed": gate.passed})
    return {
        "best_k": int(ks[0]), "oracle_gain": rate_of(held_out, oracle) / best - 1, "gates": gates
    }  # fmt: skip


def rows_of(found: dict[str, Any]) -> Iterator[Row]:
    """The claims, by the mean over the seeds."""
    for times, one in found.items():
        where = f"bundled target, temperature 0.7, batch 1, a draft takes {times} plain steps"
        gain = fmean(gate["gain"] for gate in one["gates"])
        measure = "ltd by full information, held-out steps: speed over the best fixed K"
        yield at_least(where, measure, 1 + gain, 1.02)
        share = gain / one["oracle_gain"]
        yield at_least(where, "share of the gap between best fixed K and oracle", share, 0.3)


def main(
    run_dir: Annotated[Path, typer.Option(help="folder of the traces")],
    seconds: Annotated[float, typer.Option(help="of traces")] = 240.0,
    seeds: Annotated[int, typer.Option(help="fits for each of the step times")] = 2,
    out: Out = RESULTS / "learned_lengths.json",
) -> None:
    """Make traces if there are none, and judge Learning to Draft on them."""
    torch.set_num_threads(1)
    settings = settings_of(run_dir)
    if not (run_dir / "traces").exists():
        service, _ = build(settings)
        generate(service, settings, [BATCH], seconds)
        service.engine.stop()
    steps = alone(traces_in(open_traces(settings.buffer.url, run_dir)))
    say(f"{len(steps)} rounds")
    found = {name: judged(steps, *times, seeds) for name, times in TIMES.items()}
    write_result(out, {"num_rounds": len(steps), "times": found})
    write_rows("learned_lengths", rows_of(found), SOURCE, out.parent)
    say(f"written: {out}")


if __name__ == "__main__":
    typer.run(main)
