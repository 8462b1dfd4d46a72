"""Passes of an EAGLE-3 drafter in a CUDA graph, with its torch module and fused.

    python -m benchmarks.ops.drafter                        # 0.6B and 8B; about a minute
    python -m benchmarks.ops.drafter --device cpu --out /tmp/drafter.json     # a trial, tiny size

Weights are random; shapes are those of drafters for the published targets with a draft vocabulary
of 32,000. A row is one of

- ``draft``: the cost of each additional draft token, without choosing it: a pass of one row per
  request, and its logits. The time of five draft tokens minus that of one, divided by four.
- ``take in``: computing five verified rows per request, including the product that joins the tapped
  layers, without the draft head.

Floors are the bytes of the weights in use, and of the keys and values in the context, over the
bandwidth of a large copy.

Writes ``benchmarks/results/ops_drafter.json`` after every row.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Annotated, Any

import torch
import typer
from torch import Tensor

from benchmarks.harness.results import RESULTS, Out, write_each
from benchmarks.harness.shapes import SHAPES, draft_vocab_size, draw_weights
from benchmarks.ops.place import Device, Place, Work, make_place
from drafters.eagle3.model import Eagle3, Eagle3Config, config_for_target
from drafters.eagle3.paged import PagedEagle3
from specops.attention import DecodePass
from specops.overlap_triton import can_overlap

_PAGE = 16
_MANY, _ONE = 5, 1
"""Numbers of draft tokens whose times are subtracted."""
_VERIFIED = 5
NUM_REQUESTS = {"draft": (1, 5, 32), "take in": (1, 32)}
VARIANTS: dict[str, dict[str, Any]] = {
    "overlap": {"overlap": True},
    "no overlap": {"overlap": False},
}


def drafter_config(shape: str) -> Eagle3Config:
    """The drafter of a target shape."""
    config = SHAPES[shape]()
    vocab_size = draft_vocab_size(config.vocab_size)
    return config_for_target(config, draft_vocab_size=vocab_size)


@dataclass(frozen=True, slots=True)
class Bench:
    """One drafter and where it runs."""

    module: Eagle3
    embed: torch.nn.Embedding
    context: int
    place: Place

    @property
    def device(self) -> torch.device:
        return self.embed.weight.device

    def us(self, work: Work) -> float:
        return self.place.microseconds(work, calls=1)


def make_bench(config: Eagle3Config, place: Place, context: int) -> Bench:
    torch.manual_seed(0)
    with torch.device(place.device):
        module = Eagle3(config)
        embed = torch.nn.Embedding(config.target_vocab_size, config.hidden_size)
    for drawn in (module, embed):
        draw_weights(drawn)
    assert module.d2t is not None
    module.d2t += torch.arange(config.draft_vocab_size, device=place.device)
    for made in (module, embed):
        made.to(torch.bfloat16).requires_grad_(False)
    return Bench(module, embed, context, place)


def make_paged(bench: Bench, num_requests: int, variant: dict[str, Any] | None) -> PagedEagle3:
    """A drafter over a pool filled from a fixed seed; without a variant, its torch module runs."""
    torch.manual_seed(1)
    num_pages = num_requests * bench.context // _PAGE + 1
    paged = PagedEagle3(bench.module, bench.embed, num_pages * _PAGE)
    paged.keys.normal_()
    paged.values.normal_()
    if variant is not None:
        reason = paged.fuse(bench.context, **variant)
        assert reason is None, reason
    return paged


def works(
    bench: Bench, kind: str, num_requests: int, paged: PagedEagle3
) -> list[Callable[[], Tensor]]:
    """The work to time; if there are two, the second's time is subtracted from the first's."""
    c, device = bench.module.config, bench.device
    num_pages = bench.context // _PAGE
    pages = torch.randperm(num_requests * num_pages, device=device, dtype=torch.int32) + 1
    first = torch.full((num_requests,), bench.context - 8, device=device, dtype=torch.int32)
    at = DecodePass(pages.view(num_requests, num_pages), first, _PAGE, first_key=1)
    if kind == "take in":
        num_rows = num_requests * _VERIFIED
        ids = torch.randint(0, c.target_vocab_size, (num_rows,), device=device)
        shape = (num_rows, len(c.layer_ids), c.hidden_size)
        features = torch.randn(shape, device=device).to(torch.bfloat16)
        return [lambda: paged.observe(ids, features, at)]
    outputs = torch.randn(num_requests, c.hidden_size, device=device).to(torch.bfloat16)
    ids = torch.randint(0, c.target_vocab_size, (_MANY, num_requests), device=device)

    def draft(num_draft: int) -> Tensor:
        """Logits of the last of ``num_draft`` tokens; the tokens themselves are given."""
        found: list[Tensor] = []

        def choose(logits: Tensor, number: int) -> Tensor:
            found.append(logits)
            return ids[number]

        paged.propose(outputs, at, num_draft, choose)
        return found[-1]

    return [lambda: draft(_MANY), lambda: draft(_ONE)]


def floor_bytes(bench: Bench, kind: str, num_requests: int) -> int:
    """Bytes of the weights, keys and values that a pass reads."""
    c = bench.module.config
    unread = bench.module.fc if kind == "draft" else bench.module.lm_head
    weights = sum(p.numel() for p in bench.module.parameters()) - unread.weight.numel()
    seen = 2 * c.num_kv_heads * c.head_dim * bench.context * num_requests
    return 2 * (weights + seen)


def _time_and_result(
    bench: Bench, kind: str, num_requests: int, variant: dict[str, Any] | None
) -> tuple[float, Tensor]:
    """Microseconds of one pass, and the result of the work with the most passes."""
    found = works(bench, kind, num_requests, make_paged(bench, num_requests, variant))
    result = found[0]().clone()
    times = [bench.us(work) for work in found]
    if len(times) == 1:
        return times[0], result
    return (times[0] - times[1]) / (_MANY - _ONE), result


def measure(name: str, bench: Bench, kind: str, num_requests: int) -> dict[str, Any]:
    """One row; times in microseconds."""
    place = bench.place
    num_rows = num_requests * (1 if kind == "draft" else _VERIFIED)
    row: dict[str, Any] = {
        "drafter": name, "kind": kind, "requests": num_requests, "rows": num_rows,
        "context": bench.context,
    }  # fmt: skip
    row["floor_us"] = place.floor_us(floor_bytes(bench, kind, num_requests))
    row["module_us"], want = _time_and_result(bench, kind, num_requests, None)
    row["fused_us"], differences = {}, {}
    for variant, options in VARIANTS.items():
        if options["overlap"] and place.is_gpu and not can_overlap(bench.device):
            continue
        row["fused_us"][variant], got = _time_and_result(bench, kind, num_requests, options)
        differences[variant] = ((got - want).float().norm() / want.float().norm()).item()
    row["difference_from_module"] = differences
    return row


def rows(place: Place, context: int) -> Iterator[dict[str, Any]]:
    """Every drafter, kind and number of requests, while time is left."""
    for name in ("Qwen3-0.6B", "Qwen3-8B") if place.is_gpu else ("tiny",):
        bench = make_bench(drafter_config(name), place, context)
        for kind, sizes in NUM_REQUESTS.items():
            for num_requests in sizes:
                if time.perf_counter() < place.deadline_s:
                    yield measure(name, bench, kind, num_requests)


def main(
    out: Out = RESULTS / "ops_drafter.json",
    device: Device = "cuda",
    context: Annotated[int, typer.Option(help="positions before the pass")] = 1024,
    budget_s: Annotated[float, typer.Option(help="no row starts after this")] = 300.0,
) -> None:
    """Measure one pass of the drafter, in microseconds."""
    with torch.inference_mode():
        write_each(out, rows(make_place(device, budget_s), context))


if __name__ == "__main__":
    typer.run(main)
