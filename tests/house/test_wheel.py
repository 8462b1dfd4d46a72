"""An installed wheel works in any directory, without the repository."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from importlib import metadata
from pathlib import Path

import pytest

from examples.real_target import FILE, FOLDER
from oracles.support import REPOSITORY

SOURCES = (
    "serving", "trainer", "buffer", "reporting", "drafters", "policies", "targets", "configs",
    "kernels",
)  # fmt: skip
FILES = ("pyproject.toml", "README.md", "LICENSE")
BUILD = "import sys; from setuptools import build_meta; build_meta.build_wheel(sys.argv[1])"


@pytest.fixture(scope="module")
def site_packages(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the wheel unpacked, as pip installs it; dependencies stay where they are."""
    source, dist, site = (tmp_path_factory.mktemp(name) for name in ("source", "dist", "site"))
    for room in SOURCES:
        shutil.copytree(
            REPOSITORY / room, source / room, ignore=shutil.ignore_patterns("__pycache__")
        )
    for name in FILES:
        shutil.copy(REPOSITORY / name, source)
    done = subprocess.run(
        [sys.executable, "-c", BUILD, str(dist)], cwd=source, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    (wheel,) = dist.glob("*.whl")
    zipfile.ZipFile(wheel).extractall(site)
    return site


@pytest.fixture
def run(site_packages, tmp_path):
    """Run a command of the installed wheel in an empty directory."""

    def run_command(*words: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", *words],
            cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": str(site_packages)},
            capture_output=True,
            text=True,
            timeout=100,
        )

    return run_command


def test_the_version_is_that_of_the_wheel(run, site_packages):
    (installed,) = metadata.distributions(name="slipstream-serving", path=[str(site_packages)])
    assert run("serving", "--version").stdout == f"{installed.version}\n"


def test_shipped_settings_are_found_by_name(run):
    done = run("serving", "launch", "--config", "demo", "--print-config")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("target: examples/target\ntarget_cache: null\ndevice: cpu\n")


@pytest.mark.parametrize("room", ["serving", "trainer"])
def test_the_missing_bundled_files_are_reported_before_anything_loads(run, room):
    done = run(room, "launch", "--config", "demo")
    target, drafter = done.stderr.splitlines()
    assert done.returncode == 2
    assert target == (
        "target 'examples/target' is the bundled target, which comes with Slipstream's repository "
        "and not with an installed package; name another with --set target=ORG/NAME (Hugging Face "
        "id) or --set target=FOLDER, or run in the repository"
    )
    assert drafter == (
        "drafter.path 'examples/drafter/0' is the bundled drafter, which comes with Slipstream's "
        "repository and not with an installed package; start from random weights with "
        "--set drafter.path=null, name another with --set drafter.path=FOLDER, or run in the "
        "repository"
    )


def test_the_real_target_is_fetched_by_make(run):
    done = run("serving", "launch", "--config", "real")
    assert done.returncode == 2
    assert done.stderr == (
        f"target {str(FOLDER / FILE)!r} has not been fetched; run `make real` in the repository, "
        "or name another target with --set target=FILE.gguf\n"
    )


def test_the_wheel_holds_every_file_of_the_rooms(site_packages):
    roots = [REPOSITORY / room for room in SOURCES if room != "kernels"]
    roots.append(REPOSITORY / "kernels" / "specops")
    wanted = {
        path.relative_to(root.parent)
        for root in roots
        for path in root.rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    found = {path.relative_to(site_packages) for path in site_packages.rglob("*") if path.is_file()}
    assert wanted - found == set()
