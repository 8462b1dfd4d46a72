"""Packing the committed rows of one step, against torch.compile and against copying them.

    python -m benchmarks.ops.capture        # a few seconds on one H200

64 requests of 5 rows, 3 of them kept; Qwen3-8B's hidden size, three tapped layers and the last
hidden state. The alternatives are given the indices of the kept rows, which our kernel finds on the
device. The floor reads every kept vector in bfloat16 and writes it as fp8; PCIe transfers have
their own rows. Writes ``benchmarks/results/ops_capture.json``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
import typer
from torch import Tensor

from benchmarks.harness.results import RESULTS, Out, write_each
from benchmarks.ops.timing import copy_bytes_per_s, graphed_ms
from specops import capture_pack_triton
from specops.capture_pack import new_ring, quantise

NUM_REQUESTS, NUM_QUERY, KEPT = 64, 5, 3
LAYERS, HIDDEN = 3, 4096
CAPACITY = 4096


def gather_and_cast(
    features_TmH: Tensor, hidden_TH: Tensor, kept_N: Tensor
) -> tuple[Tensor, Tensor]:
    """The same for rows whose indices are known beforehand, without a ring."""
    rows = torch.cat((features_TmH[kept_N], hidden_TH[kept_N, None]), dim=1)
    return quantise(rows)


def rows() -> Iterator[dict[str, Any]]:
    """Every variant, with its time and bandwidth."""
    torch.manual_seed(0)
    num_rows = NUM_REQUESTS * NUM_QUERY
    features = torch.randn(num_rows, LAYERS, HIDDEN, dtype=torch.bfloat16, device="cuda")
    hidden = torch.randn(num_rows, HIDDEN, dtype=torch.bfloat16, device="cuda")
    counts = torch.full((NUM_REQUESTS,), KEPT, dtype=torch.int32, device="cuda")
    lanes = torch.arange(NUM_REQUESTS, device="cuda").int()
    kept = (lanes.long()[:, None] * NUM_QUERY + torch.arange(KEPT, device="cuda")).flatten()
    vectors = len(kept) * (LAYERS + 1) * HIDDEN
    copy_rate = copy_bytes_per_s()

    def ours(is_fp8: bool, pinned: bool) -> Callable[[], object]:
        ring = new_ring(CAPACITY, LAYERS + 1, HIDDEN, "cuda", is_fp8, pinned)
        return lambda: capture_pack_triton.pack_kept_rows(
            features, hidden, counts, lanes, lanes, ring
        )

    host = torch.empty(2 * vectors, dtype=torch.uint8, pin_memory=True)
    device = torch.empty(2 * vectors, dtype=torch.uint8, device="cuda")
    compiled = torch.compile(gather_and_cast, dynamic=False)
    variants: dict[str, tuple[Callable[[], object], float]] = {
        "ours, fp8": (ours(True, False), 3 * vectors),
        "ours, bfloat16": (ours(False, False), 4 * vectors),
        "eager, fp8": (lambda: gather_and_cast(features, hidden, kept), 3 * vectors),
        "compiled, fp8": (lambda: compiled(features, hidden, kept), 3 * vectors),
        "ours, fp8 to pinned memory": (ours(True, True), vectors),
        "ours, bfloat16 to pinned memory": (ours(False, True), 2 * vectors),
        "copy of fp8 bytes to pinned memory": (
            lambda: host[:vectors].copy_(device[:vectors], non_blocking=True),
            vectors,
        ),
        "copy of bfloat16 bytes to pinned memory": (
            lambda: host.copy_(device, non_blocking=True),
            2 * vectors,
        ),
    }
    for name, (work, num_bytes) in variants.items():
        ms = graphed_ms(work)
        row: dict[str, Any] = {"variant": name, "ms": ms, "gb_per_s": num_bytes / ms / 1e6}
        if "pinned" not in name:
            row["floor_ms"] = num_bytes / copy_rate * 1e3
        yield row


def main(out: Out = RESULTS / "ops_capture.json") -> None:
    """Measure all variants of packing one step."""
    write_each(out, rows())


if __name__ == "__main__":
    typer.run(main)
