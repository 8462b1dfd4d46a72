"""The process of one writer: records come in on stdin, one JSON object a line, and each is answered
with ``written`` or ``failed`` on stdout. It ends when stdin does."""

from __future__ import annotations

import os
import sys
from typing import BinaryIO

import msgspec

from reporting.catalog import writer_kind
from reporting.interface import Writer
from reporting.records import Alert, Bundle, Figures, Greeting, Record, Row

NICE = 10
"""Server and trainer on the same machine come first."""
_MOST_LINES = 5
"""Failures that are told of; further ones are only counted."""


def main() -> int:
    """Exit code 0: the input ended. 1: the writer could not begin; stderr says why."""
    os.nice(NICE)
    # Packages print to stdout, where our answers belong.
    answers = os.fdopen(os.dup(1), "wb", buffering=0)
    os.dup2(2, 1)
    lines = sys.stdin.buffer
    greeting = msgspec.json.decode(lines.readline(), type=Greeting)
    try:
        writer = writer_kind(greeting.writer).open(greeting)
    except Exception as error:  # whatever a package raises: the process's outermost level
        _say(f"{greeting.writer} cannot begin ({type(error).__name__}: {error}); nothing is "
             f"reported there, and nothing else changes")  # fmt: skip
        return 1
    answers.write(b"written\n")
    _write_all(writer, lines, answers, greeting.writer)
    writer.close()
    return 0


def _write_all(writer: Writer, lines: BinaryIO, answers: BinaryIO, name: str) -> None:
    num_failed = 0
    for line in lines:
        try:
            write(writer, msgspec.json.decode(line, type=Record))
        except Exception as error:  # likewise: the next record may be written
            num_failed += 1
            if num_failed <= _MOST_LINES:
                _say(f"{name} could not write a record ({type(error).__name__}: {error})")
            answers.write(b"failed\n")
        else:
            answers.write(b"written\n")


def write(writer: Writer, record: Record) -> None:
    """Give a record to the method that is for it."""
    match record:
        case Figures():
            writer.figures(record)
        case Row():
            writer.row(record)
        case Alert():
            writer.alert(record)
        case Bundle():
            writer.bundle(record)


def _say(text: str) -> None:
    print(f"reporting: {text}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
