"""How fast a drafter learns: rows a second of updates alone, of the gate, and of the whole loop.

    python -m benchmarks.learner --device cuda        # shape of SmolLM2-135M; about three minutes
    python -m benchmarks.learner --device cpu         # a small shape; about a minute
    python -m benchmarks.learner --agreement-only     # half a minute, e.g. under CUDA MPS

The target is random, and so are the hidden rows: speed does not depend on them. Measured are

- whether captured updates agree with eager ones, and these with updates without padding: losses of
  five updates and the weights after them; and whether updates that were all captured before the
  first, as a trainer's are, stay finite (exit code 1 if not);
- updates whose rows are in the device's memory, captured and eager;
- the gate on 64 held-out traces, with the incumbent's figures unknown and known;
- ``trainer.loop.run`` on a log of synthetic traces: reading, checking, updates, gates and
  checkpoints together.

A row is a position with a loss; each is trained in K = 4 passes. Writes
``benchmarks/results/learner.json``, after each part what is known.
"""

from __future__ import annotations

import gc
import json
import shutil
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import torch
import typer
from torch import Tensor

from benchmarks.harness.results import RESULTS, Out, say, write_result
from buffer.backends import open_backend
from buffer.codec import encode_trace
from buffer.fingerprint import target_fingerprint
from buffer.interface import TraceLimits
from buffer.records import FeatureRows, Rounds, Sampling, Trace
from configs.schema import DrafterSettings, Settings, TrainerSettings
from drafters.samples import Sample
from drafters.trainable import learning_kinds, trainable
from targets.head import TargetHead, load_target_head
from trainer.build import build_trainer
from trainer.dataset import Expected, sample_of
from trainer.figures import UpdateReport
from trainer.gate import Judge
from trainer.group import Group
from trainer.learner import Learner
from trainer.loop import run
from trainer.packing import HeldPiece, pack
from trainer.rows import HeldSample, RowStore
from trainer.update import batch_dtype

CLOSE_LOSS = 2e-3
"""Relative difference of losses up to which two learners agree."""
CLOSE_WEIGHTS = 0.05
"""The same for the distance of their weights relative to how far they have come; AdamW takes steps
of full size where a gradient is nothing but rounding."""
KIND = learning_kinds()[0]
TAPS = (1, 2, 3)


@dataclass(frozen=True, slots=True)
class Shape:
    """A target, its traffic, and how the drafter is trained."""

    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    vocab: int
    prompt: tuple[int, int]
    """Fewest and most tokens of a prompt."""
    answer: tuple[int, int]
    batch_tokens: int
    num_traces: int


SHAPES = {
    "smollm2": Shape(576, 1536, 9, 3, 49_152, (60, 160), (60, 260), 8192, 1024),
    "small": Shape(64, 128, 4, 2, 1024, (20, 40), (20, 60), 1024, 96),
}


def save_target(shape: Shape, folder: Path) -> None:
    """A random target of this shape with four layers: the trainer reads its head alone."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=shape.vocab,
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        num_hidden_layers=4,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
    )
    model: Any = LlamaForCausalLM(config)  # type: ignore[no-untyped-call]
    model.bfloat16().save_pretrained(folder)


def traces(shape: Shape, fingerprint: str, dtype: Literal["bfloat16"] = "bfloat16") -> list[Trace]:
    """Requests with random tokens and random hidden rows at all positions but the last. Their rows
    lie in the same memory, from different positions on: drawing a gigabyte takes longer than all
    else."""
    numbers = np.random.default_rng(0)
    longest = shape.prompt[1] + shape.answer[1]
    drawn = torch.randn(
        longest + shape.num_traces, len(TAPS) + 1, shape.hidden,
        generator=torch.Generator().manual_seed(0),
    ).bfloat16()  # fmt: skip
    made = []
    for seq in range(shape.num_traces):
        prompt = int(numbers.integers(*shape.prompt))
        length = prompt + int(numbers.integers(*shape.answer))
        rows = drawn[seq : seq + length - 1]
        made.append(
            Trace(
                producer="benchmark",
                epoch=1,
                seq=seq,
                request_id=f"r{seq}",
                tenant="default",
                target_fingerprint=fingerprint,
                sampling=Sampling({"temperature": 0.7}),
                prompt_length=prompt,
                token_ids=numbers.integers(0, shape.vocab, length).astype(np.int32),
                rounds=Rounds.of(),
                features=FeatureRows(
                    np.arange(length - 1, dtype=np.int32),
                    TAPS,
                    dtype,
                    rows.view(torch.uint16).numpy(),
                    None,
                ),
                finished_unix_ms=1,
            )
        )
    return made


@dataclass(frozen=True, slots=True)
class Place:
    """Everything that learners on one device share."""

    shape: Shape
    settings: Settings
    head: TargetHead
    store: RowStore
    held: list[HeldSample]
    draft_ids: Tensor | None = None
    """Vocabulary of the drafter; ``None``: the target's."""

    def learner(self, use_graphs: bool | None, group: Group | None = None) -> Learner:
        """A new learner with the same random weights."""
        learns = trainable(KIND)
        given = self.head.config, self.head.lm_head.weight_VH, TAPS
        model = learns.new_model(*given, seed=0, draft_ids=self.draft_ids)
        trainer = self.settings.trainer
        return Learner(learns, model, self.head, trainer, self.store, use_graphs, group)

    def batches(self) -> Iterator[list[HeldPiece]]:
        """Random batches of at most ``batch_tokens`` positions, without end."""
        numbers = np.random.default_rng(1)
        pieces = [piece for sample in self.held for piece in sample.pieces]
        while True:
            batch, room = [], self.shape.batch_tokens
            for place in numbers.permutation(len(pieces)).tolist():
                room -= len(pieces[place].slots)
                if room < 0:
                    break
                batch.append(pieces[place])
            yield batch


def settings_for(shape: Shape, device: str, folder: Path) -> Settings:
    """Settings of a trainer in this folder, which holds the target too."""
    return Settings(
        target=str(folder / "target"),
        run_dir=folder / "run",
        drafter=DrafterSettings(kind=KIND, layer_ids=TAPS),
        trainer=TrainerSettings(
            device=device,
            nice=0,
            lr=1e-3,
            batch_tokens=shape.batch_tokens,
            min_traces=16,
            recent_traces=shape.num_traces,
            replay_ratio=1e9,
            checkpoint_every_s=30.0,
        ),
    )


def wait_for(device: torch.device) -> None:
    """Until the device has done what was launched."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def release(device: torch.device) -> None:
    """Give memory of dropped objects back."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


# Agreement


def five_updates(place: Place, use_graphs: bool | None, is_padded: bool) -> tuple[Learner, Any]:
    """A learner after five updates, and their reports."""
    learner = place.learner(use_graphs)
    reports: list[UpdateReport] = []
    for batch, _ in zip(place.batches(), range(5), strict=False):
        if is_padded:
            reports += learner.update(batch)
            continue
        learner.program.launch(pack(batch, None), learner.lr)
        learner.step += 1
    return learner, reports + learner.settle()


def distance(one: Learner, other: Learner, start: dict[str, Tensor]) -> float:
    """How far the weights of two learners are apart, relative to how far they have come."""
    ours, theirs = one.model.state_dict(), other.model.state_dict()
    apart = sum(float((ours[name] - theirs[name]).square().sum()) for name in start)
    moved = sum(float((ours[name] - start[name]).square().sum()) for name in start)
    return float((apart / max(moved, 1e-30)) ** 0.5)


def agreement(place: Place) -> dict[str, Any]:
    """Captured against eager updates, and those against updates of exact shape, on a GPU.

    Sums of gradients come in any order there, so equal updates differ by rounding.
    """
    start = {n: t.clone() for n, t in place.learner(False).model.state_dict().items()}
    eager, wanted = five_updates(place, False, True)
    found: dict[str, Any] = {"eager_losses": [report.loss for report in wanted]}
    if place.store.device.type != "cuda":
        return found
    again, _ = five_updates(place, False, True)
    graph, reports = five_updates(place, True, True)
    exact, _ = five_updates(place, False, False)
    losses = [report.loss for report in reports]
    found |= {
        "graph_losses": losses,
        "eager_again_distance": distance(again, eager, start),
        "graph_distance": distance(graph, eager, start),
        "exact_shape_distance": distance(exact, eager, start),
        **captured_before(place),
    }
    pairs = zip(losses, found["eager_losses"], strict=True)
    close = all(abs(a - b) <= CLOSE_LOSS * abs(b) for a, b in pairs)
    found["agrees"] = close and found["graph_distance"] <= CLOSE_WEIGHTS
    found["agrees"] &= not found["skipped"] and not found["not_finite"]
    return found


def captured_before(place: Place) -> dict[str, Any]:
    """Updates of all shapes in turn, captured before the first of them: how many were skipped, and
    what is not finite after them."""
    learner = place.learner(True)
    learner.capture_all()
    alphas = []
    for number, batch in zip(range(48), place.batches(), strict=False):
        few = batch[: max(1, len(batch) * (number % 8 + 1) // 8)]
        alphas += [report.alpha[0] for report in learner.update(few)]
    alphas += [report.alpha[0] for report in learner.settle()]
    return {
        "skipped": learner.num_skipped,
        "not_finite": learner.not_finite(),
        "overlaps": alphas,  # 1 where the drafter's logits are NaN
    }


# Speed


def speed(place: Place, use_graphs: bool | None, seconds: float) -> dict[str, Any]:
    """Updates alone, rows in memory, for some seconds after a warm-up of all shapes."""
    device = place.store.device
    learner, batches = place.learner(use_graphs), place.batches()
    for batch, _ in zip(batches, range(12), strict=False):
        learner.update(batch)
    learner.settle()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    wait_for(device)
    before = learner.step
    num_rows = num_positions = 0
    started = time.monotonic()
    while time.monotonic() - started < seconds:
        batch = next(batches)
        learner.update(batch)
        num_rows += sum(len(piece.rows) for piece in batch)
        num_positions += sum(len(piece.slots) for piece in batch)
    host_s = time.monotonic() - started
    learner.settle()
    wait_for(device)
    took_s = time.monotonic() - started
    updates = learner.step - before
    figures = {
        "updates": updates,
        "rows_per_s": num_rows / took_s,
        "positions_per_s": num_positions / took_s,
        "ms_per_update": 1000 * took_s / updates,
        "host_ahead_s": took_s - host_s,
        "rows_per_update": num_rows / updates,
    }
    if device.type == "cuda":
        figures["peak_gib"] = torch.cuda.max_memory_allocated(device) / 2**30
        figures["graphs"] = len(learner.program._graphs)
    return figures


def host_costs(place: Place) -> dict[str, Any]:
    """Milliseconds of packing a batch, the part of an update that is not launching it."""
    batches = [batch for batch, _ in zip(place.batches(), range(20), strict=False)]
    fixed = place.learner(False).fixed_shape
    started = time.monotonic()
    for batch in batches:
        pack(batch, fixed)
    return {"pack_ms": 1000 * (time.monotonic() - started) / len(batches)}


def gate_speed(place: Place) -> dict[str, Any]:
    """Milliseconds of a judgement over 32 newest and 32 older held-out traces."""
    device = place.store.device
    candidate, incumbent = place.learner(False).average, place.learner(False).average
    judge = Judge(trainable(KIND), place.head, place.store, incumbent, 1.005, 0.9)
    held_out, older = place.held[:32], place.held[32:64]
    times = []
    for promote in (False, True, False, False):
        if promote:
            judge.promote(candidate)
        wait_for(device)
        started = time.monotonic()
        judge.judge(candidate, held_out, older)
        times.append(1000 * (time.monotonic() - started))
    return {
        "first_ms": times[0],
        "unknown_incumbent_ms": times[1],
        "known_incumbent_ms": min(times[2:]),
    }


# The loop


def loop_speed(shape: Shape, settings: Settings, seconds: float) -> dict[str, Any]:
    """The trainer's own loop on a log that is there from the beginning, for some seconds."""
    stop = threading.Event()
    started = time.monotonic()
    trainer = build_trainer(settings, stop)
    build_s = time.monotonic() - started
    timer = threading.Timer(seconds, stop.set)
    timer.start()
    run(trainer)
    timer.cancel()
    folder = settings.run_dir / "trainer"
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    updates = [line for line in lines if line["event"] == "update"]
    gates = [line for line in lines if line["event"] == "gate"]
    checkpoints = [line for line in lines if line["event"] == "checkpoint"]
    # What precedes the second event of updates includes captures and the first reads.
    steady = updates[len(updates) // 2 :]
    return {
        "build_s": build_s,
        "seconds": seconds,
        "updates": sum(line["updates"] for line in updates),
        "rows": sum(line["rows"] for line in updates),
        "rows_per_s": sum(line["rows"] for line in updates) / seconds,
        "steady_rows_per_s": sum(x["rows"] for x in steady) / sum(x["seconds"] for x in steady)
        if steady
        else None,
        "gates": len(gates),
        "gate_s": [line["seconds"] for line in gates],
        "checkpoint_s": [line["seconds"] for line in checkpoints],
        "published": sum(line["event"] == "published" for line in lines),
    }


def write_log(made: list[Trace], run_dir: Path) -> float:
    """Seconds that writing the traces took."""
    limits = TraceLimits(32 << 20, 64 << 30, 1e6, 0.2)
    started = time.monotonic()
    with open_backend("log:", run_dir).open_trace_writer(limits) as writer:
        for trace in made:
            writer.append(encode_trace(trace))
    return time.monotonic() - started


def main(
    device: Annotated[str, typer.Option(help="cpu or cuda")] = "cuda",
    shape: Annotated[str, typer.Option(help="smollm2 or small; by default as fits the device")] = (
        ""
    ),
    seconds: Annotated[float, typer.Option(help="of each measurement of updates")] = 10.0,
    loop_s: Annotated[float, typer.Option(help="of the loop")] = 30.0,
    batch_tokens: Annotated[int | None, typer.Option(help="positions of a batch")] = None,
    agreement_only: Annotated[bool, typer.Option(help="measure no speed")] = False,
    out: Out = RESULTS / "learner.json",
) -> None:
    """Measure each part, print it, and write all that is known so far."""
    where = torch.device(device)
    name = shape or ("smollm2" if where.type == "cuda" else "small")
    chosen = SHAPES[name]
    if batch_tokens is not None:
        chosen = replace(chosen, batch_tokens=batch_tokens)
    if agreement_only:
        chosen = replace(chosen, num_traces=96)
    folder = Path(tempfile.mkdtemp(prefix="learner-"))
    result: dict[str, Any] = {"device": device, "shape": name, "batch_tokens": chosen.batch_tokens}

    def part(title: str, figures: dict[str, Any]) -> None:
        result[title] = figures
        say(f"{title}: {json.dumps(figures)}")
        write_result(out, result)

    try:
        save_target(chosen, folder / "target")
        settings = settings_for(chosen, device, folder)
        head = load_target_head(folder / "target", where, batch_dtype(where))
        fingerprint = target_fingerprint(folder / "target")
        made = traces(chosen, fingerprint)
        if not agreement_only:
            part("log", {"traces": len(made), "write_s": write_log(made, settings.run_dir)})
        expected = Expected(fingerprint, TAPS, chosen.hidden, chosen.vocab)
        samples = [sample_of(t, expected, settings.trainer.max_sequence) for t in made]
        store = RowStore(where, 8 << 30 if where.type == "cuda" else 1 << 28)
        held = store.put([x for x in samples if isinstance(x, Sample)])
        place = Place(chosen, settings, head, store, held)
        part("agreement", agreement(place))
        if agreement_only:
            raise typer.Exit(code=0 if result["agreement"].get("agrees", True) else 1)
        release(where)
        part("updates", speed(place, None, seconds))
        release(where)
        if where.type == "cuda":
            part("updates_eager", speed(place, False, seconds))
            release(where)
        part("host", host_costs(place))
        part("gate", gate_speed(place))
        del place, store, held
        release(where)
        part("loop", loop_speed(chosen, settings, loop_s))
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    if not result["agreement"].get("agrees", True):
        say("captured and eager updates do not agree")
        raise typer.Exit(code=1)


if __name__ == "__main__":
    typer.run(main)
