"""Products of few rows against memory bandwidth, the library's products and a compiler's fusion.

    python -m benchmarks.ops.linear            # the plans that are in force; about a minute
    python -m benchmarks.ops.linear --sweep    # which plan would be best for each shape

Each row is one product of a decoder with all that the kernel takes along: the norm before q, k, v
and before gate and up, the gate after them, the residual after o and down. ``library`` is the bare
product alone, ``separate`` the product and the rest as the library's operations, ``compiled`` the
same through torch.compile. The floor is the bytes of weight, rows and result over the bandwidth of
a large copy. Writes ``benchmarks/results/ops_linear.json``.
"""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import Tensor

from benchmarks.harness.results import write_result
from benchmarks.ops.timing import copy_bytes_per_s, graphed
from specops import linear, linear_triton
from specops.linear import Norm
from specops.linear_triton import Plan, Scratch, choose_plan

NUM_ROWS = (1, 2, 5, 8, 16, 32, 40, 64, 128)
_COMPILED_ROWS = (1, 5, 32)
_PARTS = 64


@dataclass(frozen=True, slots=True)
class Product:
    """One product of a decoder layer, or the lm_head."""

    model: str
    name: str
    num_outputs: int
    num_inputs: int
    normed: bool = False
    gated: bool = False
    added: bool = False


def _products(model: str, hidden: int, qkv: int, heads: int, inner: int) -> tuple[Product, ...]:
    return (
        Product(model, "qkv", qkv, hidden, normed=True),
        Product(model, "o", hidden, heads, added=True),
        Product(model, "gate_up", inner, hidden, normed=True, gated=True),
        Product(model, "down", hidden, inner, added=True),
        Product(model, "lm_head", 151_936, hidden),
    )


PRODUCTS = (
    *_products("8B", hidden=4096, qkv=6144, heads=4096, inner=12_288),
    *_products("0.6B", hidden=1024, qkv=4096, heads=2048, inner=3072),
)


@dataclass(frozen=True, slots=True)
class Case:
    """One product's tensors on the GPU, random."""

    product: Product
    x: Tensor
    weight: Tensor
    norm: Norm | None
    squares: Tensor | None
    residual: Tensor | None
    out: Tensor
    scratch: Scratch

    @property
    def num_bytes(self) -> int:
        """Read and written at least once."""
        moved = [self.x, self.weight, self.out]
        moved += [self.residual] if self.residual is not None else []
        return sum(t.numel() * t.element_size() for t in moved)

    def ours(self, plan: Plan | None = None) -> None:
        if self.residual is None:
            linear_triton.few_row_linear(
                self.x, self.weight, self.norm, self.squares, gated=self.product.gated,
                out=self.out, plan=plan, scratch=self.scratch,
            )  # fmt: skip
        else:
            linear_triton.few_row_residual(
                self.x, self.weight, self.residual, self.out, plan=plan, scratch=self.scratch
            )

    def library(self) -> Tensor:
        return torch.mm(self.x, self.weight.t())

    def separate(self, apply: Callable[..., Tensor] | None = None) -> Tensor:
        weight = None if self.norm is None else self.norm.weight_K
        apply = _separate if apply is None else apply
        return apply(self.x, self.weight, weight, self.product.gated, self.residual)


def _separate(
    x: Tensor, weight: Tensor, norm_weight: Tensor | None, gated: bool, residual: Tensor | None
) -> Tensor:
    if norm_weight is not None:
        x = torch.nn.functional.rms_norm(x, x.shape[1:], norm_weight, 1e-6)
    product = torch.mm(x, weight.t())
    if gated:
        product = linear.silu_gate(product)
    return product if residual is None else residual + product


@cache
def _weight(num_rows: int, num_inputs: int) -> Tensor:
    weight = torch.empty(num_rows, num_inputs, dtype=torch.bfloat16, device="cuda")
    return weight.normal_(std=num_inputs**-0.5)


@cache
def _scratch() -> Scratch:
    arrived = torch.zeros(8192, dtype=torch.int32, device="cuda")
    return Scratch(torch.empty(64 << 20, dtype=torch.float32, device="cuda"), arrived)


def make_case(product: Product, num_rows: int) -> Case:
    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, device="cuda").bfloat16()

    x = normal(num_rows, product.num_inputs)
    is_head = product.name == "lm_head"
    return Case(
        product,
        x,
        _weight(product.num_outputs * (1 + product.gated), product.num_inputs),
        Norm(normal(product.num_inputs), 1e-6) if product.normed else None,
        x.float().square().view(num_rows, _PARTS, -1).sum(-1) if product.normed else None,
        normal(num_rows, product.num_outputs) if product.added else None,
        torch.empty(
            num_rows, product.num_outputs, device="cuda",
            dtype=torch.float32 if is_head else torch.bfloat16,
        ),
        _scratch(),
    )  # fmt: skip


def rows(compiled: bool = True) -> list[dict[str, Any]]:
    """One row for each product and number of rows, by the plans in force."""
    torch.manual_seed(0)
    bandwidth = copy_bytes_per_s()
    return [
        _row(make_case(product, num_rows), bandwidth, compiled)
        for product in PRODUCTS
        for num_rows in NUM_ROWS
    ]


def _row(case: Case, bandwidth: float, compiled: bool) -> dict[str, Any]:
    product, num_rows = case.product, len(case.x)
    row: dict[str, Any] = {
        "model": product.model,
        "product": product.name,
        "num_rows": num_rows,
        "floor_us": case.num_bytes / bandwidth * 1e6,
    }
    times: dict[str, Callable[[], object]] = {"library": case.library, "separate": case.separate}
    if num_rows <= linear_triton.MAX_ROWS:
        times = {"ours": case.ours, **times}
    if compiled and product.model == "8B" and num_rows in _COMPILED_ROWS:
        torch.compiler.reset()  # it gives up after compiling one function for eight shapes
        function = torch.compile(_separate, dynamic=False)
        times["compiled"] = lambda: case.separate(function)
    for name, work in times.items():
        row[f"{name}_us"] = graphed(work).median_ms * 1e3
    if "ours_us" in row:
        row["share_of_bandwidth"] = row["floor_us"] / row["ours_us"]
    row["library_share_of_bandwidth"] = row["floor_us"] / row["library_us"]
    return row


def candidates(num_rows: int, product: Product) -> Iterator[Plan]:
    """Plans worth trying for ``num_rows`` rows; the one in force comes first."""
    shape = (product.num_outputs, product.num_inputs)
    yield choose_plan(num_rows, *shape, product.gated)
    if num_rows <= 2:
        for block_n, block_k, warps, stages in (
            (8, 512, 4, 1), (8, 512, 4, 3), (4, 512, 2, 4), (4, 1024, 4, 3), (8, 1024, 8, 3),
            (16, 256, 4, 4), (16, 512, 8, 4), (16, 512, 4, 3), (8, 256, 2, 5),
            (32, 256, 8, 4), (16, 1024, 8, 2), (8, 2048, 8, 2), (4, 2048, 4, 3), (2, 2048, 4, 4),
            (4, 512, 4, 1), (4, 1024, 2, 1), (4, 1024, 4, 1), (8, 512, 2, 1), (8, 512, 8, 1),
            (8, 1024, 4, 1), (8, 1024, 8, 1), (16, 512, 4, 1), (16, 512, 8, 1), (4, 2048, 8, 1),
        ):  # fmt: skip
            yield Plan("multiply", block_n // (1 + product.gated), block_k, 1, warps, stages)
    shapes: list[tuple[Any, ...]] = [
        ("weights_first", 64, 64, 4, 8), ("weights_first", 64, 128, 4, 3),
        ("weights_first", 64, 128, 4, 4), ("weights_first", 64, 256, 4, 3),
        ("weights_first", 128, 64, 8, 5),
    ]  # fmt: skip
    if product.gated:
        shapes += [
            ("weights_first", 32, 64, 4, 5), ("weights_first", 32, 64, 4, 7),
            ("weights_first", 32, 128, 4, 3), ("weights_first", 32, 64, 4, 4),
        ]  # fmt: skip
    if num_rows <= 16:
        shapes += [
            ("rows_first", 16, 256, 4, 4), ("rows_first", 16, 512, 4, 3),
            ("rows_first", 32, 128, 4, 5), ("rows_first", 32, 256, 4, 4),
        ]  # fmt: skip
    for way, block_n, block_k, warps, stages in shapes:
        loaded = block_n * (1 + product.gated) + max(16, num_rows)
        if loaded * block_k * 2 * stages > 200 << 10:
            continue
        tiles = -(-product.num_outputs // block_n)
        fits = 264 // tiles
        for split in sorted({1, max(1, fits), max(1, min(fits * 2, product.num_inputs // 256))}):
            if tiles * split <= 1056 or split == 1:
                yield Plan(way, block_n, block_k, min(split, 16), warps, stages)


def _sweep_cases(models: tuple[str, ...], rows: tuple[int, ...]) -> list[tuple[Product, int]]:
    return [(p, num_rows) for p in PRODUCTS if p.model in models for num_rows in rows]


def _compile(what: tuple[Product, int, Plan]) -> None:
    """Fill Triton's cache on disk; what it compiles depends on divisibility, not on the shape."""
    product, num_rows, plan = what
    small = Product(
        product.model, product.name, 512, 1024, product.normed, product.gated, product.added
    )
    try:
        make_case(small, num_rows).ours(plan)
    except Exception as error:  # a plan that does not fit the card is one that the sweep reports
        print(f"{product.name}, {num_rows} rows, {plan}: {type(error).__name__}")


def sweep(models: tuple[str, ...], rows: tuple[int, ...]) -> list[dict[str, Any]]:
    """All candidates' times for each product, best first."""
    chosen = _sweep_cases(models, rows)
    cases = [(p, m, plan) for p, m in chosen for plan in dict.fromkeys(candidates(m, p))]
    kinds = {(p.normed, p.gated, p.added, p.name == "lm_head", m, plan): (p, m, plan)
             for p, m, plan in cases}  # fmt: skip
    workers = min(12, os.cpu_count() or 1)
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, mp_context=spawn) as pool:
        list(pool.map(_compile, kinds.values(), chunksize=4))
    bandwidth = copy_bytes_per_s(1 << 30)
    found = []
    for product, num_rows in chosen:
        case = make_case(product, num_rows)
        plans = list(dict.fromkeys(candidates(num_rows, product)))
        floor_us = case.num_bytes / bandwidth * 1e6
        timed = sorted(
            ((_time(case, plan), plan) for plan in plans), key=lambda t: (t[0] is None, t[0] or 0.0)
        )
        found.append(
            {
                "model": product.model,
                "product": product.name,
                "num_rows": num_rows,
                "floor_us": floor_us,
                "library_us": graphed(case.library, calls=3).median_ms * 1e3,
                "in_force_us": next(us for us, plan in timed if plan == plans[0]),
                "best": [{"us": us, "plan": _short(plan)} for us, plan in timed[:6]],
            }
        )
        print(_sweep_line(found[-1]), flush=True)
    return found


def _time(case: Case, plan: Plan) -> float | None:
    """Microseconds; ``None`` if the card cannot run it."""
    try:
        return graphed(lambda: case.ours(plan), calls=3).median_ms * 1e3
    except Exception as error:
        print(f"{case.product.name}, {len(case.x)} rows, {plan}: {type(error).__name__}: {error}")
        return None


def _short(plan: Plan) -> str:
    return (
        f"{plan.way} {plan.block_n}x{plan.block_k} split {plan.split} "
        f"warps {plan.num_warps} stages {plan.num_stages}"
    )


def _sweep_line(row: dict[str, Any]) -> str:
    best = "; ".join(f"{b['us']:.1f} {b['plan']}" for b in row["best"][:3] if b["us"] is not None)
    in_force = row["in_force_us"]
    return (
        f"{row['model']:>5} {row['product']:>8} M={row['num_rows']:<3} floor {row['floor_us']:6.1f}"
        f" library {row['library_us']:6.1f} in force {in_force or float('nan'):6.1f} | {best}"
    )


def _line(row: dict[str, Any]) -> str:
    def number(key: str) -> str:
        return f"{row[key]:8.1f}" if key in row else " " * 8

    share = f"{row['share_of_bandwidth']:6.0%}" if "share_of_bandwidth" in row else " " * 6
    return (
        f"{row['model']:>5} {row['product']:>8} {row['num_rows']:>4} {number('floor_us')} "
        f"{number('ours_us')} {share} {number('library_us')} "
        f"{row['library_share_of_bandwidth']:6.0%} {number('separate_us')} {number('compiled_us')}"
    )


def main(
    out: Annotated[Path, typer.Option(help="where the result goes")] = Path(
        "benchmarks/results/ops_linear.json"
    ),
    compiled: Annotated[bool, typer.Option(help="time torch.compile as well")] = True,
    find_plans: Annotated[bool, typer.Option("--sweep", help="try all candidate plans")] = False,
    models: Annotated[str, typer.Option(help="of the sweep, by commas")] = "8B,0.6B",
    num_rows: Annotated[str, typer.Option(help="of the sweep, by commas")] = "1,5,16,32,64",
) -> None:
    """Microseconds of one product, all fused operations included."""
    if find_plans:
        counts = tuple(int(n) for n in num_rows.split(","))
        found = sweep(tuple(models.split(",")), counts)
    else:
        found = rows(compiled)
        print("model  product rows    floor     ours  share  library  share separate compiled")
        for row in found:
            print(_line(row))
    write_result(out, {"rows": found})


if __name__ == "__main__":
    typer.run(main)
