"""An EAGLE-3 drafter for a real target, trained on the target's own traces.

Does what a server and its trainer do: decodes held-in prompts, captures every row, reads the traces
back from the log, and uses the trainer's own store, learner, gate and publication. Unlike them it
works step by step on one GPU and keeps all traces in GPU memory, so that updates never wait.

    python -m benchmarks.real.train_drafter --target runs/real/target --run-dir runs/real/run

Publishes version 1 of ``RUN_DIR/weights`` and writes ``RUN_DIR/drafter.json``.
"""

from __future__ import annotations

import copy
import math
import multiprocessing
import random
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer

from benchmarks.harness.engines import ONE_GPU, build, release
from benchmarks.harness.loops import Feed
from benchmarks.harness.results import say, write_result
from buffer.backends import open_backend
from buffer.fingerprint import target_fingerprint
from buffer.records import Trace
from buffer.traces import TraceReader
from configs.load import load_settings
from configs.schema import Settings
from drafters.samples import Sample
from drafters.trainable import trainable
from examples.corpus import Domain
from examples.train_drafter import pieces
from policies.replay import is_held_out
from serving.requests import Request, SamplingParams
from serving.service import Service
from targets.head import TargetHead, load_target_head
from targets.tokenizer import load_tokenizer
from trainer.build import expected_of
from trainer.dataset import Expected, Refusal, sample_of
from trainer.figures import UpdateReport
from trainer.gate import Judge
from trainer.learner import Learner
from trainer.packing import HeldPiece
from trainer.publish import bundle_content, publish_version
from trainer.rows import HeldSample, RowStore, memory_bytes
from trainer.start import newest_drafter
from trainer.update import batch_dtype

FIGURES = "drafter.json"
HELD_OUT_EVERY = 24
JUDGED = 96
"""Number of held-out traces used to evaluate the drafter."""
READ_AT_ONCE = 32
CLOSING_S = 15.0
"""Part of the budget reserved for evaluation and publishing."""
WRITING_S = 60.0
"""Longest wait until all traces are written."""
LAST_RATE = 0.02
"""Final learning rate, as a share of the peak."""


def settings_for(
    target: Path, run_dir: Path, device: str, batch: int, steps: int, lr: float, tokens: int
) -> Settings:
    """Settings for plain decoding with everything captured, and for a trainer of the same run."""
    chosen = [
        f"target={target}",
        f"run_dir={run_dir}",
        f"device={device}",
        f"trainer.device={device}",
        f"engine.max_batch={batch}",
        "engine.max_queue=1000000",
        "engine.max_model_len=512",
        "engine.prefill_chunk=2048",
        "engine.prefix_cache=false",
        "drafter.kind=eagle3",
        "drafter.max_draft=1",
        "drafter.suffix.enabled=false",
        "policy.kind=fixed",
        "policy.draft_k=0",
        "capture.ring_rows=400000",
        "capture.queue_traces=1000000",
        f"buffer.max_bytes={40 << 30}",
        f"buffer.segment_bytes={128 << 20}",
        "swap.enabled=false",
        "engine.draft_at_start=null",
        f"trainer.ttt_steps={steps}",
        f"trainer.lr={lr}",
        "trainer.warmup_steps=50",
        "trainer.max_sequence=512",
        "trainer.memory_fraction=0.6",
        f"trainer.batch_tokens={tokens}",
    ]
    return load_settings([ONE_GPU], chosen, {})


# Traces


@dataclass(frozen=True, slots=True)
class Ask:
    """One request to make."""

    prompt_ids: tuple[int, ...]
    temperature: float


def domain_pieces(target: Path, domain: Domain, count: int) -> list[list[int]]:
    """Training prompts. Reads thousands of files, so it runs in its own process."""
    return pieces(load_tokenizer(target), domain, "train", count, seed=5)


def asks_of(
    prompts: Sequence[list[int]], greedy_share: float, temperature: float, seed: int = 0
) -> list[Ask]:
    """Requests for the prompts in random order; ``greedy_share`` of them are greedy."""
    numbers = random.Random(seed)
    mixed = numbers.sample(list(prompts), len(prompts))
    return [
        Ask(tuple(ids), 0.0 if numbers.random() < greedy_share else temperature) for ids in mixed
    ]


def collect(
    service: Service,
    asks: Sequence[Ask],
    max_tokens: int,
    seconds: float,
    batch: int,
    *,
    ends_early: bool = False,
) -> dict[str, Any]:
    """Answer requests for ``seconds``, and write the trace of each.

    Args:
        ends_early: answers end where the target ends them, not only after ``max_tokens``.
    """
    recorder = service.recorder
    assert recorder is not None, "capture must be enabled"

    def requests() -> Iterator[Request]:
        for number, ask in enumerate(asks):
            sampling = SamplingParams(
                temperature=ask.temperature, max_tokens=max_tokens, ignore_eos=not ends_early
            )
            yield Request(f"trace-{number}", ask.prompt_ids, sampling)

    started = time.monotonic()
    recorder.start()
    try:
        feed = Feed(service.engine, requests(), batch)
        feed.run(seconds)
        feed.finish()
    finally:
        recorder.close(WRITING_S)
    return {
        "requests": feed.num_finished,
        "tokens": feed.num_tokens,
        "collect_s": time.monotonic() - started,
        "recorder": recorder.counts(),
        "rows_lost": service.figures().capture_rows_dropped,
    }


# Learning


@dataclass(frozen=True, slots=True)
class TrainingData:
    """All traces of a run, in device memory."""

    store: RowStore
    pieces: list[HeldPiece]
    held_out: list[HeldSample]
    num_refused: int

    @property
    def num_rows(self) -> int:
        """Rows to train on."""
        return sum(len(piece.rows) for piece in self.pieces)

    def draw(self, num_tokens: int, random: np.random.Generator) -> list[HeldPiece]:
        """Random pieces, each at most once, of at most ``num_tokens`` positions."""
        drawn: list[HeldPiece] = []
        total = 0
        for place in random.permutation(len(self.pieces)).tolist():
            total += len(self.pieces[place].slots)
            if drawn and total > num_tokens:
                break
            drawn.append(self.pieces[place])
        return drawn


def read_samples(
    settings: Settings, expected: Expected, seconds: float = math.inf
) -> Iterator[tuple[Trace, Sample | Refusal]]:
    """The traces of the log as samples, checked by several threads; to its end, or for at most
    ``seconds``."""
    reader = TraceReader(open_backend(settings.buffer.url, settings.run_dir))
    until = time.monotonic() + seconds

    def batches() -> Iterator[list[Trace]]:
        while time.monotonic() < until and (traces := reader.read(READ_AT_ONCE)):
            yield traces

    def pairs_of(traces: list[Trace]) -> list[tuple[Trace, Sample | Refusal]]:
        return [(t, sample_of(t, expected, settings.trainer.max_sequence)) for t in traces]

    with ThreadPoolExecutor(8) as pool:
        for job in [pool.submit(pairs_of, traces) for traces in batches()]:
            yield from job.result()


def read_data(
    settings: Settings, expected: Expected, store: RowStore, seconds: float
) -> TrainingData:
    """Read the log to its end, or for at most ``seconds``."""
    data = TrainingData(store, [], [], 0)
    for group in _grouped(read_samples(settings, expected, seconds), READ_AT_ONCE):
        sound = [sample for _, sample in group if not isinstance(sample, Refusal)]
        for held in store.put(sound):
            if is_held_out(held.key, HELD_OUT_EVERY):
                data.held_out.append(held)
            else:
                data.pieces.extend(held.pieces)
        data = replace(data, num_refused=data.num_refused + len(group) - len(sound))
    return data


def _grouped(items: Iterator[Any], count: int) -> Iterator[list[Any]]:
    """Lists of ``count`` items, the last one shorter."""
    while group := list(islice(items, count)):
        yield group


def learn(learner: Learner, data: TrainingData, seconds: float) -> tuple[UpdateReport, float]:
    """Update for some seconds while the learning rate falls linearly; returns the last report and
    the time spent."""
    numbers = np.random.default_rng(0)
    reports: list[UpdateReport] = []
    started, printed = time.monotonic(), 0.0
    while (elapsed := time.monotonic() - started) < seconds or not learner.step:
        learner.lr_scale = max(LAST_RATE, 1 - elapsed / seconds)
        reports += learner.update(data.draw(learner.settings.batch_tokens, numbers))
        if reports and elapsed - printed > 10:
            printed = elapsed
            alphas = [round(a, 3) for a in reports[-1].alpha]
            say(f"update {reports[-1].step}  loss {reports[-1].loss:.4f}  alpha {alphas}")
    reports += learner.settle()
    return reports[-1], time.monotonic() - started


def train(
    settings: Settings,
    target: Path,
    seconds: float,
    read_s: float,
    until_s: float,
) -> dict[str, Any]:
    """Read, train, evaluate, publish. Training ends by ``until_s`` on the monotonic clock."""
    device = torch.device(settings.trainer.device)
    dtype = batch_dtype(device)
    head: TargetHead = load_target_head(target, device, dtype)
    fingerprint = target_fingerprint(target)
    store = open_backend(settings.buffer.url, settings.run_dir).open_weights()
    manifest, model = newest_drafter(settings, store, head, fingerprint)
    incumbent = copy.deepcopy(model).to(device)
    learns, expected = trainable(manifest.kind), expected_of(manifest, head)

    started = time.monotonic()
    store_rows = RowStore(device, memory_bytes(settings.trainer, device))
    data = read_data(settings, expected, store_rows, read_s)
    read_s = time.monotonic() - started
    say(f"read {len(data.pieces)} pieces, {data.num_rows:,} training rows, in {read_s:.1f} s")

    learner = Learner(learns, model, head, settings.trainer, store_rows)
    seconds = min(seconds, until_s - time.monotonic())
    report, train_s = learn(learner, data, seconds)
    judge = Judge(learns, head, store_rows, incumbent, settings.trainer.gate_margin, 0.5)
    judged = judge.judge(learner.average, data.held_out[:JUDGED])
    say(f"held-out traces: {judged.to_json()}, acceptance {judged.acceptance}")
    published = publish_version(
        store,
        bundle_content(learns, learner.average),
        manifest,
        judged,
        step=learner.step,
        keep=settings.trainer.keep_versions,
    )
    return {
        "version": published.version,
        "parameters": sum(p.numel() for p in learner.model.parameters()),
        "pieces": len(data.pieces),
        "traces_refused": data.num_refused,
        "rows": data.num_rows,
        "read_s": read_s,
        "train_s": train_s,
        "updates": learner.step,
        "updates_skipped": learner.num_skipped,
        "tokens_per_update": settings.trainer.batch_tokens,
        "ttt_steps": settings.trainer.ttt_steps,
        "peak_lr": settings.trainer.lr,
        "last_loss": report.loss,
        "last_alpha": report.alpha,
        "held_out": {**judged.to_json(), "acceptance": judged.acceptance},
    }


def main(
    target: Annotated[Path, typer.Option(help="folder of the target")],
    run_dir: Annotated[Path, typer.Option(help="folder of the run: traces and weights")],
    collect_s: Annotated[float, typer.Option(help="seconds of requests that are captured")] = 50.0,
    seconds: Annotated[float, typer.Option(help="seconds of training")] = 150.0,
    read_s: Annotated[float, typer.Option(help="maximum seconds to read the traces back")] = 45.0,
    num_prompts: Annotated[int, typer.Option(help="maximum number of requests")] = 6144,
    max_tokens: int = 160,
    batch: Annotated[int, typer.Option(help="requests decoded at a time")] = 128,
    greedy_share: float = 0.6,
    temperature: Annotated[float, typer.Option(help="of the requests that are sampled")] = 0.8,
    batch_tokens: Annotated[int, typer.Option(help="positions of one update")] = 16_384,
    ttt_steps: int = 5,
    lr: float = 6e-4,
    budget_s: Annotated[float, typer.Option(help="total seconds; training gets what is left")] = (
        290.0
    ),
    device: str = "cuda",
) -> None:
    """Collect traces, train on them, publish."""
    began = time.monotonic()
    target, run_dir = target.resolve(), run_dir.resolve()
    settings = settings_for(target, run_dir, device, batch, ttt_steps, lr, batch_tokens)
    shares: dict[Domain, float] = {"python": 0.6, "c": 0.4}
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(len(shares), mp_context=context) as pool:
        jobs = [
            pool.submit(domain_pieces, target, domain, int(share * num_prompts))
            for domain, share in shares.items()
        ]
        service, _ = build(settings)
        build_s = time.monotonic() - began
        say(f"engine ready after {build_s:.1f} s")
        prompts = [ids for job in jobs for ids in job.result()]
    say(f"{len(prompts)} prompts after {time.monotonic() - began:.1f} s")
    asks = asks_of(prompts, greedy_share, temperature)
    figures = collect(service, asks, max_tokens, collect_s, batch)
    say(f"collected: {figures}")
    del service
    release(torch.device(device))
    until_s = began + budget_s - CLOSING_S
    trained = train(settings, target, seconds, read_s, until_s)
    about = {
        "collected": figures,
        "greedy_share": greedy_share,
        "sampled_temperature": temperature,
        "max_tokens": max_tokens,
        "engine_build_s": build_s,
        "whole_s": time.monotonic() - began,
    }
    write_result(run_dir / FIGURES, {**trained, **about})
    say(f"done in {time.monotonic() - began:.1f} s")


if __name__ == "__main__":
    typer.run(main)
