"""EAGLE-3's drafts in one launch beside those of many launches: how far they differ, and how long
they take.

    python -m benchmarks.ops.eagle_pass                  # SmolLM2-135M on one GPU; about 40 s
    TRITON_INTERPRET=1 python -m benchmarks.ops.eagle_pass --device cpu --shape tiny \\
        --out /tmp/eagle_pass.json                       # a trial

Random weights in bfloat16, the target's whole vocabulary, contexts of 50 to 600 tokens. A line is a
number of requests:

- *checks*: the logits of passes over given tokens, against the present launches and against the
  same weights in float32; the share of greedy draft tokens that are equal, over several random
  drafts; then the same draft again and again, which must give the same tokens, also beside products
  on a second stream that take some of the multiprocessors for a while.
- *times*: a draft of four tokens, most likely ones and drawn ones, each in a CUDA graph with a cold
  cache. ``pass``: the time of four minus that of one, divided by three.

Programs of one launch wait for each other. They give up after a second or so, and then this ends at
once with exit code 1, as it does if results differ by more than rounding.

Writes ``ops_eagle_pass.json`` and ``rows/eagle_pass.json`` in ``benchmarks/results``.
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
_PAGE, _PAGES_EACH = 16, 40
_SHORTEST, _LONGEST = 50, 600
_REPEATS = 300
_DRAFTS = 20
"""Random drafts whose tokens are compared."""
_FURTHER_OFF = 1.5
"""Logits, keys and values may be this many times as far from float32 as those of the present
launches."""
_NEARLY = 1e-5
"""And this much further, relative."""
_LARGEST_GAP = 0.05
"""Share of the largest logit by which that of an unequal token may be below it."""


class DifferError(Exception):
    """One launch does not compute what it should."""


@dataclass(frozen=True, slots=True)
class Case:
    """R requests, and two drafters over equal pools."""

    outputs: Tensor
    at: DecodePass
    present: PagedEagle3
    chain: PagedEagle3

    def draft(self, drafter: PagedEagle3, num_draft: int = NUM_DRAFT) -> Tensor:
        """The most likely tokens."""
        return drafter.propose(self.outputs, self.at, num_draft, Best(None))

    def drawing(self, drafter: PagedEagle3, num_draft: int) -> Callable[[], Tensor]:
        """Drawn tokens."""
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
    module: Eagle3, embed: torch.nn.Embedding, num_requests: int, cooperative: bool
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
    drafters = []
    for one_launch in (False, True):
        num_slots = (num_requests * _PAGES_EACH + 1) * _PAGE
        drafter = PagedEagle3(module, embed, num_slots, one_launch=one_launch)
        use_kernels = None if weight.is_cuda else one_launch
        reason = drafter.fuse(_PAGES_EACH * _PAGE, use_kernels=use_kernels)
        assert reason is None, reason
        drafters.append(drafter)
    for name in ("keys", "values"):
        pool = getattr(drafters[0], name).normal_()
        getattr(drafters[1], name).copy_(pool)
    chain = drafters[1].chain
    assert chain is not None and chain.meeting is not None
    chain.meeting = replace(chain.meeting, cooperative=cooperative)
    return Case(outputs, at, *drafters)


def must_not_give_up(case: Case) -> None:
    """End if programs have stopped waiting for each other."""
    assert case.chain.chain is not None and case.chain.chain.meeting is not None
    if case.chain.chain.meeting.gave_up():
        raise DifferError("programs of a launch stopped waiting for each other")


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


def pass_errors(case: Case) -> dict[str, float]:
    """Relative errors of the logits behind three passes over given tokens, each in one launch, and
    of the keys and values that they write."""
    num, device = len(case.outputs), case.outputs.device
    module, embed = copy.deepcopy((case.present.module, case.present.embed))
    exact = PagedEagle3(module.float(), embed.float(), len(case.present.keys))
    pools = [
        torch.stack([pool.float() for pool in (drafter.keys, drafter.values)])
        for drafter in (case.present, case.chain)
    ]
    for mine, pool in zip((exact.keys, exact.values), pools[0], strict=True):
        mine.copy_(pool)
    tokens = torch.randint(0, embed.num_embeddings, (num, NUM_DRAFT), device=device)
    want = logits_of(exact, case.outputs.float(), case.at, tokens)[1:]
    present = logits_of(case.present, case.outputs, case.at, tokens)[1:]
    got = logits_of(case.chain, case.outputs, case.at, tokens)[1:]
    must_not_give_up(case)
    found = {
        "present_from_float32": _off(present, want),
        "one_launch_from_float32": _off(got, want),
        "one_launch_from_present": _off(got, present),
    }
    for name in ("keys", "values"):
        true, before, ours = (getattr(d, name) for d in (exact, case.present, case.chain))
        written = (true != before.float()) | (true != ours.float())
        if not written.any():
            raise DifferError(f"no {name} were written")
        found[f"{name}, present_from_float32"] = _off(before[written], true[written])
        found[f"{name}, one_launch_from_float32"] = _off(ours[written], true[written])
    for name in ("", "keys, ", "values, "):
        bound = _FURTHER_OFF * found[f"{name}present_from_float32"] + _NEARLY
        if not found[f"{name}one_launch_from_float32"] <= bound:
            raise DifferError(f"one launch is further off than rounding explains: {found}")
    return found


def token_errors(case: Case, num_drafts: int) -> dict[str, float]:
    """The share of greedy draft tokens that are equal, and by how much the logit of a first one
    that is not was below the largest, as a share of that."""
    equal, total, worst = 0, 0, 0.0
    for _ in range(num_drafts):
        case.outputs.normal_()
        got, want = case.draft(case.chain), case.draft(case.present)
        logits_KRV = logits_of(case.present, case.outputs, case.at, want)
        same = got == want
        equal, total = equal + int(same.sum()), total + want.numel()
        for row in (~same.all(dim=1)).nonzero().flatten().tolist():
            place = int((~same[row]).int().argmax())
            logits = logits_KRV[place, row].float()
            top, other = logits[want[row, place]], logits[got[row, place]]
            worst = max(worst, float((top - other) / top.abs()))
    must_not_give_up(case)
    found = {"equal_tokens": equal / total, "largest_gap_of_unequal": worst}
    if worst > _LARGEST_GAP:
        raise DifferError(f"tokens differ that are no near ties: {found}")
    return found


def repeats(case: Case, num_repeats: int, meanwhile: Callable[[], object] | None) -> int:
    """How many of several equal drafts differ from the first; the device is also given
    ``meanwhile`` on another stream."""
    first = case.draft(case.chain).clone()
    must_not_give_up(case)
    differ = torch.zeros((), dtype=torch.int64, device=first.device)
    side = torch.cuda.Stream() if meanwhile is not None else None
    for _ in range(num_repeats):
        if meanwhile is not None and side is not None:
            with torch.cuda.stream(side):
                meanwhile()
        differ += (case.draft(case.chain) != first).any()
    must_not_give_up(case)
    return int(differ)


def checks(case: Case, place: Place) -> dict[str, Any]:
    """How far results differ."""
    found: dict[str, Any] = pass_errors(case)
    found |= token_errors(case, _DRAFTS if place.is_gpu else 2)
    num_repeats = _REPEATS if place.is_gpu else 2
    found["repeats_that_differ"] = repeats(case, num_repeats, None)
    if place.is_gpu:
        load = torch.randn(1024, 1024, device=place.device)
        found["repeats_that_differ_beside_others"] = repeats(case, num_repeats, lambda: load @ load)
    if any(found[name] for name in found if name.startswith("repeats")):
        raise DifferError(f"equal drafts differ: {found}")
    return found


def times(case: Case, place: Place) -> dict[str, Any]:
    """Microseconds of drafts."""
    found: dict[str, Any] = {}
    for name in ("most likely", "drawn"):
        for way, drafter in (("present", case.present), ("one_launch", case.chain)):
            us = {}
            for num_draft in (NUM_DRAFT, 1):
                work = partial(case.draft, drafter, num_draft)
                if name == "drawn":
                    work = case.drawing(drafter, num_draft)
                us[num_draft] = place.microseconds(work, calls=1)
            found[f"{name}, {way}_us"] = us[NUM_DRAFT]
            found[f"{name}, {way}, pass_us"] = (us[NUM_DRAFT] - us[1]) / (NUM_DRAFT - 1)
            must_not_give_up(case)
    return found


def lines(
    shape: str, sizes: tuple[int, ...], place: Place, cooperative: bool
) -> Iterator[dict[str, Any]]:
    """One for each number of requests, while time is left."""
    module, embed = make_modules(shape, place)
    for size in sizes:
        if time.perf_counter() > place.deadline_s:
            print(f"no time left for {size} requests", flush=True)
            return
        case = make_case(module, embed, size, cooperative)
        yield {"requests": size, **checks(case, place), **times(case, place)}


def as_rows(shape: str, found: list[dict[str, Any]]) -> list[Row]:
    """One row for each way to draft."""
    rows = []
    for line in found:
        for name in ("most likely", "drawn"):
            what = f"{shape}, {line['requests']} requests, K = {NUM_DRAFT}, {name}"
            before, now = line[f"{name}, present_us"], line[f"{name}, one_launch_us"]
            rows.append(Row(what, "draft, microseconds, present launches", before, None, None))
            rows.append(at_most(what, "draft, microseconds, one launch a pass", now, before / 2))
    return rows


def main(
    out: Out = RESULTS / "ops_eagle_pass.json",
    device: Device = "cuda",
    shape: str = "SmolLM2-135M",
    requests: str = "32,1,8",
    cooperative: Annotated[bool, typer.Option(help="start all programs at once")] = True,
    budget_s: Annotated[float, typer.Option(help="no line starts after this")] = 25.0,
) -> None:
    """Check and time."""
    place = make_place(device, budget_s)
    found: list[dict[str, Any]] = []
    sizes = tuple(int(size) for size in requests.split(","))
    with torch.inference_mode():
        try:
            for line in lines(shape, sizes, place, cooperative):
                found.append(line)
                print(line, flush=True)
        except DifferError as error:
            print(f"FAILED: {error}", flush=True)
            raise typer.Exit(1) from error
        finally:
            if found:
                result = {"shape": shape, "draft_k": NUM_DRAFT, "lines": found}
                write_result(out, result)
    write_rows(
        "eagle_pass", as_rows(shape, found), "python -m benchmarks.ops.eagle_pass", out.parent
    )


if __name__ == "__main__":
    typer.run(main)
