"""An EAGLE-3 drafter for a real target, trained on the target's own traces.

Does what a server and its trainer do: sends held-in prompts to the engine, captures every row,
reads the traces back from the log, and uses the trainer's own learner, gate and publication. Unlike
them it does so step by step on one GPU, and keeps all traces in its memory, so that updates never
wait.

    python -m benchmarks.real.train_drafter --target runs/real/target --run-dir runs/real/run

Publishes version 1 of ``RUN_DIR/weights`` and writes ``RUN_DIR/drafter.json``.

Shapes: B sequences, S positions (padded).
"""

from __future__ import annotations

import copy
import gc
import json
import multiprocessing
import random
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import Tensor

from benchmarks.harness.engines import ONE_GPU, build
from benchmarks.harness.results import say
from buffer.backends import open_backend
from buffer.fingerprint import target_fingerprint
from buffer.records import Trace
from buffer.traces import TraceReader
from configs.load import load_settings
from configs.schema import Settings
from drafters.eagle3.batch import TTTBatch, collate
from drafters.samples import Sample
from drafters.trainable import trainable
from examples.corpus import Domain
from examples.train_drafter import pieces
from policies.replay import is_held_out
from serving.requests import Output, Request, SamplingParams
from serving.service import Service
from targets.head import TargetHead, load_target_head
from targets.load import load_tokenizer
from trainer.build import expected_of
from trainer.dataset import Expected, Refusal, sample_of
from trainer.gate import Judge
from trainer.learner import Learner, UpdateReport, batch_dtype
from trainer.publish import publish_version
from trainer.start import newest_drafter

FIGURES = "drafter.json"
HELD_OUT_EVERY = 24
JUDGED = 96
"""Held-out traces that judge the drafter."""
READ_AT_ONCE = 32
CLOSING_S = 15.0
"""Kept of the budget for judging and publishing."""
LAST_RATE = 0.02
"""Share of the learning rate reached when the time is over."""


def settings_for(
    target: Path, run_dir: Path, device: str, batch: int, steps: int, lr: float
) -> Settings:
    """Plain decoding with everything captured, and a trainer for the same run."""
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
        f"trainer.ttt_steps={steps}",
        f"trainer.lr={lr}",
        "trainer.warmup_steps=50",
        "trainer.max_sequence=512",
    ]
    return load_settings([ONE_GPU], chosen, {})


# Traces


@dataclass(frozen=True, slots=True)
class Ask:
    """One request to make."""

    prompt_ids: tuple[int, ...]
    temperature: float


def domain_pieces(target: Path, domain: Domain, count: int) -> list[list[int]]:
    """Held-in prompts; runs in a process of its own, since reading thousands of files takes one."""
    return pieces(load_tokenizer(target), domain, "train", count, seed=5)


def asks_of(
    prompts: Sequence[list[int]], greedy_share: float, temperature: float, seed: int = 0
) -> list[Ask]:
    """The prompts in random order, a share of them greedy."""
    numbers = random.Random(seed)
    mixed = numbers.sample(list(prompts), len(prompts))
    return [
        Ask(tuple(ids), 0.0 if numbers.random() < greedy_share else temperature) for ids in mixed
    ]


def collect(
    service: Service, asks: Sequence[Ask], max_tokens: int, seconds: float, batch: int
) -> dict[str, Any]:
    """Answer requests until the time is over; twice the engine's batch is under way."""
    engine = service.engine
    room = threading.Semaphore(2 * batch)
    lock = threading.Lock()
    counts = {"finished": 0, "failed": 0, "tokens": 0}

    def take(output: Output) -> None:
        with lock:
            counts["tokens"] += len(output.token_ids)
            if output.finish_reason is not None:
                ended_well = output.finish_reason in ("stop", "length")
                counts["finished" if ended_well else "failed"] += 1
                room.release()

    started = time.monotonic()
    num_sent = 0
    for number, ask in enumerate(asks):
        while not room.acquire(timeout=0.5):
            if time.monotonic() - started > 2 * seconds + 60:
                raise RuntimeError("the engine answers no more")
        if time.monotonic() - started > seconds:
            break
        sampling = SamplingParams(
            temperature=ask.temperature, max_tokens=max_tokens, ignore_eos=True
        )
        engine.inbox.submit(Request(f"trace-{number}", ask.prompt_ids, sampling), take)
        num_sent += 1
        if num_sent % 512 == 0:
            elapsed = time.monotonic() - started
            say(f"{num_sent} requests sent, {counts['tokens'] / elapsed:,.0f} tokens/s")
    while counts["finished"] + counts["failed"] < num_sent:
        time.sleep(0.02)
        if time.monotonic() - started > 2 * seconds + 120:
            raise RuntimeError("the engine answers no more")
    elapsed = time.monotonic() - started
    return {"requests": num_sent, **counts, "collect_s": elapsed}


def wait_for_recorder(service: Service, patience_s: float) -> dict[str, int]:
    """Until every trace is on the disk, or patience ends; the recorder's counts."""
    until = time.monotonic() + patience_s
    while True:
        counts = service.figures().traces
        on_the_way = counts["queued"] - sum(counts[k] for k in ("written", "dropped", "failed"))
        if not on_the_way or time.monotonic() > until:
            return counts
        time.sleep(0.1)


# Learning


@dataclass(frozen=True, slots=True)
class Lessons:
    """What the learner is given: all sequences in the memory of the device."""

    everything: TTTBatch
    """Padded to one length."""
    held_out: list[Sample]
    num_refused: int

    def draw(self, count: int, generator: torch.Generator) -> TTTBatch:
        """Random sequences."""
        total = len(self.everything.token_ids_BS)
        index = torch.randperm(total, generator=generator)[:count]
        index = index.to(self.everything.token_ids_BS.device)
        return _each(lambda *parts: parts[0].index_select(0, index), self.everything)


def _each(do: Any, *batches: TTTBatch) -> TTTBatch:
    """``do`` on each field of some batches."""
    names = [f.name for f in fields(TTTBatch)]
    return TTTBatch(*(do(*(getattr(b, name) for b in batches)) for name in names))


def padded(batch: TTTBatch, length: int) -> TTTBatch:
    """A batch with S = ``length``; what is added is not known and has no loss."""

    def pad(tensor: Tensor) -> Tensor:
        wide = tensor.new_zeros(len(tensor), length, *tensor.shape[2:])
        wide[:, : tensor.shape[1]] = tensor
        return wide

    found = _each(pad, batch)
    positions = torch.arange(length, device=found.positions_BS.device).expand(
        found.positions_BS.shape
    )
    return TTTBatch(
        found.token_ids_BS, positions.clone(), found.features_BSF, found.last_hidden_BSH,
        found.known_BS, found.loss_BS,
    )  # fmt: skip


def read_lessons(
    settings: Settings, expected: Expected, device: torch.device, length: int, seconds: float
) -> Lessons:
    """Read the log until its end, or until the time is over."""
    reader = TraceReader(open_backend(settings.buffer.url, settings.run_dir))
    until = time.monotonic() + seconds

    def batches() -> Iterator[list[Trace]]:
        while time.monotonic() < until and (traces := reader.read(READ_AT_ONCE)):
            yield traces

    def lessons_of(traces: list[Trace]) -> tuple[TTTBatch | None, list[Sample], int]:
        samples = [sample_of(t, expected, settings.trainer.max_sequence) for t in traces]
        sound = [s for s in samples if not isinstance(s, Refusal)]
        held_out = [s for s in sound if is_held_out(s.key, HELD_OUT_EVERY)]
        pupils = [s for s in sound if not is_held_out(s.key, HELD_OUT_EVERY)]
        parts = [(s, piece) for s in pupils for piece in s.pieces]
        if not parts:
            return None, held_out, len(samples) - len(sound)
        batch = collate(parts).to(device, batch_dtype(device))
        return padded(batch, length), held_out, len(samples) - len(sound)

    with ThreadPoolExecutor(8) as pool:
        jobs: list[Future[Any]] = [pool.submit(lessons_of, traces) for traces in batches()]
        found = [job.result() for job in jobs]
    groups = [batch for batch, _, _ in found if batch is not None]
    everything = _each(lambda *parts: torch.cat(parts), *groups)
    held_out = [s for _, samples, _ in found for s in samples]
    return Lessons(everything, held_out, sum(refused for _, _, refused in found))


def learn(
    learner: Learner, lessons: Lessons, seconds: float, sequences: int
) -> tuple[UpdateReport, float]:
    """Updates until the time is over, the learning rate falling linearly; the last report, and the
    seconds."""
    generator = torch.Generator().manual_seed(0)
    started, printed, report = time.monotonic(), 0.0, None
    while (elapsed := time.monotonic() - started) < seconds or report is None:
        learner.lr_scale = max(LAST_RATE, 1 - elapsed / seconds)
        report = learner.update(lessons.draw(sequences, generator))
        if elapsed - printed > 10:
            printed = elapsed
            alphas = [round(a, 3) for a in report.alpha]
            say(f"update {learner.step}  loss {report.loss:.4f}  alpha {alphas}")
    return report, time.monotonic() - started


def train(
    settings: Settings,
    target: Path,
    seconds: float,
    read_s: float,
    sequences: int,
    length: int,
    until_s: float,
) -> dict[str, Any]:
    """Read, learn, judge, publish. Learning ends before the monotonic time ``until_s``."""
    device = torch.device(settings.trainer.device)
    dtype = batch_dtype(device)
    head: TargetHead = load_target_head(target, device, dtype)
    fingerprint = target_fingerprint(target)
    store = open_backend(settings.buffer.url, settings.run_dir).open_weights()
    manifest, model = newest_drafter(settings, store, head, fingerprint)
    incumbent = copy.deepcopy(model).to(device)
    learns, expected = trainable(manifest.kind), expected_of(manifest, head)

    started = time.monotonic()
    lessons = read_lessons(settings, expected, device, length, read_s)
    read_s = time.monotonic() - started
    num_sequences = len(lessons.everything.token_ids_BS)
    num_rows = int(lessons.everything.loss_BS.sum())
    say(f"read {num_sequences} traces, {num_rows:,} rows to learn from, in {read_s:.1f} s")

    learner = Learner(learns, model, head, settings.trainer, device)
    seconds = min(seconds, until_s - time.monotonic())
    report, train_s = learn(learner, lessons, seconds, sequences)
    judge = Judge(learns, head, device, incumbent, settings.trainer.gate_margin)
    judged = judge.judge(learner.average, lessons.held_out[:JUDGED])
    say(f"held-out traces: {judged.to_json()}, acceptance {judged.acceptance}")
    published = publish_version(
        store,
        learns,
        learner.average,
        manifest,
        judged,
        step=learner.step,
        keep=settings.trainer.keep_versions,
    )
    return {
        "version": published.version,
        "parameters": sum(p.numel() for p in learner.model.parameters()),
        "traces": num_sequences,
        "traces_refused": lessons.num_refused,
        "rows": num_rows,
        "read_s": read_s,
        "train_s": train_s,
        "updates": learner.step,
        "updates_skipped": learner.num_skipped,
        "sequences_per_update": sequences,
        "epochs": learner.step * sequences / num_sequences,
        "ttt_steps": settings.trainer.ttt_steps,
        "peak_lr": settings.trainer.lr,
        "last_loss": report.loss,
        "last_alpha": report.alpha,
        "held_out": {**judged.to_json(), "acceptance": judged.acceptance},
    }


def main(
    target: Annotated[Path, typer.Option(help="folder of the target")],
    run_dir: Annotated[Path, typer.Option(help="folder of the run: traces and weights")],
    collect_s: Annotated[float, typer.Option(help="of requests for traces")] = 50.0,
    seconds: Annotated[float, typer.Option(help="of learning")] = 150.0,
    read_s: Annotated[float, typer.Option(help="at most, of reading the traces back")] = 45.0,
    num_prompts: Annotated[int, typer.Option(help="most requests")] = 6144,
    max_tokens: int = 160,
    batch: Annotated[int, typer.Option(help="requests decoded at a time")] = 128,
    greedy_share: float = 0.6,
    temperature: Annotated[float, typer.Option(help="of the requests that are sampled")] = 0.8,
    sequences: Annotated[int, typer.Option(help="of one update")] = 64,
    ttt_steps: int = 5,
    lr: float = 6e-4,
    budget_s: Annotated[float, typer.Option(help="of everything; learning gets what is left")] = (
        290.0
    ),
    device: str = "cuda",
) -> None:
    """Collect traces, learn from them, publish."""
    began = time.monotonic()
    target, run_dir = target.resolve(), run_dir.resolve()
    settings = settings_for(target, run_dir, device, batch, ttt_steps, lr)
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
    service.start()
    try:
        figures = collect(
            service, asks_of(prompts, greedy_share, temperature), max_tokens, collect_s, batch
        )
        say(f"collected: {figures}")
        figures["recorder"] = wait_for_recorder(service, patience_s=60.0)
        figures["rows_lost"] = service.figures().capture_rows_dropped
    finally:
        service.stop()
    say(f"on the disk: {figures['recorder']}")
    del service
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()
    length = max(map(len, prompts)) + max_tokens
    until_s = began + budget_s - CLOSING_S
    trained = train(settings, target, seconds, read_s, sequences, length, until_s)
    (run_dir / FIGURES).write_text(
        json.dumps(
            {
                **trained,
                "collected": figures,
                "greedy_share": greedy_share,
                "sampled_temperature": temperature,
                "max_tokens": max_tokens,
                "engine_build_s": build_s,
                "whole_s": time.monotonic() - began,
            },
            indent=2,
        )
        + "\n"
    )
    say(f"done in {time.monotonic() - began:.1f} s")


if __name__ == "__main__":
    typer.run(main)
