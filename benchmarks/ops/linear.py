"""Matrix products with few rows, against memory bandwidth, cuBLAS and torch.compile.

    python -m benchmarks.ops.linear            # about a minute

Each row is one product of a decoder with everything that its kernel fuses: the norm before q, k, v
and before gate and up, the gate after them, the residual after o and down. ``library`` is torch's
product alone, ``separate`` adds the rest as separate torch operations, and ``compiled`` runs those
through torch.compile. The floor is the bytes of weight, input rows and result over the bandwidth of
a large copy. Writes ``benchmarks/results/ops_linear.json`` after every row.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import typer
from torch import Tensor

from benchmarks.harness.results import RESULTS, Out, write_each
from benchmarks.ops.timing import copy_bytes_per_s, graphed_ms
from specops import linear, linear_triton
from specops.linear import Norm
from specops.linear_triton import Scratch

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
    """Random tensors of one product, on the GPU."""

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
        """Bytes that must be read and written at least once."""
        moved = [self.x, self.weight, self.out]
        moved += [self.residual] if self.residual is not None else []
        return sum(t.numel() * t.element_size() for t in moved)

    def ours(self) -> None:
        if self.residual is None:
            linear_triton.few_row_linear(
                self.x, self.weight, self.norm, self.squares, gated=self.product.gated,
                out=self.out, scratch=self.scratch,
            )  # fmt: skip
        else:
            linear_triton.few_row_residual(
                self.x, self.weight, self.residual, self.out, scratch=self.scratch
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


def rows() -> Iterator[dict[str, Any]]:
    """One row per product and number of rows."""
    torch.manual_seed(0)
    bandwidth = copy_bytes_per_s()
    for product in PRODUCTS:
        for num_rows in NUM_ROWS:
            yield _row(make_case(product, num_rows), bandwidth)


def _row(case: Case, bandwidth: float) -> dict[str, Any]:
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
    if product.model == "8B" and num_rows in _COMPILED_ROWS:
        torch.compiler.reset()  # it stops compiling a function after eight shapes
        function = torch.compile(_separate, dynamic=False)
        times["compiled"] = lambda: case.separate(function)
    for name, work in times.items():
        row[f"{name}_us"] = graphed_ms(work) * 1e3
    if "ours_us" in row:
        row["share_of_bandwidth"] = row["floor_us"] / row["ours_us"]
    row["library_share_of_bandwidth"] = row["floor_us"] / row["library_us"]
    return row


def main(out: Out = RESULTS / "ops_linear.json") -> None:
    """Measure each product with all its fused operations, in microseconds."""
    write_each(out, rows())


if __name__ == "__main__":
    typer.run(main)
