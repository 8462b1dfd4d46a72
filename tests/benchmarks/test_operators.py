"""The table of faults that others reported: its tests exist, and what fails is told."""

from __future__ import annotations

import ast
from collections import Counter

import pytest

from benchmarks import operators
from benchmarks.operators import FAULTS, Fault, counted, rows_of, run_tests
from oracles.support import REPOSITORY


@pytest.mark.parametrize("number", FAULTS)
def test_every_test_of_a_row_exists(number):
    for file, names in FAULTS[number].tests.items():
        tree = ast.parse((REPOSITORY / "tests" / file).read_text())
        known = {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}
        assert set(names) <= known, file
        assert any(name.startswith("test_") for name in known)


@pytest.fixture
def bare(monkeypatch):
    """pytest without plugins, which starts sooner."""
    monkeypatch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")


def test_outcomes_are_counted_by_row(tmp_path, bare):
    (tmp_path / "tests" / "room").mkdir(parents=True)
    (tmp_path / "tests" / "room" / "test_a.py").write_text(
        "import pytest\n\n"
        "@pytest.mark.parametrize('n', [1, 2, 3])\n"
        "def test_three(n): assert n != 2\n\n"
        "@pytest.fixture\n"
        "def broken(): raise OSError\n\n"
        "def test_of_a_broken_server(broken): pass\n\n"
        "@pytest.mark.skip\n"
        "def test_on_a_gpu(): pass\n\n"
        "def test_sound(): pass\n"
    )
    found = run_tests(["room/test_a.py"], tmp_path)

    whole = counted(Fault("all", {"room/test_a.py": ()}), found)
    assert whole == Counter(passed=3, failed=2, skipped=1)
    some = Fault("some", {"room/test_a.py": ("test_three", "test_sound")})
    assert counted(some, found) == Counter(passed=3, failed=1)
    gone = Fault("gone", {"room/test_a.py": ("test_gone",), "room/test_b.py": ()})
    assert counted(gone, found) == Counter(missing=2)


def test_tests_that_cannot_run_are_no_result(tmp_path, bare):
    with pytest.raises(RuntimeError, match="pytest ended with 4"):
        run_tests(["room/test_nowhere.py"], tmp_path)


@pytest.mark.parametrize(
    ("count", "holds"),
    [
        (Counter(passed=4), [True, True]),
        (Counter(passed=9, skipped=9), [True, True]),
        (Counter(passed=3), [False, True]),
        (Counter(passed=9, failed=1), [True, False]),
        (Counter(passed=9, missing=1), [True, False]),
    ],
)
def test_a_row_holds_with_its_neighbours_and_without_a_failure(count, holds):
    number = next(iter(operators.FAULTS))
    assert [row.holds for row in rows_of([number], {number: count})] == holds
