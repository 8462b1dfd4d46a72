"""How much of a GPU's arithmetic a drafter's updates use, on one card and on two.

    python -m benchmarks.utilisation                        # the 8B shape; about a minute
    python -m benchmarks.utilisation --batch-tokens 16384 --seconds 6 --parts  # and where it goes
    python -m benchmarks.utilisation --processes 1,2 --stages 2,0     # two cards, DeepSpeed
    python -m benchmarks.utilisation --device cpu --shape tiny --processes 1,2 --seconds 2
    python -m benchmarks.utilisation --processes 2 --dump-after-s 30  # where all are, if stuck

A trainer's own updates: rows in the device's memory, gathered, forward, backward, clipped, stepped
and averaged, captured in a graph where there is one process. Several processes divide each batch,
which has as many rows for each of them as one process has alone, and are the trainer's own: the
first sends the others their rows. Target and rows are random; speed does not depend on them.

Model FLOPs are counted from shapes, for what the loss needs and nothing else: forward and backward
of the drafter's layer at every position and at every row of a chain that is alive, of its lm_head
at every row with a loss, causal attention within a piece, the weight's gradient of the fusion, and
forward of the target's lm_head at every row with a loss, from which the teacher's distribution is
rebuilt. Not counted are rows of padding, chains past the end of their piece, keys that a mask
hides, and the optimizer. Utilisation is that over the seconds of the updates and over the card's
dense peak in bfloat16. What ``--parts`` measures is described in ``benchmarks.update_parts``.

Writes ``benchmarks/results/utilisation.json`` and, with ``--publish``, ``rows/jobs.json``.
"""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from benchmarks.harness.processes import StuckError, Voice, run_all
from benchmarks.harness.results import (
    RESULTS,
    Out,
    Row,
    at_least,
    say,
    write_result,
    write_rows,
)
from benchmarks.harness.shapes import SHAPES, draft_vocab_size
from benchmarks.learner import KIND, TAPS, Place, Shape, traces, wait_for
from benchmarks.update_parts import parts_of
from configs.schema import DeepSpeedSettings, DrafterSettings, Settings, TrainerSettings
from drafters.samples import Sample
from specops.distill import FrozenHead
from targets.head import TargetHead
from trainer.dataset import Expected, sample_of
from trainer.group import Group, device_of, joined, single
from trainer.learner import Learner
from trainer.packing import HeldPiece, pack
from trainer.processes import LOOPBACK, environment_of
from trainer.rows import RowStore
from trainer.team import work
from trainer.update import batch_dtype

SOURCE = "python -m benchmarks.utilisation"
PEAK_TFLOPS = 989.0
"""Dense bfloat16 of an H100 or H200 SXM, by NVIDIA's datasheet."""
MAX_SEQUENCE = 512
_FINGERPRINT = "ab" * 32
_DRAWN = 24
"""Batches that updates go through in turn."""


@dataclass(frozen=True, slots=True)
class Sizes:
    """What the FLOPs of an update follow from."""

    fused: int
    """Weights of the fusion of tapped layers."""
    layer: int
    """Weights of the other matrices of the drafter's layer."""
    attended: int
    """Elements of a row's queries."""
    head: int
    """Weights of the drafter's lm_head."""
    target_head: int
    """Weights of the target's."""
    num_steps: int
    """K, passes of training-time test."""


def sizes_of(config: Any, draft_vocab: int, num_steps: int) -> Sizes:
    """Of a drafter for a target with this config."""
    hidden, inner = config.hidden_size, config.intermediate_size
    queries = config.num_attention_heads * config.head_dim
    keys = config.num_key_value_heads * config.head_dim
    qkv, out = 2 * hidden * (queries + 2 * keys), queries * hidden
    return Sizes(
        fused=len(TAPS) * hidden * hidden,
        layer=qkv + out + 3 * hidden * inner,
        attended=queries,
        head=hidden * draft_vocab,
        target_head=hidden * config.vocab_size,
        num_steps=num_steps,
    )


def flops_of(pieces: Iterable[HeldPiece], sizes: Sizes) -> int:
    """Model FLOPs of an update on these pieces, whose rows with a loss follow each other."""
    positions = rows = later = keys = 0
    for piece in pieces:
        length, count = len(piece.slots), len(piece.rows)
        first = int(piece.rows[0]) if count else 0
        positions, rows = positions + length, rows + count
        keys += length * (length + 1) // 2
        for step in range(1, sizes.num_steps):
            alive = max(count - step, 0)
            later += alive
            # The anchor at first + i sees the keys up to itself, and its chain's own.
            keys += alive * (first + 1 + step) + alive * (alive - 1) // 2
    return (
        4 * positions * sizes.fused  # no gradient reaches the target
        + 6 * (positions + later) * sizes.layer
        + 12 * keys * sizes.attended
        + 6 * (rows + later) * sizes.head
        + 2 * rows * sizes.target_head
    )


# ---- a trainer's updates -------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Case:
    """What is measured."""

    shape: str
    """A key of ``harness.shapes.SHAPES``."""
    device: str
    processes: int
    stage: int
    """Of ZeRO; 0: the processes sum their gradients."""
    batch_tokens: int
    """Positions of a batch for each process."""
    seconds: float
    parts: bool = False
    """Measure the parts of an update, too; of one process alone."""


def place_of(case: Case, device: torch.device, folder: Path) -> Place:
    """Random rows, a random target's head, and the settings of the trainer."""
    config = SHAPES[case.shape]()
    tokens = case.batch_tokens * case.processes
    average = 300 if case.batch_tokens > MAX_SEQUENCE else 60
    shape = Shape(
        config.hidden_size,
        config.intermediate_size,
        config.num_attention_heads,
        config.num_key_value_heads,
        config.vocab_size,
        (average // 4, average // 2),
        (average // 2, average),
        tokens,
        max(16, 2 * tokens // average),
    )
    settings = Settings(
        target=str(folder),
        run_dir=folder,
        drafter=DrafterSettings(kind=KIND, layer_ids=TAPS),
        trainer=TrainerSettings(
            device=case.device,
            nice=0,
            lr=1e-4,
            batch_tokens=tokens,
            max_sequence=MAX_SEQUENCE,
            deepspeed=DeepSpeedSettings(stage=case.stage if case.processes > 1 else 0),
        ),
    )
    expected = Expected(_FINGERPRINT, TAPS, shape.hidden, shape.vocab)
    made = [sample_of(t, expected, MAX_SEQUENCE) for t in traces(shape, _FINGERPRINT)]
    store = RowStore(device, 32 << 30 if device.type == "cuda" else 1 << 28)
    held = store.put([one for one in made if isinstance(one, Sample)])
    assert len(held) == len(made), "random traces are sound and fit"
    return Place(shape, settings, head_of(config, device), store, held, draft_ids_of(config))


def head_of(config: Any, device: torch.device) -> TargetHead:
    """A random target's two tensors."""
    generator = torch.Generator(device).manual_seed(0)
    shape, dtype = (config.vocab_size, config.hidden_size), batch_dtype(device)
    drawn = [
        torch.empty(shape, device=device, dtype=dtype).normal_(std=0.02, generator=generator)
        for _ in range(2)
    ]
    return TargetHead(config, drawn[0], FrozenHead(drawn[1]))


def draft_ids_of(config: Any) -> torch.Tensor:
    """A drafter's vocabulary, spread over the target's."""
    size = draft_vocab_size(config.vocab_size)
    return torch.arange(size) * (config.vocab_size // size)


def updates_of(case: Case, group: Group, folder: Path, voice: Voice) -> dict[str, Any]:
    """Updates of the first process, for some seconds after those that warm up all shapes."""
    device = device_of(case.device, group)
    place = place_of(case, device, folder)
    voice.at(f"has {len(place.held)} traces and the target's head")
    learner = place.learner(None, group if group.size > 1 else None)
    wait_for(device)
    voice.at("has a learner, and so has every other process")
    config, steps = place.head.config, place.settings.trainer.ttt_steps
    sizes = sizes_of(config, draft_vocab_size(config.vocab_size), steps)
    batches = place.batches()
    drawn = [next(batches) for _ in range(_DRAWN)]
    for number, batch in enumerate(one_of_each_shape(learner, drawn), start=1):
        began_s = time.monotonic()
        learner.update(batch)
        launched_s = time.monotonic() - began_s
        wait_for(device)
        voice.at(f"update {number} launched in {launched_s:.2f} s, made in "
                 f"{time.monotonic() - began_s:.2f} s")  # fmt: skip
    learner.settle()
    flops = rows = updates = 0
    began_s = time.monotonic()
    while time.monotonic() - began_s < case.seconds:
        batch = drawn[updates % len(drawn)]
        learner.update(batch)
        flops += flops_of(batch, sizes)
        rows += sum(len(piece.rows) for piece in batch)
        updates += 1
    reports = learner.settle()
    wait_for(device)
    took_s = time.monotonic() - began_s
    voice.at(f"has made {updates} updates in {took_s:.1f} s")
    on_gpu = device.type == "cuda"
    peak_bytes = torch.cuda.max_memory_allocated(device) if on_gpu else None
    speed = flops / took_s / 1e12
    voice.at(f"{speed:.0f} TFLOP/s, {1000 * took_s / updates:.1f} ms an update")
    parts = parts_of(learner, drawn[0], voice.at) if case.parts else None
    learner.end()
    return {
        "updates": updates,
        "skipped": learner.num_skipped,
        "loss": reports[-1].loss if reports else None,
        "seconds": took_s,
        "ms_per_update": 1000 * took_s / updates,
        "rows_per_s": rows / took_s,
        "rows_per_update": rows / updates,
        "tflop_per_update": flops / updates / 1e12,
        "tflops": speed,
        "weights": sum(p.numel() for p in learner.model.parameters()),
        "peak_gib": None if peak_bytes is None else peak_bytes / 2**30,
        **({} if parts is None else {"parts": parts}),
    }


def one_of_each_shape(learner: Learner, drawn: Sequence[list[HeldPiece]]) -> list[list[HeldPiece]]:
    """Batches after which all shapes of ``drawn`` are known, and two more."""
    shapes = {len(pack(batch, learner.fixed_shape).row_R): batch for batch in drawn}
    return [*shapes.values(), *drawn[:2]] if learner.fixed_shape else list(drawn[:4])


# ---- processes -----------------------------------------------------------------------------------


def be_process(
    case: Case, rank: int, port: int, folder: Path, voice: Voice
) -> dict[str, Any] | None:
    """One process of the trainer; the first one answers with what it measured."""
    torch.set_num_threads(1)
    with ExitStack() as stack:
        group = single()
        if case.processes > 1:
            os.environ |= LOOPBACK | environment_of(rank, case.processes, port)
            group = stack.enter_context(joined(case.device))
        if rank == 0:
            return updates_of(case, group, folder, voice)
        device = device_of(case.device, group)
        trainer = TrainerSettings(
            device=case.device,
            batch_tokens=case.batch_tokens * case.processes,
            max_sequence=MAX_SEQUENCE,
            deepspeed=DeepSpeedSettings(stage=case.stage),
        )
        work(group, trainer, head_of(SHAPES[case.shape](), device), device)
        return None


def measure(case: Case, folder: Path, wait_s: float, dump_after_s: float | None) -> dict[str, Any]:
    """A case in processes of its own.

    Raises:
        StuckError: a process died, or there was no answer in time.
    """
    port = _free_port()
    works = [partial(be_process, case, rank, port, folder) for rank in range(case.processes)]
    found: dict[str, Any] = run_all(works, wait_s, dump_after_s)
    return found


def _free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        port: int = one.getsockname()[1]
        return port


# ---- results -------------------------------------------------------------------------------------


def with_ratios(found: list[dict[str, Any]], peak_tflops: float) -> list[dict[str, Any]]:
    """Beside each case its utilisation of all its cards, and its rows over those of one process."""
    one = next((f["rows_per_s"] for f in found if f["processes"] == 1), None)
    return [
        {
            **f,
            "utilisation": f["tflops"] / peak_tflops / f["processes"],
            "over_one": None if one is None else f["rows_per_s"] / one,
        }
        for f in found
    ]


def rows_of(found: list[dict[str, Any]], peak_tflops: float) -> Iterator[Row]:
    """The claims, with their goals."""
    for one in found:
        is_goal = one["shape"] in ("Qwen3-8B", "Llama-3.1-8B") and one["device"] == "cuda"
        what = (
            f"7. {KIND} at the shape of {one['shape']}, {one['batch_tokens']:,} positions a process"
        )
        if one["processes"] == 1:
            measure = (
                f"model FLOPs of updates over {peak_tflops:g} TFLOP/s, rebuilt teacher included"
            )
            yield at_least(what, measure, one["utilisation"], 0.4 if is_goal else None)
            yield Row(what, "rows with a loss trained per second", one["rows_per_s"], None, None)
            continue
        how = f"ZeRO-{one['stage']}" if one["stage"] else "summed gradients"
        measure = f"rows per second of {one['processes']} processes over one, {how}"
        wants = is_goal and one["processes"] == 2 and one["stage"] == 2
        yield at_least(what, measure, one["over_one"], 1.8 if wants else None)


def main(
    shape: Annotated[str, typer.Option(help="a key of harness.shapes.SHAPES")] = "Qwen3-8B",
    device: Annotated[str, typer.Option(help="cpu or cuda")] = "cuda",
    processes: Annotated[str, typer.Option(help="numbers of processes, a GPU for each")] = "1",
    stages: Annotated[str, typer.Option(help="stages of ZeRO, for several; 0: none")] = "2",
    batch_tokens: Annotated[int, typer.Option(help="positions of a batch, a process")] = 8192,
    seconds: Annotated[float, typer.Option(help="of updates, for each case")] = 10.0,
    peak_tflops: Annotated[float, typer.Option(help="dense bfloat16 of a card")] = PEAK_TFLOPS,
    wait_s: Annotated[float, typer.Option(help="for each case, at most")] = 400.0,
    dump_after_s: Annotated[
        float | None, typer.Option(help="of silence, after which all processes print their stacks")
    ] = None,
    parts: Annotated[
        bool, typer.Option(help="the parts of an update, too, of one process")
    ] = False,
    publish: Annotated[bool, typer.Option(help="write rows/jobs.json, too")] = False,
    out: Out = RESULTS / "utilisation.json",
) -> None:
    """Measure each case, and write what is known after it."""
    case = Case(shape, device, 1, 0, batch_tokens, seconds, parts)
    cases = [
        replace(case, processes=number, stage=stage, parts=parts and number == 1)
        for number in map(int, processes.split(","))
        for stage in (map(int, stages.split(",")) if number > 1 else (0,))
    ]
    found: list[dict[str, Any]] = []
    for one in cases:
        about = {
            "shape": shape,
            "device": device,
            "processes": one.processes,
            "stage": one.stage,
            "batch_tokens": batch_tokens,
        }
        try:
            found.append({**about, **measure(one, out.parent, wait_s, dump_after_s)})
        except StuckError as error:
            say(f"{one}: {error}")
            continue
        shown = with_ratios(found, peak_tflops)
        write_result(out, {"peak_tflops": peak_tflops, "rows": shown})
        text = ", ".join(
            f"{key} {shown[-1][key]:.3f}" for key in ("utilisation", "tflops", "rows_per_s",
            "ms_per_update") )  # fmt: skip
        say(f"{one.processes} processes, stage {one.stage}: {text}, over one "
            f"{shown[-1]['over_one'] or 0:.2f}, skipped {shown[-1]['skipped']}")  # fmt: skip
    rows = list(rows_of(with_ratios(found, peak_tflops), peak_tflops))
    if publish:
        write_rows("jobs", rows, SOURCE)
    for row in rows:
        say(f"{row.row}: {row.measure}: {row.value} (goal: {row.goal}, holds: {row.holds})")
    if len(found) < len(cases):
        raise typer.Exit(code=1)


if __name__ == "__main__":
    typer.run(main)
