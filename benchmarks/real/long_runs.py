"""What a drafter gains that has learnt from a long stream: averages, weight decay, passes.

    python -m benchmarks.real.long_runs --run-dir runs/real/long

``benchmarks.real.ablations`` compares the first hundred updates after random weights. Here a stream
is learnt to its end, as a live trainer would: chat requests of four domains one after another and
then of the first again, taken in as they were answered, drawn by the trainer's own memory and
trained on ``trainer.replay_ratio`` times. What counts then is no longer how fast the weights move
but what they have learnt by heart, and the noise of a constant learning rate.

A figure is tokens per step at K = 4, simulated on held-out requests of the same domain: once
``--soon`` requests of a domain were learnt, at the end of each domain, and on all of them after the
stream. ``alpha`` is the acceptance of a first draft token where the drafter trains; what it lies
above the held-out one was learnt by heart. Averages of several decays are kept of the same updates.

Writes ``long_runs.json`` and ``rows/long_runs.json`` in ``benchmarks/results``.
"""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer

from benchmarks.harness.engines import release
from benchmarks.harness.results import RESULTS, Out, Row, say, write_result, write_rows
from benchmarks.real.ablations import STORES, Held, Variant, enough, new_learner, stored, traces_of
from benchmarks.real.choosing import ARM_DOMAINS, collecting_settings, settings_for
from drafters.samples import Sample
from examples.traffic.chat import Domain
from targets.head import TargetHead
from trainer.gate import Judge
from trainer.learner import Learner
from trainer.replay import Memory
from trainer.rows import RowStore
from trainer.update import Weights, update_average

DECAYS = (0.96, 0.99, 0.998, 0.9995)
PORTION = 32
"""Requests taken in at a time."""
STREAM = ("trainer.recent_traces=2048", "trainer.reservoir_traces=2048")
"""As ``configs/one_gpu.yaml`` has it."""


def _stream(name: str, *chosen: str) -> Variant:
    return Variant(name, (*STREAM, *chosen))


VARIANTS = (
    _stream("as shipped"),
    _stream("weight decay 0.1", "trainer.weight_decay=0.1"),
    _stream("eight passes", "trainer.replay_ratio=8"),
    _stream("eight passes, weight decay 0.1", "trainer.replay_ratio=8", "trainer.weight_decay=0.1"),
    _stream("weight decay 0.3", "trainer.weight_decay=0.3"),
    _stream("Muon, lr 1e-3", "trainer.optimizer=muon", "trainer.lr=1e-3"),
    _stream("two passes", "trainer.replay_ratio=2"),
    _stream("lr 5e-4", "trainer.lr=5e-4"),
    _stream("Muon, lr 3e-3", "trainer.optimizer=muon", "trainer.lr=3e-3"),
    _stream("half of a batch from all that is held", "trainer.reservoir_share=0.5"),
    _stream("16,384 traces held", "trainer.recent_traces=4096", "trainer.reservoir_traces=12288"),
    _stream("loss: forward KL", "trainer.loss=forward_kl"),
    _stream("4,096 tokens", "trainer.batch_tokens=4096"),
)
"""Those that promise most come first: a budget may end before the last."""


@dataclass(frozen=True, slots=True)
class Bench:
    """What all variants share."""

    device: torch.device
    head: TargetHead
    fingerprint: str
    blocks: list[tuple[Domain, list[Sample]]]
    """The stream: requests to learn from, domain by domain."""
    judges: dict[Domain, Held]
    judging: RowStore
    run_dir: Path
    soon: int


def averaged(learner: Learner) -> dict[float, Weights]:
    """Further running averages of the weights in training, by decay."""
    return {
        decay: replace(
            learner.weights,
            average=copy.deepcopy(learner.average),
            num_averaged=torch.zeros_like(learner.weights.num_averaged),
        )
        for decay in DECAYS
    }


def run_one(bench: Bench, variant: Variant, seed: int) -> dict[str, Any]:
    """Learn the stream and measure on the way."""
    settings = settings_for(bench.run_dir, str(bench.device), *variant.chosen, f"seed={seed}")
    store = RowStore(bench.device, 8 << 30 if bench.device.type == "cuda" else 1 << 30)
    store.prepare(bench.blocks[0][1][0])
    learner = new_learner(bench.head, bench.fingerprint, settings, store)
    memory = Memory(settings.trainer, seed, store)
    averages = averaged(learner)
    never = torch.zeros((), dtype=torch.bool, device=bench.device)
    judge = Judge(learner.trainable, bench.head, bench.judging, learner.average, 1.0, 0.5)
    random = np.random.default_rng(seed)
    alphas: list[float] = []
    figures: dict[str, Any] = {"variant": variant.name, "seed": seed, "measured": []}
    began = time.monotonic()

    def measure(where: str, domains: Sequence[Domain]) -> None:
        for domain in domains:
            held = bench.judges[domain].held_out
            found = {d: judge.judge(one.average, held) for d, one in averages.items()}
            first = judge.judge(learner.average, held)
            figures["measured"].append(
                {
                    "where": where,
                    "domain": domain,
                    "shipped": first.candidate,
                    "averages": {str(d): one.candidate for d, one in found.items()},
                    "alpha": statistics.fmean(alphas[-32:]) if alphas else None,
                    "acceptance": [round(float(a), 4) for a in first.acceptance],
                }
            )

    for number, (domain, samples) in enumerate(bench.blocks):
        for start in range(0, len(samples), PORTION):
            if start <= bench.soon < start + PORTION:
                measure(f"soon after the beginning of block {number}", (domain,))
            memory.take_in(samples[start : start + PORTION])
            while memory.waits_for() is None and (parts := memory.draw(random)):
                reports = learner.update([piece for _, piece in parts])
                for decay, weights in averages.items():
                    update_average(weights, never, decay)
                memory.trained_rows += sum(len(piece.rows) for _, piece in parts)
                alphas += [float(report.alpha[0]) for report in reports]
        learner.settle()
        measure(f"end of block {number}", (domain,))
    measure("end", list(bench.judges))
    figures["seconds"] = time.monotonic() - began
    figures["updates"], figures["skipped"] = learner.step, learner.num_skipped
    figures["held"] = len(memory.turns.samples)
    return figures


def summary(run: dict[str, Any]) -> dict[str, float]:
    """What counts, of one run: a mean over domains for each moment and each average."""
    found: dict[str, float] = {}
    for moment in ("soon", "end of", "end"):
        exact = moment == "end"
        rows = [
            row
            for row in run["measured"]
            if (row["where"] == "end" if exact else row["where"].startswith(moment))
        ]
        name = {"soon": "soon after a shift", "end of": "end of a domain", "end": "all, at the end"}
        found[name[moment]] = statistics.fmean(row["shipped"] for row in rows)
        for decay in rows[0]["averages"]:
            values = [row["averages"][decay] for row in rows]
            found[f"{name[moment]}, averaged by {decay}"] = statistics.fmean(values)
    return found


def rows_of(runs: Sequence[dict[str, Any]]) -> list[Row]:
    """Each variant's medians over the seeds."""
    by_variant: dict[str, list[dict[str, float]]] = {}
    for run in runs:
        by_variant.setdefault(run["variant"], []).append(summary(run))
    return [
        Row(
            f"{name}, {len(found)} seeds",
            f"tokens per step at K = 4, {measure}",
            statistics.median(one[measure] for one in found),
            None,
            None,
        )
        for name, found in by_variant.items()
        for measure in found[0]
    ]


def stream_of(
    samples: dict[int, Sample], held_out: int
) -> tuple[list[tuple[Domain, list[Sample]]], dict[int, Sample]]:
    """The stream to learn from, and the requests that judge: the first of each domain."""
    blocks: list[tuple[Domain, list[Sample]]] = []
    judges: dict[int, Sample] = {}
    num = len(ARM_DOMAINS)
    for place, domain in enumerate(ARM_DOMAINS):
        numbers = [n for n in sorted(samples) if n % num == place]
        judges |= {n: samples[n] for n in numbers[:held_out]}
        blocks.append((domain, [samples[n] for n in numbers[held_out:]]))
    first, own = blocks[0]
    half = len(own) // 2
    return [(first, own[:half]), *blocks[1:], (first, own[half:])], judges


def main(
    run_dir: Annotated[Path, typer.Option(help="folder of the run: traces")],
    out: Out = RESULTS / "long_runs.json",
    prompts: Annotated[int, typer.Option(help="of each domain")] = 2600,
    collect_batch: Annotated[int, typer.Option(help="requests decoded at a time")] = 256,
    collect_s: float = 60.0,
    held_out: Annotated[int, typer.Option(help="of each domain, never trained on")] = 128,
    soon: Annotated[int, typer.Option(help="requests after a shift")] = 256,
    seeds: int = 1,
    first_seed: int = 0,
    only: Annotated[str, typer.Option(help="variants whose names contain one of these, by ;")] = "",
    budget_s: Annotated[float, typer.Option(help="seconds in all")] = 540.0,
    device: str = "cuda",
) -> None:
    """Collect traces, then learn their stream with every variant and seed."""
    began, where = time.monotonic(), torch.device(device)
    settings = collecting_settings(run_dir, device, collect_batch)
    head, fingerprint, samples = traces_of(settings, prompts, collect_s, where)
    blocks, judges = stream_of(samples, held_out)
    enough(len(samples), list(dict.fromkeys(domain for domain, own in blocks if not own)))
    judging, held = stored(judges, held_out, STORES["bfloat16"], where)
    bench = Bench(where, head, fingerprint, blocks, held, judging, run_dir, soon)
    num = sum(len(samples) for _, samples in blocks)
    say(f"{num} traces to learn from after {time.monotonic() - began:.1f} s")
    wanted = [name for name in only.split(";") if name]
    runs: list[dict[str, Any]] = []
    for seed in range(first_seed, first_seed + seeds):
        for variant in VARIANTS:
            is_wanted = not wanted or any(name in variant.name for name in wanted)
            if not is_wanted or time.monotonic() - began > budget_s:
                continue
            runs.append(run_one(bench, variant, seed))
            about = {name: round(value, 3) for name, value in summary(runs[-1]).items()}
            say(f"{time.monotonic() - began:.0f} s  {variant.name}, seed {seed}: {about}")
            release(where)
            write_result(out, {"stream": num, "runs": runs})
            write_rows("long_runs", rows_of(runs), "python -m benchmarks.real.long_runs")


if __name__ == "__main__":
    typer.run(main)
