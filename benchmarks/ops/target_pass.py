"""A pass of a small target with neighbours joined to products, and without.

    python -m benchmarks.ops.target_pass                 # SmolLM2-135M on one GPU; about 40 s
    TRITON_INTERPRET=1 python -m benchmarks.ops.target_pass --device cpu --shape tiny \\
        --out /tmp/target_pass.json                      # a trial

Random weights in bfloat16, contexts of 50 to 600 tokens in tables for 1,024. A line is a number of
requests and of rows each: the layers of one pass without the lm_head, in a CUDA graph with a cold
cache, and how far the hidden states of both ways are apart. Writes ``ops_target_pass.json`` and
``rows/target_pass.json`` in ``benchmarks/results``.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from functools import partial
from typing import Annotated, Any

import torch
import typer
from transformers import AutoModelForCausalLM

from benchmarks.harness.results import RESULTS, Out, Row, at_most, write_result, write_rows
from benchmarks.harness.shapes import SHAPES, draw_weights
from benchmarks.ops.place import Device, Place, make_place
from specops.attention import DecodePass
from specops.device import places_of
from targets.target import Target

SIZES = ((1, 1), (1, 5), (8, 1), (8, 4), (32, 1))
"""Requests, and rows of each."""
VARIANTS: dict[str, bool | None] = {"separate": False, "joined": None}
"""``joins`` of ``FusedDecoder``."""
_PAGE, _PAGES_EACH = 16, 64
_SHORTEST, _LONGEST = 50, 600


def make_targets(shape: str, place: Place) -> dict[str, Target]:
    """One for each variant, with the same random weights."""
    torch.manual_seed(0)
    with torch.device(place.device):
        model: Any = AutoModelForCausalLM.from_config(SHAPES[shape]())  # type: ignore[no-untyped-call]
    draw_weights(model)
    model.to(torch.bfloat16 if place.is_gpu else torch.float32).requires_grad_(False)
    targets = {}
    for name, joins in VARIANTS.items():
        target = Target(model, ())
        reason = target.fuse(_PAGE * _PAGES_EACH, joins=joins)
        assert reason is None, reason
        targets[name] = target
    return targets


def measure(targets: dict[str, Target], num_requests: int, num_query: int, place: Place) -> Any:
    """One line; times in microseconds."""
    torch.manual_seed(1)
    device = torch.device(place.device)
    order = torch.randperm(num_requests * _PAGES_EACH, device=device).int() + 1
    first = torch.randint(
        _SHORTEST, _LONGEST + 1, (num_requests,), dtype=torch.int32, device=device
    )
    at = DecodePass(order.view(num_requests, _PAGES_EACH), first, _PAGE)
    vocab_size = targets["joined"].vocab_size
    ids = torch.randint(0, vocab_size, (num_requests * num_query,), device=device)
    rows = places_of(at, num_query)
    line: dict[str, Any] = {"requests": num_requests, "rows_each": num_query}
    found = {}
    for name, target in targets.items():
        pool = target.make_pool((num_requests * _PAGES_EACH + 1) * _PAGE)
        for kept in (*pool.keys, *pool.values):
            kept.normal_(generator=torch.Generator(device).manual_seed(2))
        decode = partial(
            target.decode, ids, rows.positions.flatten(), rows.slots.flatten(), at, pool
        )
        found[name] = decode().hidden_TH.float()
        line[f"{name}_us"] = place.microseconds(decode, calls=1)
    apart = (found["joined"] - found["separate"]).norm() / found["separate"].norm()
    return line | {"apart": float(apart)}


def lines(shape: str, place: Place) -> Iterator[dict[str, Any]]:
    """One for each size, while time is left."""
    targets = make_targets(shape, place)
    for num_requests, num_query in SIZES:
        if time.perf_counter() < place.deadline_s:
            yield measure(targets, num_requests, num_query, place)


def main(
    out: Out = RESULTS / "ops_target_pass.json",
    device: Device = "cuda",
    shape: str = "SmolLM2-135M",
    budget_s: Annotated[float, typer.Option(help="no line starts after this")] = 40.0,
) -> None:
    """Measure."""
    found, rows = [], []
    with torch.inference_mode():
        for line in lines(shape, make_place(device, budget_s)):
            print(line, flush=True)
            found.append(line)
            what = f"{shape}, {line['requests']} requests, {line['rows_each']} rows each"
            before, now = line["separate_us"], line["joined_us"]
            rows.append(Row(what, "layers of a pass, microseconds, separate", before, None, None))
            rows.append(at_most(what, "layers of a pass, microseconds, joined", now, before))
    write_result(out, {"shape": shape, "lines": found})
    write_rows("target_pass", rows, "python -m benchmarks.ops.target_pass", out.parent)


if __name__ == "__main__":
    typer.run(main)
