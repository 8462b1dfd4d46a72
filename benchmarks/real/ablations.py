"""What makes a drafter learn fast: each choice of the trainer against the others, on a real target.

    python -m benchmarks.real.ablations --run-dir runs/real/ablations

Decodes chat requests of four domains, sampled, and keeps the rows of all in device memory. Then
trains a new drafter for every variant and seed: ``--updates`` updates on requests of the first
domain, from version 0 on, then ``--shifted-updates`` on ``--shifted-requests`` requests of the
second one. The learner, the update and the measure of acceptance are the trainer's own; a figure is
tokens per step at K = 4, simulated on held-out requests, with the weights that the trainer would
publish. All variants see as many positions, so one with smaller batches gets more updates; those
with more passes see the same traces more often.

The weight of rejected positions is not among them: it needs drafts of a live server.

Writes ``ablations.json`` and ``rows/ablations.json`` in ``benchmarks/results``.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import torch
import typer
from safetensors.torch import load

from benchmarks.harness.engines import build, release
from benchmarks.harness.results import RESULTS, Out, Row, say, write_result, write_rows
from benchmarks.real.choosing import (
    ARM_DOMAINS,
    TRAINED_AT,
    collecting_settings,
    prompt_ids,
    settings_for,
)
from benchmarks.real.train_drafter import Ask, collect, read_samples
from buffer.fingerprint import target_fingerprint
from configs.schema import Settings
from drafters.initial import TargetFacts, made_drafter, new_drafter
from drafters.samples import Sample
from drafters.trainable import trainable
from examples.traffic.chat import Domain, chat_prompts
from targets.find import target_folder
from targets.head import TargetHead, load_target_head
from targets.tokenizer import load_tokenizer
from trainer.build import expected_of
from trainer.dataset import Expected
from trainer.gate import Judge
from trainer.learner import Learner
from trainer.packing import HeldPiece
from trainer.rows import HeldSample, RowStore
from trainer.update import batch_dtype

BASE_TOKENS = 8192
"""Positions of an update in which the plan counts."""
MEASURES = ("half way", "first domain", "second domain", "first domain, after the shift")
Rows = Literal["bfloat16", "float8_e4m3fn"]
STORES: dict[Rows, torch.dtype] = {
    "bfloat16": torch.bfloat16,
    "float8_e4m3fn": torch.float8_e4m3fn,
}


@dataclass(frozen=True, slots=True)
class Variant:
    """Settings that differ from those of the demo on a GPU."""

    name: str
    chosen: tuple[str, ...] = ()
    rows: Rows = "bfloat16"
    vocab: int | None = None
    """Size of the draft vocabulary, the most frequent tokens of the traffic; ``None``: all."""
    passes: float = 1.0
    """Updates on the same traces, relative to the others'."""
    old_share: float = 0.25
    """Part of a batch that is drawn from the first domain after the shift."""


_LARGE = ("drafter.init=random", "trainer.batch_tokens=8192")
"""What was shipped when the choices were first compared."""
_MUON = ("trainer.optimizer=muon", "trainer.lr=3e-3")


def _large(name: str, *chosen: str, **fields: Any) -> Variant:
    """A variant of random weights and large updates."""
    return Variant(f"random, 8,192 tokens: {name}", (*_LARGE, *chosen), **fields)


VARIANTS = (
    Variant("as shipped: from the target, 2,048 tokens"),
    _large("no other change"),
    Variant("from the target, 8,192 tokens", ("trainer.batch_tokens=8192",)),
    Variant("from the target, 1,024 tokens", ("trainer.batch_tokens=1024",)),
    Variant("from the target, 2,048 tokens, Muon, lr 3e-3", _MUON),
    Variant("random, 2,048 tokens", ("drafter.init=random",)),
    Variant("random, 2,048 tokens, Muon, lr 3e-3", ("drafter.init=random", *_MUON)),
    Variant("from the target, 4,096 tokens, Muon, lr 3e-3", (*_MUON, "trainer.batch_tokens=4096")),
    Variant("from the target, 8,192 tokens, Muon, lr 3e-3", (*_MUON, "trainer.batch_tokens=8192")),
    Variant("from the target, 2,048 tokens, Muon, lr 1e-2", (_MUON[0], "trainer.lr=1e-2")),
    _large("Muon", _MUON[0]),
    _large("lr 2e-3", "trainer.lr=2e-3"),
    _large("Muon, lr 3e-3", *_MUON),
    _large("four times as many passes", passes=4.0),
    _large("draft vocabulary of 16,384", vocab=16384),
    _large("fp8 rows", rows="float8_e4m3fn"),
    _large("averaged over 10 updates", "trainer.average_decay=0.9"),
    _large("twice as many passes", passes=2.0),
    _large("lr 4e-3", "trainer.lr=4e-3"),
    Variant("random, 4,096 tokens", ("drafter.init=random", "trainer.batch_tokens=4096")),
    _large("loss: forward KL", "trainer.loss=forward_kl"),
    _large("no replay of the first domain", old_share=0.0),
    _large("half the batch from the first domain", old_share=0.5),
    _large("two passes of training-time test", "trainer.ttt_steps=2"),
    _large("no averaging", "trainer.average_decay=0"),
    _large("averaged over 100 updates", "trainer.average_decay=0.99"),
    _large("draft vocabulary of 8,192", vocab=8192),
    _large("lr 3e-4", "trainer.lr=3e-4"),
    Variant("random, 16,384 tokens", ("drafter.init=random", "trainer.batch_tokens=16384")),
)
"""Those that promise most come first: a budget may end before the last."""


# Rows


@dataclass(frozen=True, slots=True)
class Held:
    """Requests of one domain whose rows are in a store."""

    training: list[HeldSample]
    held_out: list[HeldSample]

    def pieces(self, most: int | None = None) -> list[HeldPiece]:
        """Pieces of the first ``most`` requests to train on."""
        return [piece for sample in self.training[:most] for piece in sample.pieces]


def read_all(settings: Settings, expected: Expected) -> dict[int, Sample]:
    """All traces of the run as samples, by the number of their request."""
    return {
        int(trace.request_id.removeprefix("trace-")): sample
        for trace, sample in read_samples(settings, expected)
        if isinstance(sample, Sample)
    }


def stored(
    samples: dict[int, Sample], num_held_out: int, dtype: torch.dtype, device: torch.device
) -> tuple[RowStore, dict[Domain, Held]]:
    """The samples in device memory as rows of ``dtype``. Request n belongs to domain n modulo
    their number."""
    first = next(iter(samples.values()))
    num_rows = sum(len(sample.token_ids_T) + 32 for sample in samples.values())
    _, width, hidden = first.rows.shape
    store = RowStore(device, num_rows * (width * hidden * dtype.itemsize + 4 * width + 64))
    store.allocate(width, hidden, dtype)
    held: dict[Domain, Held] = {}
    for place, domain in enumerate(ARM_DOMAINS):
        own = [samples[n] for n in sorted(samples) if n % len(ARM_DOMAINS) == place]
        put = [x for start in range(0, len(own), 64) for x in store.put(own[start : start + 64])]
        held[domain] = Held(put[num_held_out:], put[:num_held_out])
    return store, held


def most_frequent(samples: dict[int, Sample], count: int, vocab_size: int) -> list[int]:
    """The token ids that the traffic uses most."""
    counts = torch.zeros(vocab_size, dtype=torch.int64)
    for sample in samples.values():
        counts += torch.bincount(sample.token_ids_T, minlength=vocab_size)
    return sorted(counts.topk(count).indices.tolist())


# Learning


@dataclass(frozen=True, slots=True)
class Bench:
    """What all variants share."""

    device: torch.device
    head: TargetHead
    fingerprint: str
    samples: dict[int, Sample]
    stores: dict[Rows, tuple[RowStore, dict[Domain, Held]]]
    run_dir: Path


def new_learner(head: TargetHead, fingerprint: str, settings: Settings, store: RowStore) -> Learner:
    """Version 0 of a variant, ready to learn from the rows of a store."""
    facts = TargetFacts(head.config, head.lm_head.weight_VH, fingerprint)
    kind = settings.drafter.kind
    manifest, content = made_drafter(kind, facts, new_drafter(settings))
    learns = trainable(kind)
    model = learns.load_model(manifest.drafter_config, load(content))
    return Learner(learns, model, head, settings.trainer, store)


def variant_settings(bench: Bench, variant: Variant, seed: int) -> Settings:
    """Settings of one run."""
    chosen = [*variant.chosen, f"seed={seed}"]
    if variant.vocab is not None:
        file = bench.run_dir / f"vocab-{variant.vocab}.json"
        size = len(bench.head.lm_head.weight_VH)
        file.write_text(json.dumps(most_frequent(bench.samples, variant.vocab, size)))
        chosen.append(f"drafter.draft_vocab={file}")
    return settings_for(bench.run_dir, str(bench.device), *chosen)


def draw(
    new: list[HeldPiece],
    old: list[HeldPiece],
    old_share: float,
    num_tokens: int,
    random: np.random.Generator,
) -> list[HeldPiece]:
    """A batch of at most ``num_tokens`` positions, each piece at most once."""
    queues = [iter(random.permutation(len(part)).tolist()) for part in (new, old)]
    drawn: list[HeldPiece] = []
    total = 0
    while True:
        which = int(bool(old) and random.random() < old_share)
        place = next(queues[which], None)
        if place is None:
            return drawn
        piece = (new, old)[which][place]
        total += len(piece.slots)
        if drawn and total > num_tokens:
            return drawn
        drawn.append(piece)


def run_one(bench: Bench, variant: Variant, seed: int, plan: dict[str, int]) -> dict[str, Any]:
    """Train one drafter and measure it on the way."""
    settings = variant_settings(bench, variant, seed)
    store, held = bench.stores[variant.rows]
    learner = new_learner(bench.head, bench.fingerprint, settings, store)
    judge = Judge(learner.trainable, bench.head, store, learner.average, 1.0, 0.5)
    first, second = ARM_DOMAINS[:2]
    random = np.random.default_rng(seed)
    tokens = settings.trainer.batch_tokens
    scale = variant.passes * BASE_TOKENS / tokens
    figures: dict[str, Any] = {"variant": variant.name, "seed": seed}

    def measured(domain: Domain) -> float | None:
        return judge.judge(learner.average, held[domain].held_out).candidate

    def train(new: list[HeldPiece], old: list[HeldPiece], share: float, updates: int) -> float:
        """Seconds of the updates."""
        started = time.monotonic()
        for _ in range(round(updates * scale)):
            learner.update(draw(new, old, share, tokens, random))
        learner.settle()
        return time.monotonic() - started

    figures["before"] = measured(first)
    half = plan["updates"] // 2
    pieces = held[first].pieces()
    train(pieces, [], 0.0, half)
    figures["half way"] = measured(first)
    figures["second half, seconds"] = train(pieces, [], 0.0, plan["updates"] - half)
    figures["first domain"] = measured(first)
    figures["second domain, before the shift"] = measured(second)
    shifted = held[second].pieces(plan["shifted_requests"])
    train(shifted, pieces, variant.old_share, plan["shifted_updates"])
    figures["second domain"] = measured(second)
    figures["first domain, after the shift"] = measured(first)
    figures["updates skipped"] = learner.num_skipped
    return figures


def rows_of(runs: Sequence[dict[str, Any]]) -> list[Row]:
    """Each variant's median over the seeds, and its ratio to what is shipped."""
    rows = []
    by_variant: dict[str, list[dict[str, Any]]] = {}
    for run in runs:
        by_variant.setdefault(run["variant"], []).append(run)
    for name, found in by_variant.items():
        for measure in MEASURES:
            values = [run[measure] for run in found if run[measure] is not None]
            if values:
                about = f"{name}, {len(values)} seeds"
                value = statistics.median(values)
                rows.append(Row(about, f"tokens per step at K = 4, {measure}", value, None, None))
    return rows


def collected(
    settings: Settings, prompts: int, seconds: float, device: torch.device
) -> dict[str, Any]:
    """Answer requests of all domains in turn, and write their traces."""
    tokenizer = load_tokenizer(target_folder(settings.target, settings.target_cache))
    found = chat_prompts(dict.fromkeys(ARM_DOMAINS, prompts), seed=7, may_lack=True)
    ids = [[prompt_ids(tokenizer, p) for p in found[domain]] for domain in ARM_DOMAINS]
    asks = [Ask(p, TRAINED_AT) for group in zip(*ids, strict=False) for p in group]
    say(f"{len(asks)} prompts")
    service, _ = build(settings)
    say("engine ready")
    figures = collect(service, asks, 512, seconds, settings.engine.max_batch, ends_early=True)
    del service
    release(device)
    return figures


def traces_of(
    settings: Settings, prompts: int, collect_s: float, where: torch.device
) -> tuple[TargetHead, str, dict[int, Sample]]:
    """The target's head and fingerprint, and the samples of the run, which are collected first if
    there are none."""
    if not (settings.run_dir / "traces").exists():
        say(f"collected {collected(settings, prompts, collect_s, where)}")
    folder = target_folder(settings.target, settings.target_cache)
    head = load_target_head(folder, where, batch_dtype(where))
    fingerprint = target_fingerprint(folder)
    facts = TargetFacts(head.config, head.lm_head.weight_VH, fingerprint)
    manifest, _ = made_drafter(settings.drafter.kind, facts, new_drafter(settings))
    return head, fingerprint, read_all(settings, expected_of(manifest, head))


def enough(num_samples: int, lacking: Sequence[Domain]) -> None:
    """
    Raises:
        typer.BadParameter: some domains have no requests to train on.
    """
    if lacking:
        raise typer.BadParameter(
            f"of {num_samples} traces none of {', '.join(lacking)} is left to train on; raise "
            f"--collect-s or lower --held-out, and give a new --run-dir"
        )


def main(
    run_dir: Annotated[Path, typer.Option(help="folder of the run: traces")],
    out: Out = RESULTS / "ablations.json",
    prompts: Annotated[int, typer.Option(help="of each domain")] = 1400,
    collect_batch: Annotated[int, typer.Option(help="requests decoded at a time")] = 128,
    collect_s: float = 30.0,
    updates: Annotated[int, typer.Option(help="on the first domain, of 8,192 tokens")] = 100,
    shifted_updates: int = 20,
    shifted_requests: int = 256,
    held_out: Annotated[int, typer.Option(help="of each domain, never trained on")] = 96,
    seeds: int = 3,
    first_seed: int = 0,
    only: Annotated[str, typer.Option(help="variants whose names contain it")] = "",
    budget_s: Annotated[float, typer.Option(help="seconds in all")] = 540.0,
    device: str = "cuda",
) -> None:
    """Collect traces, then train every variant with every seed."""
    began, where = time.monotonic(), torch.device(device)
    settings = collecting_settings(run_dir, device, collect_batch)
    head, fingerprint, samples = traces_of(settings, prompts, collect_s, where)
    stores = {name: stored(samples, held_out, dtype, where) for name, dtype in STORES.items()}
    _, held = stores["bfloat16"]
    enough(len(samples), [domain for domain in ARM_DOMAINS[:2] if not held[domain].training])
    bench = Bench(where, head, fingerprint, samples, stores, run_dir)
    say(f"{len(samples)} traces in memory after {time.monotonic() - began:.1f} s")
    plan = {
        "updates": updates,
        "shifted_updates": shifted_updates,
        "shifted_requests": shifted_requests,
    }
    runs: list[dict[str, Any]] = []
    for seed in range(first_seed, first_seed + seeds):
        for variant in VARIANTS:
            if only not in variant.name or time.monotonic() - began > budget_s:
                continue
            runs.append(run_one(bench, variant, seed, plan))
            say(f"{time.monotonic() - began:.0f} s  {runs[-1]}")
            release(where)
            write_result(out, {"plan": plan, "traces": len(samples), "runs": runs})
            write_rows("ablations", rows_of(runs), "python -m benchmarks.real.ablations")


if __name__ == "__main__":
    typer.run(main)
