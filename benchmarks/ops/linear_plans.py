"""The fastest plan of each product of a decoder, measured where it runs.

    python -m benchmarks.ops.linear_plans                # two minutes on 16 cores and a GPU

The four products of all layers are captured as one graph, as they follow each other in a step,
each launch overlapping the one before. One product at a time tries other plans than
``choose_plan``'s, then the fastest of all together: a product with many tiles leaves many partial
sums of squares to the next one, and what a kernel needs decides how many of the next ones start
early. The graph's time over the number of layers counts. Attention is left out.
Kernels are compiled by worker processes beforehand, into Triton's cache.

Writes ``benchmarks/results/ops_linear_plans.json``.
"""

from __future__ import annotations

import itertools
import json
import multiprocessing
import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import Tensor

from benchmarks.harness.results import RESULTS, Out, known, say, write_each
from benchmarks.ops.timing import replayed_ms
from specops import linear_triton
from specops.linear import Norm
from specops.linear_triton import Plan, Scratch

NAMES = ("qkv", "o", "gate_up", "down")
MOST_REGISTERS = 160
"""Sums that a thread may hold."""


@dataclass(frozen=True, slots=True)
class Decoder:
    """Sizes of a decoder's layers."""

    layers: int
    hidden: int
    qkv: int
    heads: int
    inner: int

    def product(self, name: str) -> tuple[int, int, bool]:
        """(N, K, is gated)."""
        return {
            "qkv": (self.qkv, self.hidden, False),
            "o": (self.hidden, self.heads, False),
            "gate_up": (self.inner, self.hidden, True),
            "down": (self.hidden, self.inner, False),
        }[name]


DECODERS = {
    "SmolLM2-135M": Decoder(30, 576, 960, 576, 1536),
    "Qwen3-0.6B": Decoder(28, 1024, 4096, 2048, 3072),
    "Qwen3-8B": Decoder(8, 4096, 6144, 4096, 12_288),
}


def candidates(num_rows: int, gated: bool) -> Iterator[Plan]:
    """Plans worth a try for so many rows."""
    rows = 1 << (num_rows - 1).bit_length()
    if num_rows <= 8:
        for n, k, warps, stages in itertools.product((4, 8), (128, 256, 512), (2, 4), (1, 3)):
            if n * rows * k * (1 + gated) <= MOST_REGISTERS * 32 * warps:
                yield Plan("multiply", n, k, 1, warps, stages)
    tiles = (8, 16) if gated else (16, 32)
    for n, k, split, warps in itertools.product(tiles, (64, 128), (1, 2, 4), (2, 4)):
        if not (gated and split > 1):
            yield Plan("weights_first", n, k, split, warps, 4)


class Chain:
    """The products of all layers, one after another, for one number of rows."""

    def __init__(self, decoder: Decoder, num_rows: int, layers: int) -> None:
        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, device="cuda").bfloat16()

        self.decoder, self.num_rows = decoder, num_rows
        self.x = normal(num_rows, decoder.hidden)
        self.squares = self.x.float().square().view(num_rows, 4, -1).sum(-1)
        self.norm = Norm(normal(decoder.hidden), 1e-6)
        self.weights = []
        for _ in range(layers):
            shapes = {name: decoder.product(name) for name in NAMES}
            self.weights.append(
                {
                    name: normal(n * (1 + gated), k).mul_(0.1 * k**-0.5)
                    for name, (n, k, gated) in shapes.items()
                }
            )
        arrived = torch.zeros(8192, dtype=torch.int32, device="cuda")
        self.scratch = Scratch(torch.empty(16 << 20, device="cuda"), arrived)

    def run(self, plans: dict[str, Plan], overlap: bool = True) -> None:
        x, squares = self.x, self.squares
        for weight in self.weights:
            how = {
                name: {"plan": plans.get(name), "scratch": self.scratch, "overlap": overlap}
                for name in NAMES
            }
            qkv = linear_triton.few_row_linear(x, weight["qkv"], self.norm, squares, **how["qkv"])
            x, squares = linear_triton.few_row_residual(
                qkv[:, : self.decoder.heads], weight["o"], x, **how["o"]
            )
            inner = linear_triton.few_row_linear(
                x, weight["gate_up"], self.norm, squares, gated=True, **how["gate_up"]
            )
            x, squares = linear_triton.few_row_residual(inner, weight["down"], x, **how["down"])

    def layer_us(self, plans: dict[str, Plan]) -> float:
        """Microseconds of a layer's products."""
        self.run(plans)
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=side):
            self.run(plans)
        return replayed_ms(graph.replay, 12) * 1e3 / len(self.weights)


def compile_kernels(task: tuple[str, int, str, list[Plan]]) -> None:
    """Compile what these plans of a product need; failures show when they are measured."""
    decoder, num_rows, name, plans = DECODERS[task[0]], *task[1:]
    chain = Chain(decoder, num_rows, 1)
    for plan in plans:
        try:
            chain.run({name: plan})
        except Exception as error:  # a plan that the device has no room for
            say(f"{task[:3]} {plan}: {error}")


def rows(
    names: list[str], counts: list[int], workers: int, former: list[dict[str, Any]]
) -> Iterator[dict[str, Any]]:
    """One row per decoder, number of rows, product and plan; then the fastest plans together."""
    torch.manual_seed(0)
    tried = {
        (decoder, num_rows, name): _shortlist(former, decoder, num_rows, name)
        or list(candidates(num_rows, name == "gate_up"))
        for decoder, num_rows, name in itertools.product(names, counts, NAMES)
    }
    tasks = [(*key, chunk) for key, plans in tried.items() for chunk in _in_chunks(plans, 10)]
    with multiprocessing.get_context("spawn").Pool(workers) as pool:
        pool.map(compile_kernels, tasks, chunksize=1)
    say(f"{len(tasks)} tasks compiled")
    for decoder, num_rows in itertools.product(names, counts):
        chain = Chain(DECODERS[decoder], num_rows, DECODERS[decoder].layers)
        about = {"decoder": decoder, "num_rows": num_rows}
        fast: dict[str, list[Plan | None]] = {}
        for name in NAMES:
            found = []
            for plan in tried[decoder, num_rows, name]:
                try:
                    found.append((chain.layer_us({name: plan}), plan))
                except Exception as error:
                    say(f"{decoder}, {num_rows} rows, {name}, {plan}: {error}")
            found.sort(key=lambda one: one[0])
            fast[name] = [None, *(plan for _, plan in found[:3])]
            for us, plan in found[:6]:
                yield {**about, "product": name, "layer_us": us, "plan": asdict(plan)}
        together = [
            (chain.layer_us(chosen), chosen)
            for plans in itertools.product(*fast.values())
            for chosen in [{n: p for n, p in zip(NAMES, plans, strict=True) if p is not None}]
        ]
        ruled_us = next(us for us, chosen in together if not chosen)
        again_us = chain.layer_us({})
        yield {**about, "product": "all by rule", "layer_us": ruled_us, "again_us": again_us}
        for us, chosen in sorted(together, key=lambda one: one[0])[:12]:
            plans = {name: asdict(plan) for name, plan in chosen.items()}
            yield {**about, "product": "together", "layer_us": us, "plans": plans}


def _shortlist(former: list[dict[str, Any]], decoder: str, num_rows: int, name: str) -> list[Plan]:
    """The three fastest plans of a product in an earlier result."""
    own = (decoder, num_rows, name)
    found = [r for r in former if (r["decoder"], r["num_rows"], r["product"]) == own]
    return [Plan(**row["plan"]) for row in found[:3]]


def _in_chunks(plans: list[Plan], size: int) -> Iterator[list[Plan]]:
    for at in range(0, len(plans), size):
        yield plans[at : at + size]


def main(
    decoders: str = "SmolLM2-135M",
    num_rows: Annotated[str, typer.Option(help="numbers of rows")] = "1,3,5",
    workers: Annotated[int, typer.Option(help="processes that compile")] = 0,
    former: Annotated[
        Path | None, typer.Option(help="result whose fastest plans are tried")
    ] = None,
    out: Out = RESULTS / "ops_linear_plans.json",
) -> None:
    """Measure plans, in microseconds of a layer's products."""
    names = known("decoders", decoders.split(","), DECODERS)
    counts = [int(n) for n in num_rows.split(",")]
    known_rows = [] if former is None else json.loads(former.read_text())["rows"]
    workers = workers or max(1, (os.cpu_count() or 2) - 2)
    write_each(out, rows(names, counts, workers, known_rows))


if __name__ == "__main__":
    typer.run(main)
