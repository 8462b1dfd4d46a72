"""Benchmarks run by hand, some of them on a GPU only: a name that moved must not be found there."""

from __future__ import annotations

import importlib

import pytest

from oracles.support import REPOSITORY

MODULES = [
    ".".join(path.relative_to(REPOSITORY).with_suffix("").parts).removesuffix(".__init__")
    for room in ("benchmarks", "examples")
    for path in sorted((REPOSITORY / room).rglob("*.py"))
]


@pytest.mark.filterwarnings("ignore::DeprecationWarning:torch")
@pytest.mark.parametrize("module", MODULES)
def test_a_benchmark_finds_what_it_imports(module: str):
    importlib.import_module(module)
