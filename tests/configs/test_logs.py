"""Our packages log at the chosen level; libraries only speak up about problems."""

from __future__ import annotations

import subprocess
import sys

import pytest

from oracles.support import REPOSITORY

SPEAK = """
import logging, sys
from configs.logs import set_up_logging
set_up_logging(sys.argv[1])
for name in ("serving.build", "library"):
    for level in ("debug", "info", "warning", "error"):
        getattr(logging.getLogger(name), level)(level)
"""


@pytest.mark.parametrize(
    ("level", "ours", "theirs"),
    [
        ("debug", ["debug", "info", "warning", "error"], ["warning", "error"]),
        ("info", ["info", "warning", "error"], ["warning", "error"]),
        ("error", ["error"], ["error"]),
    ],
)
def test_level_of_our_lines_and_of_libraries(level: str, ours: list[str], theirs: list[str]):
    done = subprocess.run(
        [sys.executable, "-c", SPEAK, level],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        check=True,
    )

    lines = [line.split()[3:] for line in done.stderr.splitlines()]
    assert [text for name, text in lines if name == "serving.build:"] == ours
    assert [text for name, text in lines if name == "library:"] == theirs
    assert done.stdout == ""
