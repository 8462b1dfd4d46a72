"""Drafts from text inside a round: the index on the device, with a full ring.

    python -m benchmarks.ops.matches         # some seconds on one GPU

R requests of 500 tokens look for their last tokens in their own text and in 400,000 tokens of
finished ones; words come as often as the n-th of a language does, so that common ones match in many
places. Beside it, requests that are searched alone, and the part of a step that this is: of
SmolLM2-135M's plain step and of an 8B target's.

Writes ``benchmarks/results/ops_matches.json`` after every row, and ``rows/ops_matches.json``.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from functools import partial
from typing import Annotated, Any

import torch
import typer
from torch import Tensor

from benchmarks.harness.results import RESULTS, Out, Row, at_most, write_each, write_rows
from benchmarks.ops.place import Device, Place, make_place
from specops.device import text_drafts
from specops.matches import BLOCK, END, Bounds, RingText

K, BOUNDS = 4, Bounds(2, 12)
SIZES = (1, 8, 32, 128, 256)
RING_TOKENS, OWN_TOKENS, FINISHED_TOKENS, VOCAB = 400_000, 500, 300, 49_152
SMALL_STEP_US = {32: 1_150.0, 128: 2_700.0}
"""A plain step of SmolLM2-135M through HTTP on an H200 (benchmarks/results/floor.json)."""
LARGE_STEP_US = 4_000.0
"""One of an 8B target in bfloat16 at least: it reads its weights once, at the speed of a copy."""


def words(generator: torch.Generator, *shape: int) -> Tensor:
    """Tokens of which the n-th is drawn about in proportion to 1 / n."""
    drawn = torch.rand(shape, generator=generator, device=generator.device)
    return (VOCAB**drawn - 1).int()


def full_ring(generator: torch.Generator) -> RingText:
    """Finished texts of one namespace, one after the other."""
    num_blocks = RING_TOKENS // BLOCK
    ids = words(generator, num_blocks * BLOCK)
    each = -(-FINISHED_TOKENS // BLOCK) * BLOCK
    ids[torch.arange(len(ids), device=ids.device) % each >= FINISHED_TOKENS] = END
    bounds = torch.tensor([0, len(ids)], device=ids.device)
    return RingText(ids, torch.ones(num_blocks, dtype=torch.int32, device=ids.device), bounds)


def rows(place: Place) -> Iterator[dict[str, Any]]:
    """All sizes, with and without the ring, while time is left."""
    generator = torch.Generator(place.device).manual_seed(0)
    ring = full_ring(generator)
    for size in SIZES:
        texts = words(generator, size + 1, OWN_TOKENS + 100)
        lanes = torch.arange(size, dtype=torch.int32, device=place.device)
        lengths = torch.full((size,), OWN_TOKENS, device=place.device)
        for name, found in (("both texts", ring), ("the request alone", None)):
            if time.perf_counter() > place.deadline_s:
                return
            spaces = torch.ones_like(lengths)
            work = partial(text_drafts, texts, lanes, lengths, spaces, found, K, BOUNDS)
            matched = work().matched_R
            yield {
                "variant": name,
                "requests": size,
                "with_match": float((matched != 0).float().mean()),
                "us": place.microseconds(work),
            }


def claims(found: list[dict[str, Any]]) -> list[Row]:
    """Shares of a step, with their goals."""
    made = []
    for row in found:
        what = f"index on the device, {row['requests']} requests, K = {K}, "
        what += f"{RING_TOKENS:,} recent tokens, {row['variant']}"
        made.append(Row(what, "microseconds of a round, in a CUDA graph", row["us"], None, None))
        small_us = SMALL_STEP_US.get(row["requests"])
        if small_us is not None and row["variant"] == "both texts":
            share = row["us"] / small_us
            made.append(at_most(what, f"share of a 135M step of {small_us:g} us", share, 0.10))
            share = row["us"] / LARGE_STEP_US
            made.append(at_most(what, f"share of an 8B step of {LARGE_STEP_US:g} us", share, 0.03))
    return made


def main(
    out: Out = RESULTS / "ops_matches.json",
    device: Device = "cuda",
    budget_s: Annotated[float, typer.Option(help="no row starts after this")] = 60.0,
) -> None:
    """Measure all variants and print a line for each."""
    place = make_place(device, budget_s)
    found: list[dict[str, Any]] = []

    def kept() -> Iterator[dict[str, Any]]:
        for row in rows(place):
            found.append(row)
            yield row

    write_each(out, kept())
    write_rows("ops_matches", claims(found), "python -m benchmarks.ops.matches", out.parent)


if __name__ == "__main__":
    typer.run(main)
