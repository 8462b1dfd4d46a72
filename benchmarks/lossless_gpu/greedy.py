"""Greedy requests get the same bytes with drafts as without, by the real engine and its programs.

Drafts of any length by any drafter, a new choice every step; batches that grow and shrink; prompts
of mixed lengths, cached prefixes; drafter weights swapped every 50 steps by the server's own
swapper. The plain answers come from an engine without a drafter, in batches of another size.

``engine.numerics: pinned`` is the switch under which no byte may differ. By ``fast`` numerics a
pass rounds as its shape makes it, and where two tokens tie within that rounding, the choice may
differ: there plain answers in both batch sizes are compared as well, and what differs is measured
against the rounding (``benchmarks/lossless.py``).
"""

from __future__ import annotations

import random
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load, save

from benchmarks.engine.engines import Place, random_target, release
from benchmarks.lossless_rows import compared, greedy_requests, random_prompts
from buffer.weights import TENSORS, publish, read_bundle
from configs.schema import Settings
from examples import corpus
from serving.build import LoadedTarget, build_engine
from serving.engine import Engine
from serving.service import Service
from tests.engines import RandomPolicy, run

SWAP_EVERY = 50
"""Steps."""
_WAVE = 40
"""Steps after which another number of requests may be in flight."""
_NUM_VERSIONS = 4
_MAX_DRAFT = 5
_TEXTS = 300
"""Of each domain; prompts are their beginnings."""
_MAX_BATCH, _PLAIN_BATCH = 48, 64


@dataclass(frozen=True, slots=True)
class Run:
    """One target, computed in one way."""

    target: str
    """``bundled``, or a shape of ``benchmarks.engine`` with random weights."""
    dtype: str
    numerics: str
    share: float
    """Of the number of prompts that was asked for."""


RUNS = (
    Run("bundled", "float32", "pinned", 0.75),
    Run("tiny", "float32", "pinned", 0.25),
    Run("bundled", "bfloat16", "pinned", 0.25),
    Run("bundled", "float32", "fast", 0.25),
    Run("bundled", "bfloat16", "fast", 0.25),
)
"""The first two decode all the prompts that were asked for between them."""
RUNS_ON_CPU = (Run("bundled", "float32", "fast", 0.75), Run("tiny", "float32", "fast", 0.25))
"""Numerics can be pinned on a GPU only."""


def planned(device: torch.device) -> tuple[Run, ...]:
    """The runs of a device."""
    return RUNS if Place(device).is_gpu else RUNS_ON_CPU


def measure(
    device: torch.device, num_prompts: int, budget_s: float, keep: Callable[[dict[str, Any]], None]
) -> None:
    """All runs that fit the budget.

    Args:
        keep: takes each row as soon as it is there.
    """
    started = time.perf_counter()
    place = Place(device)
    for chosen in planned(device):
        if time.perf_counter() - started > budget_s:
            print(f"greedy: no time for {chosen}", flush=True)
            continue
        row = _row(chosen, place, max(2, round(num_prompts * chosen.share)))
        keep(row)
        print(
            f"greedy, {time.perf_counter() - started:.0f} s: {chosen.target} {chosen.dtype} "
            f"{chosen.numerics}: {row['mismatches']} of {row['prompts']} differ, plain against "
            f"plain {row['plain_against_plain']}",
            flush=True,
        )


def _row(chosen: Run, place: Place, count: int) -> dict[str, Any]:
    started = time.perf_counter()
    numbers = random.Random(7)
    with _engine(chosen, place, _PLAIN_BATCH, None) as service:
        prompts = _prompts(chosen, service, numbers, count)
        lengths = [numbers.randint(8, 32) for _ in prompts]
        plain = list(greedy_requests(prompts, lengths, num_top=2, max_draft=0))
        wanted = run(service.engine, plain)
    release(place)
    with (
        tempfile.TemporaryDirectory() as folder,
        _engine(chosen, place, _MAX_BATCH, Path(folder)) as service,
    ):
        again = run(service.engine, plain)
        swaps = _Swaps(service)
        drafted = list(greedy_requests(prompts, lengths))
        got = run(service.engine, drafted, swaps.between, _in_flight)
        swaps.end()
        row = compared(chosen.target, _MAX_BATCH, prompts, wanted, again, got, service.engine)
        more = {
            "dtype": chosen.dtype,
            "numerics": chosen.numerics,
            "swaps": service.figures().swaps["swapped"],
            "steps": swaps.num_steps,
            "texts_that_differ": sum(wanted[name].text != got[name].text for name in wanted),
            "seconds": time.perf_counter() - started,
        }
    release(place)
    return {**row, **more}


@contextmanager
def _engine(chosen: Run, place: Place, max_batch: int, folder: Path | None) -> Iterator[Service]:
    """With a drafter, its versions published, if it has a folder to keep them in."""
    target = None if chosen.target == "bundled" else _random_target(chosen, place)
    with tempfile.TemporaryDirectory() as scratch:
        settings = _settings(chosen, place, max_batch, folder, Path(scratch))
        started = time.perf_counter()
        service = build_engine(settings, target)
        print(f"greedy: engine built in {time.perf_counter() - started:.1f} s", flush=True)
        if folder is not None:
            service.engine.policy = RandomPolicy()
            service.engine.on_finished = None  # nobody learns here
            _publish_versions(folder / "weights")
        yield service


def _random_target(chosen: Run, place: Place) -> LoadedTarget:
    loaded = random_target(chosen.target, place)
    return replace(loaded, model=loaded.model.to(getattr(torch, chosen.dtype)))


def _settings(
    chosen: Run, place: Place, max_batch: int, folder: Path | None, scratch: Path
) -> Settings:
    drafter: dict[str, Any] = {"kind": "none", "max_draft": 0}
    if folder is not None:
        drafter = {"kind": "eagle3", "max_draft": _MAX_DRAFT}
        if chosen.target == "bundled":
            drafter["path"] = Path("examples/drafter/0")
    return Settings.model_validate(
        {
            "target": "examples/target",
            "device": str(place.device),
            "dtype": chosen.dtype,
            "run_dir": folder or scratch,
            "engine": {
                "programs": "always",
                "numerics": chosen.numerics,
                "max_batch": max_batch,
                "max_queue": 100_000,
                "max_model_len": 512,
            },
            "drafter": drafter,
            "policy": {"kind": "fixed"},
            "swap": {"enabled": False},
        }
    )


def _prompts(chosen: Run, service: Service, numbers: random.Random, count: int) -> list[list[int]]:
    if chosen.target != "bundled":
        return random_prompts(numbers, count, service.vocab_size)
    texts = [t for d in corpus.DOMAINS for t in corpus.prompts(d, _TEXTS, seed=3)]
    encoded = [service.tokenizer(t, add_special_tokens=False)["input_ids"] for t in texts]
    return [ids[: numbers.randint(1, 200)] for ids in numbers.choices(encoded, k=count)]


def _publish_versions(root: Path) -> None:
    """Versions 1, 2, ...: noise and version 0 in turn, so that drafts are good and bad."""
    first = read_bundle(root / "0")
    tensors = load(first.files[TENSORS])
    generator = torch.Generator().manual_seed(11)
    for version in range(1, _NUM_VERSIONS):
        changed = tensors
        if version % 2:
            changed = {name: _noise(tensor, generator) for name, tensor in tensors.items()}
        manifest = replace(first.manifest, version=version, parent=version - 1)
        publish(root, manifest, {TENSORS: save(changed)})


def _noise(tensor: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    if not tensor.is_floating_point():
        return tensor
    return (0.1 * torch.randn(tensor.shape, generator=generator)).to(tensor.dtype)


class _Swaps:
    """Orders a swap every 50 steps, as an operator does: from a thread of its own."""

    def __init__(self, service: Service) -> None:
        self.num_steps = 0
        self._service = service
        self._number = 0
        self._order: threading.Thread | None = None

    def between(self, _engine: Engine, step: int) -> None:
        """Before every step of the engine."""
        self.num_steps = step + 1
        is_free = self._order is None or not self._order.is_alive()
        if (step + 1) % SWAP_EVERY == 0 and is_free:
            self._number += 1
            version = self._number % _NUM_VERSIONS
            self._order = threading.Thread(target=self._service.swap, args=(version,))
            self._order.start()

    def end(self) -> None:
        """Let the engine take the last order."""
        while self._order is not None and self._order.is_alive():
            with torch.inference_mode():
                self._service.engine.step()
            time.sleep(0.001)


def _in_flight(step: int) -> int:
    """One request, a few, or a full batch."""
    choices = (1, 3, _MAX_BATCH // 3, _MAX_BATCH, _MAX_BATCH)
    return random.Random(step // _WAVE).choice(choices)


def is_complete(rows: list[dict[str, Any]], device: torch.device) -> bool:
    """Every planned run is there."""
    return len(rows) == len(planned(device))


def is_sound(rows: list[dict[str, Any]]) -> bool:
    """By pinned numerics nothing differs, true of no rows too; what fast ones do is told and not
    judged."""
    pinned = [row for row in rows if row["numerics"] == "pinned"]
    differences = ("mismatches", "plain_against_plain", "texts_that_differ", "rounding")
    return not any(row[name] for row in pinned for name in differences)


def summary(rows: list[dict[str, Any]], device: torch.device) -> dict[str, Any]:
    """Totals by numerics; prompts that are distinct are so within a run."""
    counted = (
        "prompts", "distinct_prompts", "tokens", "swaps", "drafted_tokens", "accepted_tokens",
        "plain_against_plain", "mismatches", "mismatches_beyond_ties", "texts_that_differ",
        "seconds",
    )  # fmt: skip
    kinds = sorted({row["numerics"] for row in rows}, reverse=True)
    return {
        kind: {name: sum(row[name] for row in rows if row["numerics"] == kind) for name in counted}
        for kind in kinds
    } | {"switch": "engine.numerics: pinned", "complete": is_complete(rows, device)}
