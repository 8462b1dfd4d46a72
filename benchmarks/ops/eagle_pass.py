"""EAGLE-3's fused drafts: how far they are from float32, and how long they take.

    python -m benchmarks.ops.eagle_pass                  # SmolLM2-135M on one GPU; about 30 s
    TRITON_INTERPRET=1 python -m benchmarks.ops.eagle_pass --device cpu --shape tiny \\
        --out eagle_pass.json                            # a trial

Random weights in bfloat16, the target's whole vocabulary, contexts of 50 to 600 tokens in tables
for 1,024. A line is a number of requests:

- *checks*: the logits of passes over given tokens, and the keys and values that they write, against
  the same weights in float32, beside those of the module's own code.
- *times*: a draft of four tokens, most likely ones and drawn ones, each in a CUDA graph with a cold
  cache. ``pass``: the time of four minus that of one, divided by three.

Ends with exit code 1 if results differ by more than rounding. Writes ``ops_eagle_pass.json`` and
``rows/eagle_pass.json`` in ``benchmarks/results``.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Annotated, Any

import torch
import typer
from torch import Tensor

from benchmarks.harness.results import RESULTS, Out, Row, write_result, write_rows
from benchmarks.harness.shapes import SHAPES, draw_weights
from benchmarks.ops.laws import TEMPERATURE, numbering_of
from benchmarks.ops.place import Device, Place, make_place
from drafters.eagle3.model import Eagle3, config_for_target
from drafters.eagle3.paged import PagedEagle3
from serving.engine.drafts import Best
from specops.attention import DecodePass
from specops.device import sample_draft
from specops.sampling import sampling_rows

NUM_DRAFT = 4
_PAGE, _PAGES_EACH = 16, 64
_SHORTEST, _LONGEST = 50, 600
_FURTHER_OFF = 1.5
"""Logits, keys and values may be this many times as far from float32 as the module's."""
_NEARLY = 1e-5
"""And this much further, relative."""


class DifferError(Exception):
    """Fused passes do not compute what they should."""


@dataclass(frozen=True, slots=True)
class Case:
    """R requests, and two drafters with equal pools."""

    outputs: Tensor
    at: DecodePass
    fused: PagedEagle3
    own: PagedEagle3
    """Runs the module's own code."""

    def draft(self, num_draft: int = NUM_DRAFT) -> Tensor:
        """The most likely tokens."""
        return self.fused.propose(self.outputs, self.at, num_draft, Best(None))

    def drawing(self, num_draft: int) -> Callable[[], Tensor]:
        """Drawn tokens."""
        drafter = self.fused
        num, device = self.outputs.shape[0], self.outputs.device
        vocab_size = drafter.module.config.draft_vocab_size
        rows = sampling_rows(
            [TEMPERATURE] * num, [None] * num, [1.0] * num, [0.0] * num, vocab_size, device
        )
        numbering = numbering_of(num, str(device))
        greedy = torch.zeros(num, dtype=torch.bool, device=device)

        def choose(logits: Tensor, number: int) -> Tensor:
            here = replace(numbering, positions_R=numbering.positions_R + number)
            return sample_draft(logits, rows, here, greedy, None).tokens_R

        return lambda: drafter.propose(self.outputs, self.at, num_draft, choose)


def make_modules(shape: str, place: Place) -> tuple[Eagle3, torch.nn.Embedding]:
    """A drafter with random weights, and an embedding, in bfloat16 on a GPU."""
    torch.manual_seed(0)
    config = config_for_target(SHAPES[shape]())
    with torch.device(place.device):
        module = Eagle3(config)
        embed = torch.nn.Embedding(config.target_vocab_size, config.hidden_size)
    for drawn in (module, embed):
        draw_weights(drawn)
        drawn.to(torch.bfloat16 if place.is_gpu else torch.float32).requires_grad_(False)
    return module, embed


def make_case(module: Eagle3, embed: torch.nn.Embedding, num_requests: int) -> Case:
    """Requests with shuffled pages."""
    torch.manual_seed(1)
    weight = embed.weight
    order = torch.randperm(num_requests * _PAGES_EACH, device=weight.device).int() + 1
    first = torch.randint(
        _SHORTEST, _LONGEST + 1, (num_requests,), dtype=torch.int32, device=weight.device
    )
    at = DecodePass(order.view(num_requests, _PAGES_EACH), first, _PAGE, first_key=1)
    outputs = torch.randn(num_requests, weight.shape[1], device=weight.device).to(weight.dtype)
    num_slots = (num_requests * _PAGES_EACH + 1) * _PAGE
    fused, own = (PagedEagle3(module, embed, num_slots) for _ in range(2))
    options = {} if weight.is_cuda else {"few_rows": 16, "use_kernels": True}
    reason = fused.fuse(_PAGES_EACH * _PAGE, **options)
    assert reason is None, reason
    for pool in ("keys", "values"):
        getattr(own, pool).copy_(getattr(fused, pool).normal_())
    return Case(outputs, at, fused, own)


def _off(got: Tensor, want: Tensor) -> float:
    return float((got.double() - want.double()).norm() / want.double().norm())


def logits_of(drafter: PagedEagle3, outputs: Tensor, at: DecodePass, tokens_RK: Tensor) -> Tensor:
    """[K, R, V] logits of a draft whose tokens are given."""
    seen: list[Tensor] = []

    def choose(logits: Tensor, number: int) -> Tensor:
        seen.append(logits)
        return tokens_RK[:, number].contiguous()

    drafter.propose(outputs, at, tokens_RK.shape[1], choose)
    return torch.stack(seen)


def pass_errors(case: Case) -> dict[str, dict[str, float]]:
    """Relative errors of the logits behind passes over given tokens, and of the keys and values
    that they write, against the same weights in float32; of the module's own code, too."""
    num, device = len(case.outputs), case.outputs.device
    module, embed = copy.deepcopy((case.own.module, case.own.embed))
    exact = PagedEagle3(module.float(), embed.float(), len(case.own.keys))
    for name in ("keys", "values"):
        getattr(exact, name).copy_(getattr(case.own, name))
    before = {name: getattr(exact, name).clone() for name in ("keys", "values")}
    tokens = torch.randint(0, embed.num_embeddings, (num, NUM_DRAFT), device=device)
    want = logits_of(exact, case.outputs.float(), case.at, tokens)
    errors: dict[str, dict[str, float]] = {}
    for who, drafter in {"own": case.own, "fused": case.fused}.items():
        errors[who] = {"logits": _off(logits_of(drafter, case.outputs, case.at, tokens), want)}
        for name in ("keys", "values"):
            true = getattr(exact, name)
            written = (true != before[name]).flatten(1).any(dim=1)
            if int(written.sum()) != num * (NUM_DRAFT - 1):
                raise DifferError(f"{name} of {int(written.sum())} rows were written")
            errors[who][name] = _off(getattr(drafter, name)[written], true[written])
    for name, error in errors["fused"].items():
        if not error <= _FURTHER_OFF * errors["own"][name] + _NEARLY:
            raise DifferError(f"further off than rounding explains: {errors}")
    return errors


def times(case: Case, place: Place) -> dict[str, Any]:
    """Microseconds of drafts."""
    found: dict[str, Any] = {}
    for name in ("most likely", "drawn"):
        us = {}
        for num_draft in (NUM_DRAFT, 1):
            work = partial(case.draft, num_draft)
            if name == "drawn":
                work = case.drawing(num_draft)
            us[num_draft] = place.microseconds(work, calls=1)
        found[f"{name}_us"] = us[NUM_DRAFT]
        found[f"{name}, pass_us"] = (us[NUM_DRAFT] - us[1]) / (NUM_DRAFT - 1)
    return found


def lines(shape: str, sizes: tuple[int, ...], place: Place) -> Iterator[dict[str, Any]]:
    """One for each number of requests, while time is left."""
    module, embed = make_modules(shape, place)
    for size in sizes:
        if time.perf_counter() > place.deadline_s:
            print(f"no time left for {size} requests", flush=True)
            return
        case = make_case(module, embed, size)
        yield {"requests": size, "errors": pass_errors(case)} | times(case, place)


def as_rows(shape: str, found: list[dict[str, Any]]) -> list[Row]:
    """One row for each number of requests and way to draft."""
    return [
        Row(
            f"{shape}, {line['requests']} requests, K = {NUM_DRAFT}, {name}",
            "draft, microseconds", line[f"{name}_us"], None, None,
        )
        for line in found
        for name in ("most likely", "drawn")
    ]  # fmt: skip


def main(
    out: Out = RESULTS / "ops_eagle_pass.json",
    device: Device = "cuda",
    shape: str = "SmolLM2-135M",
    requests: str = "1,32,8",
    budget_s: Annotated[float, typer.Option(help="no line starts after this")] = 45.0,
) -> None:
    """Check and time."""
    place = make_place(device, budget_s)
    found: list[dict[str, Any]] = []
    sizes = tuple(int(size) for size in requests.split(","))
    with torch.inference_mode():
        try:
            for line in lines(shape, sizes, place):
                found.append(line)
                print(line, flush=True)
        except DifferError as error:
            print(f"FAILED: {error}", flush=True)
            raise typer.Exit(1) from error
        finally:
            if found:
                write_result(out, {"shape": shape, "draft_k": NUM_DRAFT, "lines": found})
    write_rows(
        "eagle_pass", as_rows(shape, found), "python -m benchmarks.ops.eagle_pass", out.parent
    )


if __name__ == "__main__":
    typer.run(main)
