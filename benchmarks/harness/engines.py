"""Every engine that a benchmark measures, built as the server builds it.

Only ``build`` calls ``serving.build``. The arms of a benchmark share an engine and differ in the
policy that its ``PolicySwitch`` plays, or each has its own engine. Anything that a benchmark reads
from an engine beyond its inbox, ``step`` and ``figures`` has a function at the end of this file.
"""

from __future__ import annotations

import gc
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.harness.arms import LEARNED
from benchmarks.harness.policy import PolicySwitch
from benchmarks.harness.random_targets import publish_drafters, random_target
from configs.load import load_settings
from configs.schema import Settings
from drafters.suffix import compiled
from policies.interface import DraftPolicy
from serving.build import LoadedTarget, build_service
from serving.engine.loop import Engine
from serving.engine.pages import page_names, page_root
from serving.requests import Request, SamplingParams
from serving.service import Service

NO_DRAFTER = ("drafter.kind=none", "drafter.max_draft=0")
DEMO, ONE_GPU = Path("configs/demo.yaml"), Path("configs/one_gpu.yaml")


# Building


@dataclass(frozen=True, slots=True)
class Built:
    """One engine and what it was built from."""

    service: Service
    policy: PolicySwitch
    device: torch.device
    config: Any = None
    """Hugging Face config; only for targets with random weights."""
    model: Any = None
    drafter_bytes: int = 0
    """Bytes of the neural drafter's weights on the device; 0 without one."""

    @property
    def engine(self) -> Engine:
        return self.service.engine


def build(settings: Settings, loaded: LoadedTarget | None = None) -> tuple[Service, PolicySwitch]:
    """A service that is not yet started, and the ``PolicySwitch`` its engine plans with. The
    compiled search of matches is there."""
    compiled.wait()
    switches: list[PolicySwitch] = []

    def wrap(own: DraftPolicy) -> PolicySwitch:
        switches.append(PolicySwitch(own))
        return switches[0]

    service = build_service(settings, loaded, wrap)
    return service, switches[0]


@contextmanager
def engine_from(config: Path, chosen: Sequence[str], device: str | None = None) -> Iterator[Built]:
    """An engine from a settings file, with its own run folder, stopped at the end.

    Args:
        chosen: ``key=value`` overrides, as after ``--set``.
        device: ``None``: as in the file.
    """
    with tempfile.TemporaryDirectory() as folder:
        where = [] if device is None else [f"device={device}"]
        # Each K is measured from the first step on.
        own = [f"run_dir={folder}", "engine.draft_at_start=null"]
        settings = load_settings([config], [*own, *where, *chosen], {})
        built = Built(*build(settings), torch.device(settings.device))
        try:
            yield built
        finally:
            built.engine.stop()


@contextmanager
def engine_of(
    shape: str,
    device: torch.device,
    chosen: Sequence[str],
    num_versions: int = 0,
    *,
    is_predictable: bool = False,
) -> Iterator[Built]:
    """An engine over a target with random weights, with its own run folder.

    Args:
        shape: a key of ``shapes.SHAPES``.
        chosen: ``key=value`` settings, as after ``--set``.
        num_versions: drafter versions to publish beforehand; 0: no drafter.
        is_predictable: force acceptance (``predictable.py``).
    """
    release(device)  # free the memory of an earlier engine
    with tempfile.TemporaryDirectory() as folder:
        target = random_target(shape, device, is_predictable=is_predictable)
        drafter_bytes = 0
        if num_versions:
            root = Path(folder) / "weights"
            drafter_bytes = publish_drafters(
                root, target, num_versions, is_predictable=is_predictable
            )
        settings = settings_for(device, Path(folder), chosen, has_drafter=bool(num_versions))
        started = time.perf_counter()
        service, policy = build(settings, target)
        print(f"{shape}: engine built in {time.perf_counter() - started:.1f} s", flush=True)
        yield Built(service, policy, device, target.model.config, target.model, drafter_bytes)


def settings_for(
    device: torch.device, folder: Path, chosen: Sequence[str], has_drafter: bool
) -> Settings:
    """Settings shared by engines over random targets, overridden by ``chosen``."""
    drafter = [f"drafter.kind={LEARNED}"] if has_drafter else list(NO_DRAFTER)
    common = [
        f"run_dir={folder}",
        f"device={device}",
        "engine.max_queue=4096",
        "engine.prefill_chunk=4096",
        "drafter.init=random",  # the target is in memory alone
        "drafter.suffix.enabled=false",
        "policy.kind=fixed",
        "policy.draft_k=0",
        "capture.enabled=false",
        "swap.enabled=false",
    ]
    return load_settings([], [*common, *drafter, *chosen], {})


# Devices


def synchronize(device: torch.device) -> None:
    """Wait until the device is done."""
    if device.type == "cuda":
        torch.cuda.synchronize()


def held_bytes(device: torch.device) -> int:
    """Bytes of the tensors on a GPU, including those of CUDA graphs; 0 on a CPU."""
    return torch.cuda.memory_allocated() if device.type == "cuda" else 0


def release(device: torch.device) -> None:
    """Free the memory of engines that are no longer referenced."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


# What benchmarks read from an engine


def declare_computed(engine: Engine, prompts: Sequence[tuple[int, ...]]) -> None:
    """Enter all but the last token of each prompt into the prefix cache without computing it.

    Gives each request a long context immediately, in its own pages, whose keys and values are
    whatever the pool holds.
    """
    scheduler = engine.scheduler
    for prompt in prompts:
        root = page_root(Request("", prompt, SamplingParams()).namespace)
        names = page_names(prompt[:-1], scheduler.page_size, root)
        pages = scheduler.pool.take(len(names))
        for page, name in zip(pages, names, strict=True):
            scheduler.pool.name(page, name)
        scheduler.pool.release(pages)


def fill_pool(engine: Engine) -> None:
    """Fill the KV pool with random keys and values."""
    pool = engine.programs.pool
    for tensor in (*pool.keys, *pool.values):
        tensor.normal_()


def num_positions_held(engine: Engine) -> int:
    """Number of positions that the KV pool can hold."""
    return engine.scheduler.pool.num_usable * engine.scheduler.page_size


def holds(engine: Engine, batch: int, num_prompt: int, max_tokens: int) -> bool:
    """True if the KV pool can hold ``batch`` such requests at once."""
    pages = engine.scheduler.num_pages_for(num_prompt, max_tokens)
    return batch * pages <= engine.scheduler.pool.num_usable


def round_seconds(engine: Engine, batch: int, drafter: str, draft_k: int) -> float:
    """Time of one greedy round's program alone, including its launch; nothing may be in flight.

    Args:
        drafter: a drafter kind; a host drafter's tokens are uploaded, so drafting is not timed.
    """
    neural = drafter if drafter in engine.drafting.neural else None
    return engine.programs.rounds.device_seconds(batch, draft_k, neural)


def making_programs(engine: Engine) -> dict[str, Any]:
    """Number of programs, and the seconds spent on kernels, first runs, captures and timings; empty
    on a CPU."""
    captures = engine.programs.graphs.captures
    return {} if captures is None else asdict(captures.spent)
