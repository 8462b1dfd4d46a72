"""Biases and penalties inside a round, against their eager and compiled definitions.

    python -m benchmarks.ops.penalties       # a few seconds on one GPU

R requests of 5 rows over the 151,936 tokens of Qwen3, float32 logits. None, one or all of the
requests use penalties and 300 biases. The eager and compiled definitions get counts and biases as
whole rows and adjust every request, whether it uses them or not. The floor reads and writes the
logits, and reads the counts, of the requests that use them, at the speed of a large copy; if none
does, our time is the launch alone. Counting the emitted tokens is timed separately.

Writes ``benchmarks/results/ops_penalties.json`` after every row.
"""

from __future__ import annotations

import random
import time
from collections.abc import Iterator
from functools import partial
from typing import Annotated, Any

import torch
import typer
from torch import Tensor

from benchmarks.harness.results import RESULTS, Out, write_each
from benchmarks.ops.place import Device, Place, Work, make_place
from specops import lane_penalties_triton
from specops.lane_penalties import LaneRequests, LaneTables, new_tables
from specops.penalties import counts_before, penalized

K, BIASES, HELD_BIASES = 4, 300, 512
SIZES = (1, 8, 64)


def tables_for(num_lanes: int, vocab_size: int, device: str) -> LaneTables:
    """Tables in which every lane has penalties, biases and some emitted tokens."""
    numbers = random.Random(0)
    tables = new_tables(num_lanes, vocab_size, HELD_BIASES, device)
    for lane in range(num_lanes):
        tables.biased_LB[lane, :BIASES] = torch.tensor(
            numbers.sample(range(vocab_size), BIASES), dtype=torch.int32
        )
    tables.bias_LB[:, :BIASES] = -1.5
    tables.penalties_L3[:] = torch.tensor([0.5, 0.3, 1.1], dtype=torch.float64)
    tables.counts_LV.random_(0, 6).mul_(tables.counts_LV % 3 == 0)
    return tables


def requests_of(num_requests: int, num_asking: int, device: str) -> LaneRequests:
    lanes = torch.arange(num_requests, device=device)
    asks = (lanes < num_asking).long()
    return LaneRequests(lanes, asks * BIASES, asks)


def by_rows(
    logits_RQV: Tensor, draft_RK: Tensor, bias_RV: Tensor, counts_RV: Tensor, penalties_R3: Tensor
) -> Tensor:
    """The definition applied to every request, given a bias for every token."""
    generated = (counts_RV // 2)[:, None] + counts_before(draft_RK, logits_RQV.shape[-1])
    in_prompt = counts_RV % 2 == 1
    return logits_RQV.copy_(penalized(logits_RQV, bias_RV, generated, in_prompt, penalties_R3))


def variants_of(num_requests: int, vocab_size: int, device: str) -> list[tuple[str, int, Work]]:
    """Name, number of requests that use penalties, and the work."""
    generator = torch.Generator(device).manual_seed(0)
    logits = torch.randn((num_requests, K + 1, vocab_size), generator=generator, device=device)
    draft = torch.randint(vocab_size, (num_requests, K), generator=generator, device=device)
    emitted = torch.nn.functional.pad(draft, (0, 1))
    count = torch.full((num_requests,), 3, device=device)
    tables = tables_for(num_requests, vocab_size, device)
    bias = torch.zeros((num_requests, vocab_size), device=device)
    rows = (logits, draft, bias, tables.counts_LV, tables.penalties_L3)
    adjust, count_tokens = lane_penalties_triton.adjust_rows, lane_penalties_triton.count_tokens
    variants: list[tuple[str, int, Work]] = []
    for num_asking in sorted({0, 1, num_requests}):
        asks = requests_of(num_requests, num_asking, device)
        variants += [
            ("ours", num_asking, partial(adjust, logits, draft, asks, tables)),
            ("counting", num_asking, partial(count_tokens, emitted, count, asks, tables)),
        ]
    variants.append(("eager", num_requests, partial(by_rows, *rows)))
    if device == "cuda":
        compiled = torch.compile(by_rows, dynamic=False)
        variants.append(("compiled", num_requests, partial(compiled, *rows)))
    return variants


def rows(place: Place, vocab_size: int) -> Iterator[dict[str, Any]]:
    """All variants, sizes and numbers of requests with penalties, while time is left."""
    for size in SIZES:
        for variant, num_asking, work in variants_of(size, vocab_size, place.device):
            if time.perf_counter() > place.deadline_s:
                return
            row = {"variant": variant, "requests": size, "asking": num_asking}
            num_bytes = 4 * num_asking * vocab_size * (2 * (K + 1) + 1)
            floor = {} if variant == "counting" else {"floor_us": place.floor_us(num_bytes)}
            yield {**row, "us": place.microseconds(work), **floor}


def main(
    out: Out = RESULTS / "ops_penalties.json",
    device: Device = "cuda",
    vocab_size: int = 151_936,
    budget_s: Annotated[float, typer.Option(help="no row starts after this")] = 120.0,
) -> None:
    """Measure all variants and print a line for each."""
    write_each(out, rows(make_place(device, budget_s), vocab_size))


if __name__ == "__main__":
    typer.run(main)
