"""Rooms import downward only, and our packages shadow none that others need."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from oracles.support import REPOSITORY


def run_python(code: str, **extra_env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code],
        cwd=REPOSITORY,
        env={**os.environ, **extra_env},
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )


def test_our_kernels_folder_does_not_shadow_the_package_transformers_looks_for():
    code = (
        "from transformers import Qwen3ForCausalLM\n"
        "import importlib.util, specops\n"
        "spec = importlib.util.find_spec('kernels')\n"
        "assert spec is None or spec.origin is None or 'site-packages' in spec.origin, spec\n"
    )

    done = run_python(code, PYTHONPATH=str(REPOSITORY))

    assert done.returncode == 0, done.stderr


def modules_of(room: str) -> list[str]:
    paths = sorted((REPOSITORY / room).rglob("*.py"))
    names = [".".join(path.relative_to(REPOSITORY).with_suffix("").parts) for path in paths]
    return [name.removesuffix(".__init__") for name in names if not name.endswith("__main__")]


@pytest.mark.parametrize("room", ["buffer", "policies", "reporting", "configs"])
def test_room_works_without_torch(room: str):
    code = (
        "import importlib, sys\n"
        "sys.modules['torch'] = sys.modules['transformers'] = None\n"
        f"for name in {modules_of(room)!r}: importlib.import_module(name)\n"
    )

    done = run_python(code)

    assert done.returncode == 0, done.stderr


def test_rooms_import_downward_only():
    code = "import sys; from importlinter.cli import lint_imports; sys.exit(lint_imports())"

    done = run_python(code)

    assert done.returncode == 0, done.stdout + done.stderr
