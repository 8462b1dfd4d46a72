"""What is imported is declared in pyproject.toml, what is declared is used, and both are pinned."""

from __future__ import annotations

import ast
import re
import sys
import tomllib
from importlib import metadata

import pytest
from packaging.requirements import Requirement

from tests.house.check_house import PRODUCT_ROOMS, REPOSITORY

PROJECT = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
OURS = {room.rpartition("/")[2] for room in PRODUCT_ROOMS} | {
    "tests",
    "oracles",
    "benchmarks",
    "examples",
    PROJECT["name"],
}
PACKAGES = metadata.packages_distributions()
PEERS = {"arctic_inference", "flashinfer", "liger_kernel"}
"""Modules that benchmarks compare with where somebody has installed them."""
NOT_IMPORTED = {
    "accelerate": "transformers reads GGUF files with it",
    "import-linter": "a command",
    "mypy": "a command",
    "pytest-timeout": "a plugin of pytest",
    "pytest-xdist": "a plugin of pytest",
    "ruff": "a command",
    "setuptools": "builds the wheel in test_wheel.py",
    "types-pyyaml": "types for mypy",
}
"""Packages of the dev extra that no file imports, and what they are for."""
APART = {"speculators"}
"""What a comparison imports in an environment of its own, because it brings much along."""


def normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def declared(texts: list[str]) -> set[str]:
    return {normal(Requirement(text).name) for text in texts} - OURS


def extra(name: str) -> set[str]:
    return declared(PROJECT["optional-dependencies"][name])


def imported(*rooms: str) -> dict[str, str]:
    """Package -> one file that imports it, for everything outside the standard library and us."""
    found: dict[str, str] = {}
    for room in rooms:
        for path in sorted((REPOSITORY / room).rglob("*.py")):
            for module in _modules(ast.parse(path.read_text())) - OURS - PEERS:
                name = normal(PACKAGES.get(module, [module])[0])
                found[name] = str(path.relative_to(REPOSITORY))
    return found


def _modules(tree: ast.Module) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names.add(node.module)
    return {name.partition(".")[0] for name in names} - sys.stdlib_module_names


CORE = declared(PROJECT["dependencies"])
CLIENTS = extra("redis") | extra("kafka") | extra("signatures") | extra("encryption")
CLIENTS |= extra("deepspeed") | extra("object-store")
"""What buffers use if the settings say so: clients of services, signatures and ciphers."""
WRITERS = extra("wandb") | extra("tensorboard")
"""What writers of reports use if the settings say so."""


def test_the_rooms_import_what_they_declare_and_declare_what_they_import():
    found = imported(*PRODUCT_ROOMS)
    wanted = CORE | extra("gpu") | extra("gguf") | extra("rl") | CLIENTS | WRITERS
    assert {name: path for name, path in found.items() if name not in wanted} == {}
    assert wanted - found.keys() == set()


def test_the_demo_extra_is_what_the_examples_need_beside_the_rooms():
    found = imported("examples")
    wanted = CORE | extra("demo") | extra("gguf") | extra("dev")
    assert {name: path for name, path in found.items() if name not in wanted} == {}
    assert extra("demo") - found.keys() == set()


def test_the_dev_extra_is_what_tests_benchmarks_and_commands_need():
    found = imported("tests", "oracles", "benchmarks", "examples")
    extras = extra("demo") | extra("gguf") | extra("rl") | extra("dev")
    wanted = CORE | extras | CLIENTS | WRITERS | APART
    assert {name: path for name, path in found.items() if name not in wanted} == {}
    assert extra("dev") - found.keys() == NOT_IMPORTED.keys()


def test_every_extra_is_known_here():
    assert PROJECT["optional-dependencies"].keys() == {
        "gpu",
        "demo",
        "gguf",
        "redis",
        "encryption",
        "kafka",
        "object-store",
        "s3",
        "signatures",
        "rl",
        "wandb",
        "tensorboard",
        "deepspeed",
        "dev",
    }


PINS = dict(
    line.split("==")
    for line in (REPOSITORY / "constraints.txt").read_text().splitlines()
    if line and not line.startswith("#")
)


def test_every_declared_package_is_pinned_to_a_version_that_it_allows():
    pins = {normal(name): version for name, version in PINS.items()}
    # make setup does not install s3fs, which fsspec imports by its name and for which no service is
    # here.
    named = PROJECT["optional-dependencies"].items()
    extras = [packages for name, packages in named if name != "s3"]
    lists = [PROJECT["dependencies"], *extras]
    wanted = [Requirement(text) for texts in lists for text in texts]
    refused = [
        str(one)
        for one in wanted
        if normal(one.name) not in OURS
        and not one.specifier.contains(pins.get(normal(one.name), "0"))
    ]
    assert refused == []
    assert (
        declared([*CORE, *extra("gpu"), *extra("demo"), *extra("gguf"), *extra("dev")])
        <= pins.keys()
    )


@pytest.mark.skipif(sys.platform != "linux", reason="the pins are those of Linux")
def test_every_pinned_package_is_one_that_make_setup_installs():
    installed = {normal(one.name) for one in metadata.distributions()}
    assert [name for name in PINS if normal(name) not in installed] == []
