"""EAGLE-3's drafts with neighbours joined to products, and without: how far they differ, and how
long they take.

    python -m benchmarks.ops.eagle_pass                  # SmolLM2-135M on one GPU; about 50 s
    TRITON_INTERPRET=1 python -m benchmarks.ops.eagle_pass --device cpu --shape tiny \\
        --out /tmp/eagle_pass.json                       # a trial

Random weights in bfloat16, the target's whole vocabulary, contexts of 50 to 600 tokens in tables
for 1,024. A line is a number of requests and a variant of ``VARIANTS``:

- *checks*: the logits of passes over given tokens, and the keys and values that they write, against
  the same weights in float32; the share of greedy draft tokens that equal those of ``separate``.
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

from benchmarks.harness.results import RESULTS, Out, Row, at_most, write_result, write_rows
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
VARIANTS: dict[str, dict[str, Any]] = {
    "separate": {"joins": False},
    "joined": {"joins": True},
    "joined, library above 16 rows": {"joins": True, "few_rows": 16},
    "separate, few rows up to 64": {"joins": False, "few_rows": 64},
}
"""Options of ``FusedEagle3``. The first is compared with; the last two differ from the others only
above 16 rows."""
_ABOVE_16 = 2
_PAGE, _PAGES_EACH = 16, 64
_SHORTEST, _LONGEST = 50, 600
_DRAFTS = 10
"""Random drafts whose tokens are compared."""
_FURTHER_OFF = 1.5
"""Logits, keys and values may be this many times as far from float32 as those of ``separate``."""
_NEARLY = 1e-5
"""And this much further, relative."""
_LARGEST_GAP = 0.05
"""Share of the largest logit by which that of an unequal token may be below it."""


class DifferError(Exception):
    """A variant does not compute what it should."""


@dataclass(frozen=True, slots=True)
class Case:
    """R requests, and a drafter for each variant, with equal pools."""

    outputs: Tensor
    at: DecodePass
    drafters: dict[str, PagedEagle3]

    def draft(self, name: str, num_draft: int = NUM_DRAFT) -> Tensor:
        """The most likely tokens."""
        return self.drafters[name].propose(self.outputs, self.at, num_draft, Best(None))

    def drawing(self, name: str, num_draft: int) -> Callable[[], Tensor]:
        """Drawn tokens."""
        drafter = self.drafters[name]
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


def make_case(
    module: Eagle3, embed: torch.nn.Embedding, num_requests: int, names: list[str]
) -> Case:
    """Requests with shuffled pages."""
    torch.manual_seed(1)
    weight = embed.weight
    order = torch.randperm(num_requests * _PAGES_EACH, device=weight.device).int() + 1
    first = torch.randint(
        _SHORTEST, _LONGEST + 1, (num_requests,), dtype=torch.int32, device=weight.device
    )
    at = DecodePass(order.view(num_requests, _PAGES_EACH), first, _PAGE, first_key=1)
    outputs = torch.randn(num_requests, weight.shape[1], device=weight.device).to(weight.dtype)
    drafters: dict[str, PagedEagle3] = {}
    for name in names:
        drafter = PagedEagle3(module, embed, (num_requests * _PAGES_EACH + 1) * _PAGE)
        options = {"few_rows": 16, **VARIANTS[name]} if not weight.is_cuda else VARIANTS[name]
        use_kernels = None if weight.is_cuda else True
        reason = drafter.fuse(_PAGES_EACH * _PAGE, use_kernels=use_kernels, **options)
        assert reason is None, reason
        drafters[name] = drafter
    like = drafters[names[0]]
    for pool in ("keys", "values"):
        drawn = getattr(like, pool).normal_()
        for drafter in drafters.values():
            getattr(drafter, pool).copy_(drawn)
    return Case(outputs, at, drafters)


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
    """By variant: relative errors of the logits behind passes over given tokens, and of the keys
    and values that they write, against the same weights in float32."""
    num, device = len(case.outputs), case.outputs.device
    like = case.drafters["separate"]
    module, embed = copy.deepcopy((like.module, like.embed))
    exact = PagedEagle3(module.float(), embed.float(), len(like.keys))
    for name in ("keys", "values"):
        getattr(exact, name).copy_(getattr(like, name))
    before = {name: getattr(exact, name).clone() for name in ("keys", "values")}
    tokens = torch.randint(0, embed.num_embeddings, (num, NUM_DRAFT), device=device)
    want = logits_of(exact, case.outputs.float(), case.at, tokens)
    errors: dict[str, dict[str, float]] = {}
    for variant, drafter in case.drafters.items():
        got = logits_of(drafter, case.outputs, case.at, tokens)
        errors[variant] = {"logits": _off(got, want)}
        for name in ("keys", "values"):
            true = getattr(exact, name)
            written = (true != before[name]).flatten(1).any(dim=1)
            if int(written.sum()) != num * (NUM_DRAFT - 1):
                raise DifferError(f"{name} of {int(written.sum())} rows were written")
            errors[variant][name] = _off(getattr(drafter, name)[written], true[written])
    for variant, found in errors.items():
        for name, error in found.items():
            if not error <= _FURTHER_OFF * errors["separate"][name] + _NEARLY:
                raise DifferError(f"{variant} is further off than rounding explains: {errors}")
    return errors


def token_errors(case: Case, variant: str, num_drafts: int) -> dict[str, float]:
    """The share of greedy draft tokens that are equal, and by how much the logit of a first one
    that is not was below the largest, as a share of that."""
    equal, total, worst = 0, 0, 0.0
    for _ in range(num_drafts):
        case.outputs.normal_()
        got, want = case.draft(variant), case.draft("separate")
        logits_KRV = logits_of(case.drafters["separate"], case.outputs, case.at, want)
        same = got == want
        equal, total = equal + int(same.sum()), total + want.numel()
        for row in (~same.all(dim=1)).nonzero().flatten().tolist():
            place = int((~same[row]).int().argmax())
            logits = logits_KRV[place, row].float()
            top, other = logits[want[row, place]], logits[got[row, place]]
            worst = max(worst, float((top - other) / top.abs()))
    found = {"equal_tokens": equal / total, "largest_gap_of_unequal": worst}
    if worst > _LARGEST_GAP:
        raise DifferError(f"tokens of {variant} differ that are no near ties: {found}")
    return found


def times(case: Case, variant: str, place: Place) -> dict[str, Any]:
    """Microseconds of drafts."""
    found: dict[str, Any] = {}
    for name in ("most likely", "drawn"):
        us = {}
        for num_draft in (NUM_DRAFT, 1):
            work = partial(case.draft, variant, num_draft)
            if name == "drawn":
                work = case.drawing(variant, num_draft)
            us[num_draft] = place.microseconds(work, calls=1)
        found[f"{name}_us"] = us[NUM_DRAFT]
        found[f"{name}, pass_us"] = (us[NUM_DRAFT] - us[1]) / (NUM_DRAFT - 1)
    return found


def lines(shape: str, sizes: tuple[int, ...], place: Place) -> Iterator[dict[str, Any]]:
    """One for each number of requests and variant, while time is left."""
    module, embed = make_modules(shape, place)
    for size in sizes:
        names = list(VARIANTS) if size > 16 else list(VARIANTS)[:_ABOVE_16]
        case = make_case(module, embed, size, names)
        errors = pass_errors(case)
        for name in names:
            if time.perf_counter() > place.deadline_s:
                print(f"no time left for {size} requests, {name}", flush=True)
                return
            line: dict[str, Any] = {"requests": size, "variant": name, "errors": errors[name]}
            if name != "separate":
                line |= token_errors(case, name, _DRAFTS if place.is_gpu else 2)
            yield line | times(case, name, place)


def as_rows(shape: str, found: list[dict[str, Any]]) -> list[Row]:
    """One row for each number of requests, variant and way to draft."""
    rows = []
    before = {line["requests"]: line for line in found if line["variant"] == "separate"}
    for line in found:
        for name in ("most likely", "drawn"):
            what = f"{shape}, {line['requests']} requests, K = {NUM_DRAFT}, {name}"
            measure, us = f"draft, microseconds, {line['variant']}", line[f"{name}_us"]
            if line["variant"] == "joined":
                rows.append(at_most(what, measure, us, before[line["requests"]][f"{name}_us"]))
            else:
                rows.append(Row(what, measure, us, None, None))
    return rows


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
