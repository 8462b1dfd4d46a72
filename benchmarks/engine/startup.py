"""Start-up of a server's engine in its own process, with a cold and with a warm kernel cache.

python -m benchmarks.engine.startup --target FOLDER --run-dir FOLDER   # one start, as JSON
"""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from benchmarks.harness.engines import (
    ONE_GPU,
    build,
    held_bytes,
    making_programs,
    release,
    synchronize,
)
from benchmarks.harness.random_targets import publish_drafters, random_target
from benchmarks.harness.results import Report
from buffer.fingerprint import target_fingerprint
from configs.load import load_settings
from configs.schema import Settings
from serving.build import LoadedTarget, load_target


def measure(report: Report, device: torch.device, shape: str) -> None:
    """Add the ``start`` rows: the first start compiles every kernel, the second finds them cached.
    Both load the target from disk, as a server does."""
    release(device)  # an engine built before
    with tempfile.TemporaryDirectory() as folder:
        target = random_target(shape, device)
        publish_drafters(Path(folder) / "run" / "weights", target)
        _save(target, Path(folder) / "target", Path(folder) / "run")
        del target
        release(device)
        for kernels in ("cold", "warm"):
            what = {"shape": shape, "kernels": kernels, "from_disk": True}
            work = partial(_started, device, Path(folder), report.left_s)
            report.attempt("start", what, 30, work)


def _save(target: LoadedTarget, folder: Path, run_dir: Path) -> None:
    """Save the target as a server loads it, and write its fingerprint into its drafter's bundle."""
    target.model.save_pretrained(folder, max_shard_size="5GB")
    target.tokenizer.save_pretrained(folder)
    manifest = run_dir / "weights" / "0" / "manifest.json"
    text = manifest.read_text().replace(target.fingerprint, target_fingerprint(folder))
    manifest.write_text(text)


def _started(device: torch.device, folder: Path, timeout_s: float) -> dict[str, Any]:
    """One start in a new process; its kernels are cached in ``folder``."""
    command = [sys.executable, "-m", "benchmarks.engine.startup", "--device", str(device)]
    command += ["--target", str(folder / "target"), "--run-dir", str(folder / "run")]
    env = {**os.environ, "TRITON_CACHE_DIR": str(folder / "kernels")}
    started = time.perf_counter()
    done = subprocess.run(
        command, capture_output=True, text=True, env=env, timeout=timeout_s, check=False
    )
    process_s = time.perf_counter() - started
    if done.returncode:
        raise RuntimeError(done.stderr[-2000:])
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return {**found, "process_s": process_s}


class _Seconds(logging.Handler):
    """Collects the seconds that the engine logs for each part of its start-up."""

    def __init__(self) -> None:
        super().__init__(logging.INFO)
        self.said: dict[str, float] = {}

    def emit(self, record: logging.LogRecord) -> None:
        args = record.args
        if record.msg == "%s in %.2f s" and isinstance(args, tuple):
            what, seconds = args
            assert isinstance(what, str) and isinstance(seconds, float)
            self.said[what] = seconds


def start(
    target: Annotated[Path, typer.Option()],
    run_dir: Annotated[Path, typer.Option()],
    device: Annotated[str, typer.Option()] = "cuda",
) -> None:
    """One start with the settings of ``configs/one_gpu.yaml``; prints its times as JSON."""
    on = torch.device(device)
    seconds = _Seconds()
    logging.getLogger("serving").addHandler(seconds)
    logging.getLogger("serving").setLevel(logging.INFO)
    started = time.perf_counter()
    settings = _settings(on, run_dir, target)
    loaded = load_target(settings)
    synchronize(on)
    loaded_s = time.perf_counter() - started
    service, _ = build(settings, loaded)
    synchronize(on)
    found = {
        "load_s": loaded_s,
        "engine_s": time.perf_counter() - started - loaded_s,
        "total_s": time.perf_counter() - started,
        "said_s": seconds.said,
        "making_programs": making_programs(service.engine),
        "max_batch": settings.engine.max_batch,
        "max_draft": settings.drafter.max_draft,
        "held_gib": held_bytes(on) / 2**30,
    }
    print(json.dumps(found), flush=True)


def _settings(device: torch.device, run_dir: Path, target: Path) -> Settings:
    chosen = [f"run_dir={run_dir}", f"device={device}", f"target={target}"]
    if device.type != "cuda":  # sizes for trying it out
        chosen += ["engine.max_batch=2", "engine.max_model_len=256", "engine.prefill_chunk=64"]
    return load_settings([ONE_GPU], chosen, {})


if __name__ == "__main__":
    typer.run(start)
