"""What distillation costs beside its bare matrix products, and what it holds.

    python -m benchmarks.ops.distill        # needs a GPU of 40 GB; about a minute

8,192 rows of 4,096, a teacher of 151,936 tokens, a student of all of them or of 32,000, bfloat16.
Value and both gradients by ``specops.distill`` with its kernels, by the same blocks in torch, eager
and compiled, and by Liger where it is installed and can do it. The floor is the four products of
all rows at once: teacher's logits, student's logits, and the gradients of hidden rows and weight.
Writes ``benchmarks/results/ops_distill.json``.
"""

from __future__ import annotations

import gc
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import Tensor

from benchmarks.ops.timing import Timed, copy_bytes_per_s, eager
from benchmarks.result import write_result
from specops import distill_triton
from specops.distill import (
    BLOCKS,
    Blocks,
    FrozenHead,
    LossKind,
    Rows,
    Teacher,
    distill,
    judge_,
    target_of,
)

NUM_ROWS, HIDDEN, VOCAB = 8192, 4096, 151_936
DRAFT_VOCABS = (32_000, VOCAB)
KINDS: tuple[LossKind, ...] = ("lk", "forward_kl")
TORCH_CHUNK = 1024
"""Rows of a block for the torch variants: a divisor, so that one shape is compiled."""
REPEATS = 20


@dataclass(frozen=True, slots=True)
class Case:
    """One set of inputs."""

    hidden: Tensor
    weight: Tensor
    teacher: Teacher
    rows: Rows
    weights: Tensor

    def gradients(
        self, kind: LossKind, blocks: Blocks | None = None, chunk_rows: int | None = None
    ) -> None:
        """One training step's worth, as autograd runs it."""
        given = (self.teacher, self.rows, self.weights, kind, chunk_rows, blocks)
        loss = distill(self.hidden, self.weight, *given).loss
        torch.autograd.grad(loss, (self.hidden, self.weight))


def make_case(draft_vocab: int) -> Case:
    """Random, with logits of standard deviation 1.3 and a student near its teacher."""
    torch.manual_seed(0)
    made: dict[str, Any] = {"device": "cuda", "dtype": torch.bfloat16}
    head = torch.randn(VOCAB, HIDDEN, **made) * 0.02
    ids = torch.randperm(VOCAB, device="cuda")[:draft_vocab].sort().values
    whole = draft_vocab == VOCAB
    weight = (head if whole else head[ids]) + torch.randn(draft_vocab, HIDDEN, **made) * 0.01
    seen = torch.randn(NUM_ROWS, HIDDEN, **made)
    hidden = seen + 0.5 * torch.randn(NUM_ROWS, HIDDEN, **made)
    labels = torch.randint(0, draft_vocab, (NUM_ROWS,), device="cuda")
    return Case(
        hidden.requires_grad_(),
        weight.requires_grad_(),
        Teacher(seen, FrozenHead(head), None if whole else ids),
        Rows(labels, torch.ones_like(labels, dtype=torch.bool)),
        torch.rand(NUM_ROWS, device="cuda") / NUM_ROWS,
    )


def products(case: Case) -> Callable[[], object]:
    """The four products of all rows, into fixed memory."""
    hidden, weight = case.hidden.detach(), case.weight.detach()
    head = case.teacher.head.weight_VH
    seen = torch.empty(NUM_ROWS, VOCAB, dtype=hidden.dtype, device="cuda")
    own = torch.empty(NUM_ROWS, len(weight), dtype=hidden.dtype, device="cuda")
    grad_hidden, grad_weight = torch.empty_like(hidden), torch.empty_like(weight)

    def work() -> None:
        torch.mm(case.teacher.hidden_RH, head.T, out=seen)
        torch.mm(hidden, weight.T, out=own)
        torch.mm(own, weight, out=grad_hidden)
        torch.mm(own.T, hidden, out=grad_weight)

    return work


def kernels_alone(case: Case) -> Callable[[], object]:
    """The kernels of all rows, 1,024 at a time, over logits that are there."""
    weight = case.weight.detach()
    seen = case.teacher.hidden_RH[:TORCH_CHUNK] @ case.teacher.head.weight_VH.T
    own = case.hidden.detach()[:TORCH_CHUNK] @ weight.T
    rows, weights = case.rows.part(slice(TORCH_CHUNK)), case.weights[:TORCH_CHUNK]

    def work() -> None:
        for _ in range(NUM_ROWS // TORCH_CHUNK):
            target = distill_triton.target_of(seen, case.teacher.ids_D, None, None)
            distill_triton.judge_(own, target, rows, weights, "lk")

    return work


def liger(case: Case) -> Callable[[], object] | None:
    """Its fused linear JSD, as forward KL; it knows no reduced vocabulary and no row weights."""
    try:
        from liger_kernel.transformers import LigerFusedLinearJSD
    except ImportError:
        return None
    if case.teacher.ids_D is not None:
        return None
    loss_of = LigerFusedLinearJSD(jsd_beta=0.0)

    def work() -> None:
        head = case.teacher.head.weight_VH
        loss = loss_of(case.hidden, case.weight, case.teacher.hidden_RH, head, None)
        torch.autograd.grad(loss, (case.hidden, case.weight))

    return work


def extra_bytes(case: Case, work: Callable[[], object]) -> int:
    """Most that ``work`` holds beyond its inputs and the two gradients."""
    gc.collect()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    work()
    torch.cuda.synchronize()
    gradients = 2 * (case.hidden.numel() + case.weight.numel())
    return torch.cuda.max_memory_allocated() - before - gradients


def rows() -> list[dict[str, Any]]:
    """Every variant for both vocabularies of the student."""
    found: list[dict[str, Any]] = []
    compiled = Blocks(
        torch.compile(target_of, dynamic=False),
        torch.compile(judge_, dynamic=False),
        BLOCKS.judge_labels,
    )
    for draft_vocab in DRAFT_VOCABS:
        case = make_case(draft_vocab)
        floor = eager(products(case), REPEATS)

        def add(
            name: str,
            kind: str,
            timed: Timed,
            extra: int | None,
            draft_vocab: int = draft_vocab,
            floor: Timed = floor,
        ) -> None:
            found.append(
                {
                    "draft_vocab": draft_vocab,
                    "variant": name,
                    "loss": kind,
                    "ms": timed.median_ms,
                    "low_ms": timed.low_ms,
                    "high_ms": timed.high_ms,
                    "ratio_to_products": timed.median_ms / floor.median_ms,
                    "extra_mb": None if extra is None else extra / 1e6,
                }
            )

        add("products", "", floor, None)
        add("kernels alone", "lk", eager(kernels_alone(case), REPEATS), None)
        works: list[tuple[str, str, Callable[[], object]]] = []
        for kind in KINDS:
            works.append(("ours", kind, lambda c=case, k=kind: c.gradients(k)))
        for name, blocks in (("torch", BLOCKS), ("torch.compile", compiled)):
            works.append((name, "lk", lambda c=case, b=blocks: c.gradients("lk", b, TORCH_CHUNK)))
        other = liger(case)
        if other is not None:
            works.append(("liger fused linear jsd", "forward_kl", other))
        for name, kind, work in works:
            add(name, kind, eager(work, REPEATS), extra_bytes(case, work))
        del case, works, other
        gc.collect()
        torch.cuda.empty_cache()
    return found


def main(
    out: Annotated[Path, typer.Option(help="where the result goes")] = Path(
        "benchmarks/results/ops_distill.json"
    ),
) -> None:
    """Measure, print, write."""
    found = rows()
    print(f"{'draft vocab':>11}  {'variant':24}{'loss':12}{'ms':>8}{'ratio':>7}{'extra MB':>10}")
    for row in found:
        extra = "" if row["extra_mb"] is None else f"{row['extra_mb']:.0f}"
        print(
            f"{row['draft_vocab']:>11}  {row['variant']:24}{row['loss']:12}{row['ms']:8.2f}"
            f"{row['ratio_to_products']:7.3f}{extra:>10}"
        )
    shape = {"rows": NUM_ROWS, "hidden": HIDDEN, "vocab": VOCAB, "dtype": "bfloat16"}
    ceiling = {"copy_bytes_per_s": copy_bytes_per_s()}
    write_result(out, {"shape": shape, "rows": found, **ceiling})


if __name__ == "__main__":
    typer.run(main)
