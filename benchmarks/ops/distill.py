"""Time and memory of distillation losses, against their matrix products alone.

    python -m benchmarks.ops.distill        # needs a GPU with 40 GB; about three minutes

bfloat16; 8,192 rows with hidden size 4,096, a teacher vocabulary of 151,936 tokens, and a student
vocabulary of the same size or of 32,000. Computes the value and both gradients of each loss with
the kernels of ``specops.distill``, with the same blocks in torch (eager and compiled), and with
Liger. The floor is the four matrix products over all rows at once: the teacher's logits, the
student's logits, and the gradients of hidden rows and weight.

Liger supports no reduced vocabulary and has no LK loss. Its forward KL is JSD with beta 0, fused in
Triton or in chunks by torch.compile (``chunked_loss``). Its total variation cannot compute the
logits itself, so it is given the logits of all rows; it also computes a cross-entropy.

If a variant cannot run, or no time is left for it, its row says why. Writes
``benchmarks/results/ops_distill.json`` after every row.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Annotated, Any

import torch
import typer
from torch import Tensor

from benchmarks.harness.engines import release
from benchmarks.harness.results import RESULTS, Out, write_each
from benchmarks.ops.place import Work, reason
from benchmarks.ops.timing import copy_bytes_per_s, eager_ms
from specops import device
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
KINDS: tuple[LossKind, ...] = ("lk", "forward_kl", "total_variation")
TORCH_CHUNK = 1024
"""Rows per block of the torch variants; a divisor of all rows, so that one shape is compiled."""


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
        """The loss and gradients of one training step, through autograd."""
        given = (self.hidden, self.weight, self.teacher, self.rows, self.weights, kind, chunk_rows)
        found = device.distill(*given) if blocks is None else distill(*given, blocks)
        torch.autograd.grad(found.loss, (self.hidden, self.weight))


def make_case(draft_vocab: int) -> Case:
    """Random inputs: logits with standard deviation 1.3, and a student close to its teacher."""
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


def products(case: Case) -> Work:
    """The four matrix products over all rows, written to fixed memory."""
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


def liger_fused(case: Case) -> Work:
    """Forward KL, fused; all rows have the same weight."""
    from liger_kernel.transformers import LigerFusedLinearJSD

    loss_of = LigerFusedLinearJSD(jsd_beta=0.0)

    def work() -> None:
        given = (case.hidden, case.weight, case.teacher.hidden_RH, case.teacher.head.weight_VH)
        torch.autograd.grad(loss_of(*given, None), (case.hidden, case.weight))

    return work


def liger_chunked(case: Case) -> Work:
    """Forward KL in chunks of 1,024 rows; the labels only mark every row as valid."""
    from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

    loss_of = LigerFusedLinearJSDLoss(weight_hard_loss=0.0, weight_soft_loss=1.0, beta=0.0)

    def work() -> None:
        given = (case.hidden, case.weight, case.teacher.hidden_RH, case.teacher.head.weight_VH)
        loss = loss_of(*given, case.rows.label_ids_N)
        torch.autograd.grad(loss, (case.hidden, case.weight))

    return work


def liger_of_logits(case: Case) -> Work:
    """Total variation from the logits of all rows."""
    from liger_kernel.transformers import LigerFusedCETVDLoss

    loss_of = LigerFusedCETVDLoss()

    def work() -> None:
        with torch.no_grad():
            seen = case.teacher.hidden_RH @ case.teacher.head.weight_VH.T
        _, distance = loss_of(case.hidden @ case.weight.T, seen, case.rows.label_ids_N)
        torch.autograd.grad((case.weights * distance).sum(), (case.hidden, case.weight))

    return work


@dataclass(frozen=True, slots=True)
class Variant:
    """One implementation of one loss."""

    name: str
    kind: str
    make: Callable[[], Work]
    """Raises if the library is not installed."""


def steps_of(case: Case, kind: LossKind, blocks: Blocks | None, chunk_rows: int | None) -> Work:
    """One step with ``specops.distill``."""
    return partial(case.gradients, kind, blocks, chunk_rows)


def variants(case: Case) -> Iterator[Variant]:
    """Our variants come first, then the alternatives by loss."""
    for kind in KINDS:
        yield Variant("ours", kind, partial(steps_of, case, kind, None, None))
    torch._dynamo.reset()
    compiled = Blocks(
        torch.compile(target_of, dynamic=False),
        torch.compile(judge_, dynamic=False),
        BLOCKS.judge_labels,
    )
    for kind in KINDS:
        for name, blocks in (("torch.compile", compiled), ("torch", BLOCKS)):
            yield Variant(name, kind, partial(steps_of, case, kind, blocks, TORCH_CHUNK))
    if case.teacher.ids_D is None:
        yield Variant("liger fused linear jsd", "forward_kl", partial(liger_fused, case))
        yield Variant("liger chunked jsd", "forward_kl", partial(liger_chunked, case))
        yield Variant("liger tvd of logits", "total_variation", partial(liger_of_logits, case))


def extra_bytes(case: Case, work: Work) -> int:
    """Peak memory of ``work`` in bytes, beyond its inputs and the two gradients."""
    gc.collect()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    work()
    torch.cuda.synchronize()
    gradients = 2 * (case.hidden.numel() + case.weight.numel())
    return torch.cuda.max_memory_allocated() - before - gradients


def row_of(case: Case, variant: Variant, floor_ms: float) -> dict[str, Any]:
    work = variant.make()
    ms = eager_ms(work)
    return {
        "ms": ms, "ratio_to_products": ms / floor_ms, "extra_mb": extra_bytes(case, work) / 1e6,
    }  # fmt: skip


def tried_row(case: Case, variant: Variant, floor_ms: float, deadline_s: float) -> dict[str, Any]:
    """``row_of``, or why there is no figure."""
    if time.perf_counter() > deadline_s:
        return {"error": "not run: no time left"}
    try:
        return row_of(case, variant, floor_ms)
    except Exception as error:  # whatever the cause, the other rows are still useful
        return {"error": reason(error)}


def rows_of(draft_vocab: int, deadline_s: float) -> Iterator[dict[str, Any]]:
    """Every variant for one student vocabulary; none starts after the deadline."""
    case = make_case(draft_vocab)
    floor_ms = eager_ms(products(case))
    yield {"variant": "products", "loss": "", "ms": floor_ms, "ratio_to_products": 1.0}
    for variant in variants(case):
        found = tried_row(case, variant, floor_ms, deadline_s)
        yield {"variant": variant.name, "loss": variant.kind, **found}
        torch.cuda.empty_cache()


def rows(budget_s: float) -> Iterator[dict[str, Any]]:
    """Both student vocabularies, each within its share of the time."""
    started = time.perf_counter()
    for number, draft_vocab in enumerate(DRAFT_VOCABS, start=1):
        deadline_s = started + budget_s * number / len(DRAFT_VOCABS)
        for row in rows_of(draft_vocab, deadline_s):
            yield {"draft_vocab": draft_vocab, **row}
        release(torch.device("cuda"))


def main(
    out: Out = RESULTS / "ops_distill.json",
    budget_s: Annotated[float, typer.Option(help="no variant starts after this")] = 300.0,
) -> None:
    """Measure all variants; print and write each row."""
    shape = {"rows": NUM_ROWS, "hidden": HIDDEN, "vocab": VOCAB, "dtype": "bfloat16"}
    write_each(out, rows(budget_s), shape=shape, copy_bytes_per_s=copy_bytes_per_s())


if __name__ == "__main__":
    typer.run(main)
