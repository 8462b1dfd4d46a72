"""What a drafter learns by each objective from the same traces, and what rejected tokens add.

    python -m benchmarks.objectives              # the bundled target; ten minutes on two cores
    python -m benchmarks.objectives --real --device cuda --requests 400 --updates 100

A drafter drafts for requests of several domains; the engine verifies, and writes traces with what
was rejected where. Then that drafter learns from the traces by each objective in ``VARIANTS``,
with every seed: the same traces, the same batches in the same order, as many tokens. Simulated
tokens_per_step (K = 4, at the temperature of the requests) is measured on traces that were held
out, domain by domain, of the averaged weights, which a trainer would publish.

A rejected row is one where the drafter that wrote the traces had a token rejected; while another
learns, these become what an older version did wrong, as they do in a trainer.

The real target needs a drafter that already guesses something, or all its drafts are rejected: name
one with ``--set drafter.path=...``. Writes ``objectives.json`` and ``rows/objectives.json`` in
``benchmarks/results``.
"""

from __future__ import annotations

import copy
import statistics
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer

from benchmarks.harness.engines import DEMO, build, release
from benchmarks.harness.results import RESULTS, Out, Row, known, say, write_result, write_rows
from benchmarks.real.choosing import ARM_DOMAINS, prompt_ids
from benchmarks.real.train_drafter import Ask, collect, read_samples
from buffer.backends import open_backend
from buffer.fingerprint import target_fingerprint
from buffer.records import Trace
from configs.load import load_settings
from configs.schema import Settings
from drafters.acceptance import Chains
from drafters.batch import TrainingBatch, collate
from drafters.samples import Sample
from drafters.trainable import Trainable, trainable
from examples.corpus import DOMAINS
from examples.plan import REAL_CONFIGS, SAMPLING
from examples.traffic.chat import chat_prompts
from examples.train_drafter import pieces
from targets.find import target_folder
from targets.head import TargetHead, load_target_head
from targets.tokenizer import load_tokenizer
from trainer.build import expected_of
from trainer.dataset import Emphasis, Expected
from trainer.learner import Learner
from trainer.packing import HeldPiece
from trainer.rows import RowStore
from trainer.start import newest_drafter
from trainer.update import batch_dtype

K = 4
BASE = "lk"
"""The variant that others are compared with: the default."""
JUDGED_TOKENS = 4096
"""Positions of one batch of held-out traces."""


@dataclass(frozen=True, slots=True)
class Variant:
    """One objective."""

    name: str
    loss: str
    rejected_weight: float = 1.0


VARIANTS = (
    Variant(BASE, "lk"),
    Variant("lk, rejected rows weigh 2", "lk", 2.0),
    Variant("lk + 0.1 reverse KL on rejected rows", "lk_rejected_reverse_kl", 1.1),
    Variant("lk + reverse KL on rejected rows", "lk_rejected_reverse_kl", 2.0),
    Variant("lk, equal positions", "lk_equal"),
    Variant("forward KL", "forward_kl"),
    Variant("forward KL + reverse KL on rejected rows", "forward_kl_rejected_reverse_kl", 2.0),
    Variant("reverse KL", "reverse_kl"),
    Variant("total variation", "total_variation"),
)
BY_NAME = {variant.name: variant for variant in VARIANTS}


# Traces


def settings_for(
    real: bool, run_dir: Path, device: str, batch: int, chosen: Sequence[str]
) -> Settings:
    """Settings of a server that drafts K tokens in every step and captures every row."""
    common = [
        f"run_dir={run_dir}", f"device={device}", f"trainer.device={device}",
        f"engine.max_batch={batch}", "engine.max_queue=1000000", "engine.prefix_cache=false",
        "drafter.suffix.enabled=false", "drafter.on_request=null", "policy.kind=fixed",
        f"policy.draft_k={K}", "swap.enabled=false",
        "capture.queue_traces=1000000", f"capture.ring_rows={batch * 2048}",
    ]  # fmt: skip
    return load_settings(list(REAL_CONFIGS) if real else [DEMO], [*common, *chosen], {})


def prompts_of(settings: Settings, real: bool, count: int) -> dict[str, list[tuple[int, ...]]]:
    """``count`` prompts of each domain, or as many as this installation holds."""
    tokenizer = load_tokenizer(target_folder(settings.target, settings.target_cache))
    if real:
        found = chat_prompts(dict.fromkeys(ARM_DOMAINS, count), seed=7, may_lack=True)
        return {domain: [prompt_ids(tokenizer, p) for p in found[domain]] for domain in ARM_DOMAINS}
    return {
        domain: [tuple(ids) for ids in pieces(tokenizer, domain, "heldout", count, seed=3)]
        for domain in DOMAINS
    }


@dataclass(frozen=True, slots=True)
class Data:
    """Traces of the run, as a trainer keeps them."""

    training: list[str]
    """Keys."""
    held_out: dict[str, list[str]]
    """Keys of each domain."""
    traces: dict[str, tuple[Trace, Sample]]


def read(settings: Settings, expected: Expected, domains: list[str], held_out: int) -> Data:
    """Request n is of domain n modulo their number; the first ones of each are held out."""
    found = {}
    by_domain: dict[str, list[str]] = {domain: [] for domain in domains}
    pairs = [p for p in read_samples(settings, expected) if isinstance(p[1], Sample)]
    for trace, sample in sorted(pairs, key=lambda pair: _number(pair[0])):
        assert isinstance(sample, Sample)
        found[sample.key] = trace, sample
        by_domain[domains[_number(trace) % len(domains)]].append(sample.key)
    if lacking := [domain for domain, keys in by_domain.items() if len(keys) <= held_out]:
        raise typer.BadParameter(
            f"no trace of {', '.join(lacking)} is left to train on; raise --requests or lower "
            f"--held-out"
        )
    training = [key for keys in by_domain.values() for key in keys[held_out:]]
    return Data(training, {d: keys[:held_out] for d, keys in by_domain.items()}, found)


def _number(trace: Trace) -> int:
    return int(trace.request_id.removeprefix("trace-"))


def counts_of(data: Data, kind: str) -> dict[str, int]:
    """How much was drafted and rejected in the traces that are trained on."""
    rounds = [r for key in data.training for r in data.traces[key][0].rounds if r.drafter == kind]
    return {
        "rounds": len(rounds),
        "drafted": sum(len(one.draft_ids) for one in rounds),
        "accepted": sum(one.num_accepted for one in rounds),
        "rejected_rows": sum(one.num_accepted < len(one.draft_ids) for one in rounds),
        "rows": sum(data.traces[key][1].num_loss_rows for key in data.training),
    }


# Learning


@dataclass(frozen=True, slots=True)
class Bench:
    """What all runs share."""

    settings: Settings
    learns: Trainable[Any]
    model: torch.nn.Module
    head: TargetHead
    expected: Expected
    data: Data
    judged: dict[str, list[TrainingBatch]]
    """Held-out batches of each domain."""


def stored(bench: Bench, variant: Variant) -> tuple[RowStore, list[HeldPiece]]:
    """The traces to train on in a store, their rows weighed as the variant has it."""
    expected = bench.expected
    if variant.rejected_weight != 1:
        kind = bench.settings.drafter.kind
        expected = replace(expected, emphasis=Emphasis(kind, variant.rejected_weight))
    wanted = set(bench.data.training)
    pairs = read_samples(bench.settings, expected)
    samples = {s.key: s for _, s in pairs if isinstance(s, Sample) and s.key in wanted}
    ordered = [samples[key] for key in bench.data.training]
    first = ordered[0]
    num_bytes = sum(len(s.token_ids_T) + 32 for s in ordered) * (first.rows[0].nbytes + 64)
    store = RowStore(bench.head.embed_VH.device, num_bytes)
    return store, [piece for held in store.put(ordered) for piece in held.pieces]


def batches(
    found: list[HeldPiece], num_tokens: int, random: np.random.Generator
) -> Iterator[list[HeldPiece]]:
    """Batches of at most ``num_tokens`` positions for ever; every piece once in each pass."""
    drawn: list[HeldPiece] = []
    total = 0
    while True:
        for place in random.permutation(len(found)).tolist():
            length = len(found[place].slots)
            if drawn and total + length > num_tokens:
                yield drawn
                drawn, total = [], 0
            drawn.append(found[place])
            total += length


@torch.no_grad()
def judge(bench: Bench, model: torch.nn.Module) -> dict[str, float | None]:
    """Simulated tokens_per_step on the held-out traces of each domain."""
    figures = {}
    for domain, judged in bench.judged.items():
        pairs = [bench.learns.acceptance(model, bench.head, batch, K) for batch in judged]
        texts = [one.overlap_RK.cpu() for one in pairs]
        is_full = [one.is_full_R.cpu() for one in pairs]
        figures[domain] = Chains.join(Chains.of_texts(texts, is_full), K).tokens_per_step()
    return figures


def run_one(bench: Bench, variant: Variant, seed: int, updates: int) -> dict[str, Any]:
    """Train by one objective and judge what comes of it."""
    chosen = {"loss": variant.loss, "rejected_weight": variant.rejected_weight}
    settings = bench.settings.trainer.model_copy(update=chosen)
    store, found = stored(bench, variant)
    model = copy.deepcopy(bench.model)
    learner = Learner(bench.learns, model, bench.head, settings, store)
    learner.generator.manual_seed(seed)
    drawn = batches(found, settings.batch_tokens, np.random.default_rng(seed))
    tokens, started = 0, time.monotonic()
    for _ in range(updates):
        batch = next(drawn)
        tokens += sum(len(piece.slots) for piece in batch)
        learner.update(batch)
    learner.settle()
    train_s = time.monotonic() - started
    return {
        "variant": variant.name,
        "seed": seed,
        "tokens": tokens,
        "updates": learner.step,
        "updates_skipped": learner.num_skipped,
        "train_s": train_s,
        "tokens_per_step": judge(bench, learner.average),
    }


def held_batches(data: Data, domain: str, device: torch.device) -> list[TrainingBatch]:
    """The held-out traces of a domain, a few thousand positions at a time."""
    found: list[TrainingBatch] = []
    part: list[Any] = []
    for sample in (data.traces[key][1] for key in data.held_out[domain]):
        part += [(sample, piece) for piece in sample.pieces]
        if sum(piece.stop - piece.start for _, piece in part) > JUDGED_TOKENS:
            found.append(collate(part).to(device, batch_dtype(device)))
            part = []
    return [*found, collate(part).to(device, batch_dtype(device))] if part else found


# Results


def compared(runs: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Each variant's mean on each domain, and its gain over ``BASE`` of the same seed."""
    base = {run["seed"]: run["tokens_per_step"] for run in runs if run["variant"] == BASE}
    names = dict.fromkeys(run["variant"] for run in runs)
    table = []
    for name in names:
        own = [run for run in runs if run["variant"] == name and run["seed"] in base]
        for domain in next(iter(base.values())):
            values = [run["tokens_per_step"][domain] for run in own]
            gains = [run["tokens_per_step"][domain] / base[run["seed"]][domain] - 1 for run in own]
            spread = statistics.stdev(gains) / len(gains) ** 0.5 if len(gains) > 1 else None
            table.append(
                {
                    "variant": name,
                    "domain": domain,
                    "seeds": len(own),
                    "tokens_per_step": statistics.mean(values),
                    "gain": statistics.mean(gains),
                    "gain_error": spread,
                }
            )
    return table


def rows_of(table: Sequence[dict[str, Any]]) -> list[Row]:
    """One row for each line of the table."""
    return [
        Row(
            f"{line['variant']}, {line['domain']}, {line['seeds']} seeds",
            f"tokens per step at K = {K}",
            line["tokens_per_step"],
            None,
            None,
        )
        for line in table
    ]


def main(
    out: Out = RESULTS / "objectives.json",
    real: Annotated[bool, typer.Option(help="the target of the demo on a GPU")] = False,
    device: str = "cpu",
    requests: Annotated[int, typer.Option(help="of each domain")] = 32,
    held_out: Annotated[int, typer.Option(help="of each domain, never trained on")] = 12,
    max_tokens: Annotated[int, typer.Option(help="of an answer")] = 96,
    updates: Annotated[int, typer.Option(help="of every run")] = 12,
    seeds: int = 3,
    collect_s: Annotated[float, typer.Option(help="longest time of decoding")] = 180.0,
    batch: Annotated[int, typer.Option(help="requests decoded at a time")] = 8,
    budget_s: Annotated[float, typer.Option(help="seconds in all; late runs are left out")] = 600.0,
    only: Annotated[list[str] | None, typer.Option(help="this variant beside the first")] = None,
    set_: Annotated[list[str] | None, typer.Option("--set", help="key=value")] = None,
) -> None:
    """Collect traces, then learn by every objective with every seed."""
    began, where = time.monotonic(), torch.device(device)
    names = known("variants", [BASE, *(only or [v.name for v in VARIANTS])], list(BY_NAME))
    variants = [BY_NAME[name] for name in dict.fromkeys(names)]
    with tempfile.TemporaryDirectory() as folder:
        settings = settings_for(real, Path(folder), device, batch, set_ or ())
        prompts = prompts_of(settings, real, requests)
        asks = [Ask(ids, SAMPLING.temperature) for group in zip(*prompts.values(), strict=False)
                for ids in group]  # fmt: skip
        service, _ = build(settings)
        say(f"{len(asks)} prompts, engine ready after {time.monotonic() - began:.0f} s")
        collected = collect(service, asks, max_tokens, collect_s, batch, ends_early=real)
        del service
        release(where)
        bench = bench_of(settings, list(prompts), held_out, where)
        about = {
            "target": settings.target,
            "plan": {"updates": updates, "seeds": seeds, "held_out": held_out, "k": K},
            "lr": settings.trainer.lr,
            "collected": collected,
            "rejections": counts_of(bench.data, settings.drafter.kind),
            "before": judge(bench, copy.deepcopy(bench.model).to(where)),
            "variants": [asdict(variant) for variant in variants],
        }
        say(f"collected after {time.monotonic() - began:.0f} s: {about['rejections']}")
        say(f"before: {about['before']}")
        runs: list[dict[str, Any]] = []
        for seed in range(seeds):
            for variant in variants:
                if time.monotonic() - began > budget_s:
                    say(f"left out, the budget is spent: {variant.name}, seed {seed}")
                    continue
                runs.append(run_one(bench, variant, seed, updates))
                say(f"{time.monotonic() - began:.0f} s  {runs[-1]}")
                release(where)
                table = compared(runs)
                write_result(out, {**about, "compared": table, "runs": runs})
                write_rows("objectives", rows_of(table), "python -m benchmarks.objectives")


def bench_of(settings: Settings, domains: list[str], held_out: int, device: torch.device) -> Bench:
    """Read what was collected."""
    folder = target_folder(settings.target, settings.target_cache)
    head = load_target_head(folder, device, batch_dtype(device))
    store = open_backend(settings.buffer.url, settings.run_dir).open_weights()
    manifest, model = newest_drafter(settings, store, head, target_fingerprint(folder))
    expected = expected_of(manifest, head)
    data = read(settings, expected, domains, held_out)
    judged = {domain: held_batches(data, domain, device) for domain in domains}
    return Bench(settings, trainable(manifest.kind), model, head, expected, data, judged)


if __name__ == "__main__":
    typer.run(main)
