"""The house keeps its rules, and the check notices when it does not."""

from __future__ import annotations

import pytest

from tests.house.check_house import (
    EXCEPTIONS,
    MAX_ATTRIBUTES,
    MAX_LINES,
    Violation,
    complaints,
    drafter_kinds,
    large_classes,
    long_file,
    spelled_kinds,
    violations,
)

KINDS = ("eagle3", "suffix")


def test_the_house_is_in_order():
    found = complaints(violations(drafter_kinds()), EXCEPTIONS)
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    "line",
    [
        'kind == "eagle3"',
        "from drafters.eagle3.model import Config",
        "neural: PagedEagle3",
        "x = 1  # the EAGLE-3 drafter",
        '"""Kind that proposed, e.g. ``eagle3``."""',
        'f"an eagle3 of {x}"',
        "suffix_matches = None",
        "SuffixIndex()",
        "settings.drafter.suffix.enabled",
        "x = 1  # what the suffix index proposes",
        '"""The kind ``suffix``."""',
    ],
)
def test_a_spelled_kind_is_found(line):
    assert [one.line for one in spelled_kinds("serving/x.py", f"y = 0\n{line}\n", KINDS)] == [2]


@pytest.mark.parametrize(
    "line",
    [
        "path.suffix",
        "path.with_suffix('.py')",
        "name.removesuffix('.py')",
        "x = 1  # the suffix of the text",
        '"""Tensor shapes as suffix."""',
    ],
)
def test_other_uses_of_the_word_are_allowed(line):
    assert list(spelled_kinds("serving/x.py", f"{line}\n", KINDS)) == []


@pytest.mark.parametrize("text", ["drafter.kind=eagle3", "drafter.suffix.enabled=false"])
def test_settings_as_text_may_name_a_kind_in_benchmarks_only(text):
    line = f"options = [{text!r}]\n"
    assert list(spelled_kinds("benchmarks/x.py", line, KINDS)) == []
    assert len(list(spelled_kinds("serving/x.py", line, KINDS))) == 1
    assert len(list(spelled_kinds("benchmarks/x.py", "x = ('eagle3', 4)\n", KINDS))) == 1


def test_a_class_may_have_15_attributes_and_no_more():
    def source(count):
        fields = "".join(f"    a{i}: int\n" for i in range(count))
        sets = "".join(f"        self.a{i} = {i}\n" for i in range(count))
        return (
            f"@dataclass(frozen=True)\nclass Fields:\n    shared: ClassVar[int] = 1\n{fields}"
            f"class Sets:\n    def __init__(self):\n{sets}    def again(self):\n{sets}"
        )

    assert list(large_classes("x.py", source(MAX_ATTRIBUTES))) == []
    assert [one.what for one in large_classes("x.py", source(MAX_ATTRIBUTES + 1))] == [
        "class Fields has more than 15 attributes",
        "class Sets has more than 15 attributes",
    ]


def test_a_file_may_have_500_lines_and_no_more():
    assert list(long_file("x.py", "\n" * MAX_LINES)) == []
    (one,) = long_file("x.py", "\n" * (MAX_LINES + 1))
    assert str(one) == "x.py:1: has 501 lines, over 500"


def test_an_exception_must_match_a_violation():
    found = [Violation("x.py", 3, "is wrong"), Violation("y.py", 4, "is wrong")]
    said = complaints(found, {"x.py: is wrong": "reason", "z.py: is wrong": "reason"})
    assert said == [
        "y.py:4: is wrong",
        "the exception 'z.py: is wrong' matches no violation; delete it from check_house.py",
    ]
