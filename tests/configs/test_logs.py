"""Our packages log at the chosen level; libraries only speak up about problems."""

from __future__ import annotations

import logging
import subprocess
import sys

import pytest

from configs.logs import FORMAT, OneRecord, Outage
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


def test_what_a_client_sent_forges_no_line_and_steers_no_terminal():
    formatter = OneRecord(FORMAT)
    sent = "/x\n2026-11-29 INFO serving.http: fake \x1b[31m\r\x00\u202egnp\x85\u2028\ud800 é\t√"
    record = logging.LogRecord("serving", logging.INFO, "", 0, "%s is no folder", (sent,), None)
    first, second = formatter.format(record).split("\n")
    assert first.endswith("INFO serving: /x")
    assert second == (
        r"    2026-11-29 INFO serving.http: fake \x1b[31m\r\x00\u202egnp\x85\u2028\ud800 é"
        "\t√ is no folder"
    )
    assert len(formatter.format(record).splitlines()) == 2


def test_a_traceback_stays_as_it_is():
    try:
        raise ValueError("no")
    except ValueError:
        record = logging.LogRecord("a", logging.ERROR, "", 0, "failed", None, sys.exc_info())
    text = OneRecord(FORMAT).format(record)
    assert "a: failed\nTraceback (most recent call last):\n  File" in text


class Clock:
    """Seconds that pass when told to."""

    def __init__(self) -> None:
        self.now_s = 1000.0

    def __call__(self) -> float:
        return self.now_s


def test_an_outage_is_told_when_it_begins_and_ends_whatever_its_reasons():
    clock = Clock()
    outage = Outage("look for new versions", clock)
    assert outage.ended() is None

    told = []
    for number in range(40):
        told.append(outage.failed(f"reason {number % 3}"))
        clock.now_s += 1.0

    assert told == ["cannot look for new versions (reason 0)"] + [None] * 39
    assert outage.ended() == "can look for new versions again, after 40 s and 40 failed tries"
    assert outage.ended() is None


def test_a_long_outage_is_told_at_growing_intervals_and_the_next_one_at_once():
    clock = Clock()
    outage = Outage("report", clock)
    times_s = []
    for _ in range(20_000):
        if outage.failed("gone"):
            times_s.append(clock.now_s - 1000.0)
        clock.now_s += 1.0

    assert times_s == [0, 60, 180, 420, 900, 1860, 3780, 7380, 10980, 14580, 18180]
    assert outage.failed("gone") is None
    outage.ended()
    assert outage.failed("gone") == "cannot report (gone)"
    assert outage.ended() == "can report again, after 0 s and 1 failed try"
