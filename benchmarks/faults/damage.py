"""Every bit flip and every truncation of a segment of 4 KiB.

    python -m benchmarks.faults.damage            # a minute
    python -m benchmarks.faults.damage --step 64  # one bit of 64

The segment is what a server writes: traces in frames, in one file. After each change it is read as
a trainer reads it, and as ``buffer inspect`` does. Both must notice, one trace may be missing, and
all others must come out as they were written. Writes ``benchmarks/results/damage.json`` and, with
``--publish``, ``rows/faults.json``.
"""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import accumulate
from pathlib import Path
from typing import Annotated, Any

import typer

from benchmarks.faults.fuzz import sound_records
from benchmarks.harness.results import (
    RESULTS,
    Row,
    at_least,
    at_most,
    say,
    write_result,
    write_rows,
)
from buffer.codec import decode_trace, encode_trace
from buffer.embedded_log import EmbeddedLog
from buffer.frames import HEAD
from buffer.interface import TraceLimits
from buffer.segment_report import check_segments
from buffer.traces import TraceReader

SEGMENT_BYTES = 4096
LIMITS = TraceLimits(SEGMENT_BYTES, 1 << 20, 1e9, 0.0)


@dataclass(frozen=True, slots=True)
class Segment:
    """A segment that a server wrote and closed."""

    root: Path
    path: Path
    content: bytes
    ends: tuple[int, ...]
    """One past the last byte of each record."""
    numbers: tuple[int, ...]
    """Sequence number of each record's trace."""


def write_segment(run_dir: Path) -> Segment:
    """A segment of exactly 4 KiB: sound traces of all kinds, and one that fills it up."""
    records = [record for record in sound_records() if len(record) < 750]
    left = SEGMENT_BYTES - sum(HEAD.size + len(record) for record in records)
    records[-1] = _longer(records[-1], len(records[-1]) + left)
    with EmbeddedLog("log:", run_dir).open_trace_writer(LIMITS) as writer:
        writer.append_all(records)
    root = run_dir / "traces"
    path = root / writer.name / "000000.seg"
    ends = tuple(accumulate(HEAD.size + len(record) for record in records))
    numbers = tuple(decode_trace(record).seq for record in records)
    return Segment(root, path, path.read_bytes(), ends, numbers)


def _longer(record: bytes, num_bytes: int) -> bytes:
    """The same trace in so many bytes: its name fills them."""
    trace = decode_trace(record)
    padding = "-" * (num_bytes - len(record))
    longer = encode_trace(replace(trace, request_id=trace.request_id + padding))
    assert len(longer) == num_bytes, (len(longer), num_bytes)
    return bytes(longer)


def changes(segment: Segment, step: int) -> Iterator[tuple[str, bytes, int]]:
    """What was done, the changed content, and the offset of the change."""
    content = segment.content
    for bit in range(0, len(content) * 8, step):
        flipped = bytearray(content)
        flipped[bit // 8] ^= 1 << bit % 8
        yield f"bit {bit}", bytes(flipped), bit // 8
    for size in range(0, len(content), max(1, step // 8)):
        yield f"cut at {size}", content[:size], size


def check(segment: Segment, what: str, content: bytes, at: int, run_dir: Path) -> str | None:
    """What a change did that it must not do; ``None``: all is well."""
    segment.path.write_bytes(content)
    hit = next(i for i, end in enumerate(segment.ends) if at < end)
    is_cut = len(content) < len(segment.content)
    if is_cut:
        expected, lost = segment.numbers[:hit], 0
        torn = int(at not in (0, *segment.ends))
    else:
        expected, lost = segment.numbers[:hit] + segment.numbers[hit + 1 :], 1
        torn = 0
    reader = TraceReader(EmbeddedLog("log:", run_dir))
    found = tuple(trace.seq for trace in reader.read(1000))
    counts = reader.counts
    if found != expected:
        return f"{what}: read {found}, expected {expected}"
    if counts.quarantined:
        return f"{what}: a damaged record reached the decoder"
    # A damaged length makes the last record look like one that its writer did not finish.
    if counts.damaged + counts.torn != lost + torn:
        return f"{what}: {counts.damaged} damaged and {counts.torn} torn were counted"
    reports = check_segments(segment.root)
    seen = any(report.damaged or report.torn_bytes for report in reports)
    if seen != bool(lost + torn):
        return f"{what}: inspect finds {'damage' if seen else 'nothing'}"
    return None


def damage_all(run_dir: Path, step: int = 1) -> dict[str, Any]:
    """Try all changes, one of ``step``."""
    begun = time.monotonic()
    segment = write_segment(run_dir)
    num_flips = num_cuts = 0
    failures = list[str]()
    for what, content, at in changes(segment, step):
        num_cuts += len(content) < len(segment.content)
        num_flips += len(content) == len(segment.content)
        if problem := check(segment, what, content, at, run_dir):
            failures.append(problem)
    return {
        "segment_bytes": len(segment.content),
        "records": len(segment.ends),
        "flips": num_flips,
        "cuts": num_cuts,
        "failures": failures[:20],
        "num_failures": len(failures),
        "seconds": time.monotonic() - begun,
    }


def rows_of(found: dict[str, Any]) -> list[Row]:
    row = f"a segment of {found['segment_bytes']} bytes, {found['records']} traces"
    tried = found["flips"] + found["cuts"]
    return [
        at_least(row, "bit flips and truncations tried", tried, found["segment_bytes"] * 9),
        at_most(row, "not noticed, or costing more than one trace", found["num_failures"], 0),
    ]


def main(
    step: Annotated[int, typer.Option(min=1, help="try one bit of so many")] = 1,
    publish: Annotated[bool, typer.Option(help="write rows/faults.json, too")] = False,
    out: Annotated[Path, typer.Option(help="result file")] = RESULTS / "damage.json",
    rows_dir: Annotated[Path, typer.Option(help="folder of rows/faults.json")] = RESULTS,
) -> None:
    """Damage a segment in every place."""
    in_memory = Path("/dev/shm")
    parent = in_memory if os.access(in_memory, os.W_OK) else None
    run_dir = Path(tempfile.mkdtemp(prefix="damage-", dir=parent))
    try:
        found = damage_all(run_dir, step)
    finally:
        shutil.rmtree(run_dir)
    say(str(found))
    write_result(out, found)
    if publish:
        write_rows("faults", rows_of(found), "python -m benchmarks.faults.damage", rows_dir)
    if found["failures"]:
        raise typer.Exit(code=1)


if __name__ == "__main__":
    typer.run(main)
