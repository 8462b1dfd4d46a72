"""Start-up of a server's engine in a process of its own, with a cold and with a warm kernel cache.

python -m benchmarks.engine.startup --shape Qwen3-8B --run-dir /tmp/run   # one start, as JSON
"""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from benchmarks.engine.engines import Place, publish_drafters, random_target, release
from benchmarks.engine.report import Report
from configs.load import load_settings
from configs.schema import Settings
from serving.build import LoadedTarget, build_engine, load_target


def measure(report: Report, place: Place, shape: str, from_disk: bool) -> None:
    """Rows ``start``: the first one compiles every kernel, the second finds them in the cache.

    Args:
        from_disk: write the target and let the engine load it, as a server does; else its weights
            are drawn on the device, and the load is of that.
    """
    release(place)  # of an engine before
    with tempfile.TemporaryDirectory() as folder:
        target = random_target(shape, place)
        publish_drafters(Path(folder) / "run" / "weights", target)
        saved = Path(folder) / "target"
        if from_disk:
            _save(target, saved, Path(folder) / "run")
        del target
        release(place)
        for kernels in ("cold", "warm"):
            what = {"shape": shape, "kernels": kernels, "from_disk": from_disk}

            def start() -> dict[str, Any]:
                chosen = ["--target", str(saved)] if from_disk else []
                return _started(shape, place, Path(folder), chosen, report.left_s)

            report.attempt("start", what, 30, start)


def _save(target: LoadedTarget, folder: Path, run_dir: Path) -> None:
    """The target as a server finds it, and its drafter under the fingerprint of the folder."""
    from buffer.fingerprint import target_fingerprint

    target.model.save_pretrained(folder, max_shard_size="5GB")
    target.tokenizer.save_pretrained(folder)
    manifest = run_dir / "weights" / "0" / "manifest.json"
    text = manifest.read_text().replace(target.fingerprint, target_fingerprint(folder))
    manifest.write_text(text)


def _started(
    shape: str, place: Place, folder: Path, chosen: list[str], timeout_s: float
) -> dict[str, Any]:
    """One start in a new process; its kernels are cached in ``folder``."""
    command = [sys.executable, "-m", "benchmarks.engine.startup", "--shape", shape]
    command += ["--device", str(place.device), "--run-dir", str(folder / "run"), *chosen]
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
    """Keeps what the engine says it took: its messages of a part and its seconds."""

    def __init__(self) -> None:
        super().__init__(logging.INFO)
        self.said: dict[str, float] = {}

    def emit(self, record: logging.LogRecord) -> None:
        args = record.args
        if record.msg == "%s in %.1f s" and isinstance(args, tuple):
            what, seconds = args
            assert isinstance(what, str) and isinstance(seconds, float)
            self.said[what] = seconds


def start(
    shape: Annotated[str, typer.Option()],
    run_dir: Annotated[Path, typer.Option()],
    device: Annotated[str, typer.Option()] = "cuda",
    target: Annotated[Path | None, typer.Option(help="load this folder")] = None,
) -> None:
    """One start with the settings of ``configs/one_gpu.yaml``; prints its times as JSON."""
    place = Place(torch.device(device))
    seconds = _Seconds()
    logging.getLogger("serving").addHandler(seconds)
    logging.getLogger("serving").setLevel(logging.INFO)
    started = time.perf_counter()
    settings = _settings(place, run_dir, target)
    loaded = load_target(settings) if target else random_target(shape, place)
    place.synchronize()
    loaded_s = time.perf_counter() - started
    service = build_engine(settings, loaded)
    place.synchronize()
    programs = service.engine.programs
    assert programs is not None
    found = {
        "load_s": loaded_s,
        "engine_s": time.perf_counter() - started - loaded_s,
        "total_s": time.perf_counter() - started,
        "said_s": seconds.said,
        "making_programs": asdict(programs.graphs.spent),
        "max_batch": settings.engine.max_batch,
        "max_draft": settings.drafter.max_draft,
        "held_gib": place.held_bytes() / 2**30,
    }
    del service
    print(json.dumps(found), flush=True)


def _settings(place: Place, run_dir: Path, target: Path | None) -> Settings:
    chosen = [f"run_dir={run_dir}", f"device={place.device}", "engine.programs=always"]
    if target is not None:
        chosen.append(f"target={target}")
    if not place.is_gpu:  # a try
        chosen += ["engine.max_batch=2", "engine.max_model_len=256", "engine.prefill_chunk=64"]
    return load_settings([Path("configs/one_gpu.yaml")], chosen, {})


if __name__ == "__main__":
    typer.run(start)
