"""Hardware and software that a measurement ran on."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
import subprocess
from pathlib import Path
from typing import Any

PACKAGES = ("torch", "transformers", "numpy", "slipstream-serving")


def machine() -> dict[str, Any]:
    """Hardware, versions and commit, recorded with every published figure."""
    return {"hardware": hardware(), "versions": versions(), "commit": commit()}


def hardware() -> dict[str, Any]:
    return {
        "cpu": _cpu_name(),
        "cores": len(os.sched_getaffinity(0))
        if hasattr(os, "sched_getaffinity")
        else os.cpu_count(),
        "memory_gib": _memory_gib(),
        "gpu": _gpu_names(),
        "system": f"{platform.system()} {platform.machine()}",
    }


def versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue  # a checkout that is not installed
    return found


def commit() -> str | None:
    """Commit of the checkout, marked if tracked files other than published figures, which are
    written one after the other, differ from it; ``None`` outside git."""
    here = Path(__file__).resolve().parent
    head = _output(["git", "-C", str(here), "rev-parse", "HEAD"])
    if head is None:
        return None
    changed = _output(
        [
            *("git", "-C", str(here), "status", "--porcelain", "--untracked-files=no", "--"),
            *(":(top)", ":(top,exclude)benchmarks/results"),
        ]
    )
    return f"{head}{' with changes' if changed else ''}"


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def _memory_gib() -> float | None:
    try:
        return round(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30, 1)
    except (ValueError, OSError):
        return None


def _gpu_names() -> list[str]:
    query = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
    return (_output(query) or "").splitlines()


def _output(command: list[str]) -> str | None:
    """Output of a command; ``None`` if the command is missing or fails."""
    if shutil.which(command[0]) is None:
        return None
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=20)
    return done.stdout.strip() if done.returncode == 0 else None
