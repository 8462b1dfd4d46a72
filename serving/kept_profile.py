"""The profile of the last start, in the run folder: a server that comes back need not measure it.

A profile holds for the machine, the models and the shapes that it was measured with; with any other
it is measured anew. It only has to be roughly right, since step times are followed while serving.
"""

from __future__ import annotations

import logging
import os
import platform
from collections.abc import Callable
from pathlib import Path

import torch
from pydantic import BaseModel, ConfigDict, FiniteFloat, PositiveFloat, ValidationError

from buffer.files import read_regular, write_atomically
from configs.schema import Settings
from configs.version import package_version
from policies.interface import CostSample
from serving.model_len import model_len

log = logging.getLogger(__name__)

PROFILE_FILE = "step_times.json"
_MOST_BYTES = 1 << 20

Facts = dict[str, str]
"""What step times depend on, by name."""


class _Sample(BaseModel):
    """A ``CostSample``."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    drafter: str
    draft_k: int
    batch: int
    step_s: PositiveFloat
    draft_s: FiniteFloat


class _Stored(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)
    facts: Facts
    samples: list[_Sample]


def facts_of(settings: Settings, fingerprint: str, device: torch.device, drafters: str) -> Facts:
    """What the step times of this server depend on.

    Args:
        fingerprint: the target's.
        drafters: kinds and shapes of the drafters.
    """
    on_gpu = device.type == "cuda"
    engine, draft = settings.engine, settings.drafter
    return {
        "version": package_version(),
        "torch": torch.__version__,
        "device": torch.cuda.get_device_name(device) if on_gpu else _cpu_name(),
        "threads": str(torch.get_num_threads()),
        "target": fingerprint,
        "dtype": settings.dtype,
        "drafters": drafters,
        "max_batch": str(engine.max_batch),
        "max_draft": str(draft.max_draft),
        "max_model_len": str(model_len(settings)),
        "page_size": str(engine.page_size),
        "numerics": engine.numerics,
        "verification": engine.verification,
        "capture": str(settings.capture.enabled),
        "draft_at_start": str(engine.draft_at_start),
    }


def kept_or_measured(
    run_dir: Path, facts: Facts, measure: Callable[[], list[CostSample]]
) -> list[CostSample]:
    """The profile that the run folder holds for these facts, or else a new one, which it keeps.

    A file that is damaged, or that cannot be written, is passed over.
    """
    path = run_dir / PROFILE_FILE
    kept = _read(path, facts)
    if kept is not None:
        log.info("step times are those of %s", path)
        return kept
    samples = measure()
    stored = _Stored(facts=facts, samples=[_Sample(**_fields(sample)) for sample in samples])
    try:
        write_atomically(path, stored.model_dump_json(indent=1).encode())
    except OSError as error:
        log.warning("step times cannot be kept in %s (%s); the next start measures", path, error)
    return samples


def _read(path: Path, facts: Facts) -> list[CostSample] | None:
    """The samples of a file that was written for these facts; ``None`` if there are none."""
    try:
        stored = _Stored.model_validate_json(read_regular(path, _MOST_BYTES, follow=True))
    except FileNotFoundError:
        return None
    except (OSError, ValidationError) as error:
        log.warning("step times in %s cannot be read (%s); measuring", path, _first_line(error))
        return None
    if stored.facts != facts or not stored.samples:
        return None
    return [CostSample(**sample.model_dump()) for sample in stored.samples]


def _fields(sample: CostSample) -> dict[str, str | int | float]:
    return {name: getattr(sample, name) for name in _Sample.model_fields}


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0]


def _cpu_name() -> str:
    """The processor's name and number of cores, as far as the system tells."""
    name = platform.processor() or platform.machine()
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{names[0] if names else name}, {os.cpu_count()} cores"
