"""Engines that must give the same answers with and without drafts.

An engine with a drafter has several published versions of it, drafts as
``oracles.engines.RandomPolicy`` decides, and swaps between two steps as a server does.
"""

from __future__ import annotations

import random
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load, save

from benchmarks.harness.engines import build, settings_for
from benchmarks.harness.random_targets import random_target
from buffer.folder_weights import FolderWeights
from buffer.manifest import TENSORS
from configs.schema import Settings
from examples import corpus
from oracles.engines import RandomPolicy
from serving.engine.loop import Engine
from serving.service import Service

SWAP_EVERY = 50
"""Steps between swaps."""
_WAVE = 40
"""Steps between changes of the number of requests in flight."""
_NUM_VERSIONS = 4
_MAX_DRAFT = 5
MAX_BATCH, PLAIN_BATCH = 48, 64


@dataclass(frozen=True, slots=True)
class Run:
    """One target, dtype and numerics."""

    target: str
    """``bundled``, or a key of ``harness.shapes.SHAPES`` with random weights."""
    dtype: str
    numerics: str
    share: float
    """Share of the total number of requests that this run gets."""


RowOf = Callable[[Run, torch.device, int], dict[str, Any]]
"""(run, device, number of requests) -> row of figures."""


def measure_runs(
    part: str,
    runs: Sequence[Run],
    device: torch.device,
    count: int,
    budget_s: float,
    row_of: RowOf,
    keep: Callable[[dict[str, Any]], None],
    text_of: Callable[[dict[str, Any]], str],
) -> None:
    """Measure all runs that start within the budget.

    Args:
        count: total number of requests; each run takes its share.
        keep: called with each row as soon as it is measured.
        text_of: text to print for a row.
    """
    started = time.perf_counter()
    for chosen in runs:
        if time.perf_counter() - started > budget_s:
            print(f"{part}: no time for {chosen}", flush=True)
            continue
        row = row_of(chosen, device, max(2, round(count * chosen.share)))
        keep(row)
        print(
            f"{part}, {time.perf_counter() - started:.0f} s: {chosen.target} {chosen.dtype} "
            f"{chosen.numerics}: {text_of(row)}",
            flush=True,
        )


@cache
def texts(seed: int, of_each: int = 300) -> list[str]:
    """Held-out texts of every domain; prompts are their beginnings."""
    return [t for d in corpus.DOMAINS for t in corpus.prompts(d, of_each, seed=seed)]


@contextmanager
def engine_of(
    chosen: Run, device: torch.device, max_batch: int, folder: Path | None
) -> Iterator[Service]:
    """A service whose engine is not started.

    Args:
        folder: run folder to publish the drafter versions in; ``None``: no drafter.
    """
    target = None
    if chosen.target != "bundled":
        target = random_target(chosen.target, device, getattr(torch, chosen.dtype))
    with tempfile.TemporaryDirectory() as scratch:
        settings = _settings(chosen, device, max_batch, folder, Path(scratch))
        started = time.perf_counter()
        service, policy = build(settings, target)
        print(f"{chosen.target}: engine built in {time.perf_counter() - started:.1f} s", flush=True)
        if folder is not None:
            policy.play(RandomPolicy())
            _publish_versions(folder / "weights")
        yield service


def _settings(
    chosen: Run, device: torch.device, max_batch: int, folder: Path | None, scratch: Path
) -> Settings:
    own = [
        "target=examples/target",
        f"dtype={chosen.dtype}",
        f"engine.numerics={chosen.numerics}",
        f"engine.max_batch={max_batch}",
        "engine.max_queue=100000",
        "engine.max_model_len=512",
        "engine.prefill_chunk=256",
        "capture.enabled=true",
    ]
    if folder is not None:
        own += ["drafter.suffix.enabled=true", f"drafter.max_draft={_MAX_DRAFT}"]
        own += ["drafter.path=examples/drafter/0"] if chosen.target == "bundled" else []
    return settings_for(device, folder or scratch, own, has_drafter=folder is not None)


def _publish_versions(root: Path) -> None:
    """Publish versions 1, 2, ...: noise and version 0 in turn, for both bad and good drafts."""
    store = FolderWeights(root)
    first = store.read(0)
    tensors = load(first.files[TENSORS])
    generator = torch.Generator().manual_seed(11)
    for version in range(1, _NUM_VERSIONS):
        changed = tensors
        if version % 2:
            changed = {name: _noise(tensor, generator) for name, tensor in tensors.items()}
        manifest = replace(first.manifest, version=version, parent=version - 1)
        store.publish(manifest, {TENSORS: save(changed)})


def _noise(tensor: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    if not tensor.is_floating_point():
        return tensor
    return (0.1 * torch.randn(tensor.shape, generator=generator)).to(tensor.dtype)


class Swaps:
    """Orders a swap every ``every`` steps from another thread, as an operator does."""

    def __init__(self, service: Service, every: int) -> None:
        assert service.swapper is not None, "only a drafter that learns is swapped"
        self.num_steps = 0
        self._service, self._swap = service, service.swapper.swap
        self._every = every
        self._number = 0
        self._order: threading.Thread | None = None

    def between(self, _engine: Engine, _step: int) -> None:
        """Called before every engine step."""
        self.num_steps += 1
        is_free = self._order is None or not self._order.is_alive()
        if self.num_steps % self._every == 0 and is_free:
            self._number += 1
            version = self._number % _NUM_VERSIONS
            self._order = threading.Thread(target=self._swap, args=(version,))
            self._order.start()

    def end(self) -> None:
        """Step the engine until the last order is carried out."""
        while self._order is not None and self._order.is_alive():
            with torch.inference_mode():
                self._service.engine.step()
            time.sleep(0.001)


def in_flight(step: int) -> int:
    """Limit on in-flight requests at this step: one, a few, or a full batch."""
    choices = (1, 3, MAX_BATCH // 3, MAX_BATCH, MAX_BATCH)
    return random.Random(step // _WAVE).choice(choices)
