"""Per-round bookkeeping, against torch: open the round, find its greedy ids, close it.

    python -m benchmarks.ops.rounds                                   # two minutes on one GPU
    TRITON_INTERPRET=1 python -m benchmarks.ops.rounds --device cpu   # a trial without a GPU

Ours are the kernels that rounds run on a GPU; ``eager`` is their torch definitions, ``compiled`` is
torch.compile of these; all run in a CUDA graph. Logits cover Qwen3's 151,936 tokens; the floor of
``best_ids`` reads them once at the speed of a large copy. ``float32_copy_us`` is the argmax of
logits that are first converted to float32. A ``greedy round`` is all three, without the target's
work in between.

Writes ``benchmarks/results/ops_rounds.json`` after every row. Compiling stops first if time is
short.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Annotated, Any

import torch
import typer
from torch import Tensor

from benchmarks.harness.results import RESULTS, Out, write_each
from benchmarks.ops.place import Device, Place, Work, make_place
from specops import best_ids, best_ids_triton, lanes, lanes_triton
from specops import device as on_device
from specops.lanes import ClosedRound, Column, Field, Input, LaneState, OpenedRound
from specops.verify_logits import Rule

PAGE, MOST = 16, 8


@dataclass(frozen=True, slots=True)
class Sizes:
    """Sizes to measure."""

    vocab: int = 151_936
    batches: tuple[int, ...] = (1, 32, 128)
    rows: tuple[int, ...] = (1, 32, 128, 160, 640)
    num_pages: int = 2560
    """Pages of each lane."""


TINY = Sizes(vocab=5000, batches=(1, 3), rows=(1, 4), num_pages=40)


@dataclass(frozen=True, slots=True)
class Variant:
    """One implementation of all three steps."""

    open_round: Callable[..., OpenedRound]
    best_ids: Callable[[Tensor], Tensor]
    close_round: Callable[..., ClosedRound]


EAGER = Variant(lanes.open_round, best_ids.best_ids, lanes.close_round)
ON_GPU = Variant(on_device.open_round, on_device.best_ids, on_device.close_round)
INTERPRETED = Variant(lanes_triton.open_round, best_ids_triton.best_ids, lanes_triton.close_round)


def variants_on(place: Place) -> tuple[Variant, Variant]:
    """Our kernels, and their definitions."""
    return (ON_GPU if place.is_gpu else INTERPRETED), EAGER


def make_lanes(sizes: Sizes, device: str) -> LaneState:
    """Lanes of requests with a few hundred tokens, far from their limits."""
    num_lanes = max(sizes.batches) + 1
    ints = torch.zeros((len(Field), num_lanes), dtype=torch.int64, device=device)
    ints[Field.LENGTH] = 300 + torch.arange(num_lanes, device=device)
    ints[Field.LIMIT], ints[Field.CAP] = 1 << 40, MOST
    floats = torch.ones((3, num_lanes), device=device)
    shape = (num_lanes, sizes.num_pages)
    pages = torch.randint(1, 9999, shape, dtype=torch.int32, device=device)
    return LaneState(ints, floats, pages)


def inputs_of(num_requests: int, device: str) -> Tensor:
    shape = (num_requests, Input.TOKENS + MOST)
    inputs = torch.full(shape, MOST, dtype=torch.int64, device=device)
    inputs[:, Input.LANE] = torch.arange(num_requests, device=device)
    return inputs


def choosing(variant: Variant, logits: Tensor) -> Work:
    return lambda: variant.best_ids(logits)


def whole_round(variant: Variant, state: LaneState, logits: Tensor) -> Work:
    """A round of greedy requests without drafts."""
    inputs = inputs_of(len(logits), logits.device.type)
    outputs = inputs.new_zeros((len(logits), Column.TOKENS + 3 * MOST))

    def work() -> object:
        opened = variant.open_round(state, inputs, 0, PAGE, Rule.BLOCK, is_given=True)
        best = variant.best_ids(logits)
        drafts = opened.given_RK
        closed = variant.close_round(state, opened, drafts, best, None, outputs)
        return closed.next_R

    return work


def figures(place: Place, ours: Work, eager: Work, **more: Any) -> dict[str, Any]:
    return {
        **more,
        "ours_us": place.microseconds(ours),
        "eager_us": place.microseconds(eager),
        "compiled_us": place.compiled_microseconds(eager),
    }


def rows(sizes: Sizes, place: Place) -> Iterator[dict[str, Any]]:
    """One row per case."""
    state = make_lanes(sizes, place.device)
    torch.manual_seed(0)
    for num_rows in sizes.rows:
        for dtype in (torch.bfloat16, torch.float32):
            logits = torch.randn(num_rows, sizes.vocab, device=place.device).to(dtype)
            works = [choosing(variant, logits) for variant in variants_on(place)]
            row = figures(place, *works, case=f"best_ids, {dtype}", rows=num_rows)
            row["floor_us"] = place.floor_us(logits.nbytes)
            if dtype == torch.bfloat16:
                copied = place.microseconds(lambda given=logits: given.float().argmax(-1))  # type: ignore[misc]
                row["float32_copy_us"] = copied
            yield row
    for batch in sizes.batches:
        logits = torch.randn(batch, 1, sizes.vocab, device=place.device).bfloat16()
        works = [whole_round(variant, state, logits) for variant in variants_on(place)]
        yield figures(place, *works, case="greedy round", rows=batch, num_draft=0)


def main(
    out: Out = RESULTS / "ops_rounds.json",
    device: Device = "cuda",
    budget_s: Annotated[float, typer.Option(help="nothing is compiled after this")] = 120.0,
) -> None:
    """Measure all cases and print a line for each."""
    place = make_place(device, budget_s)
    with torch.inference_mode():
        write_each(out, rows(Sizes() if device == "cuda" else TINY, place))


if __name__ == "__main__":
    typer.run(main)
