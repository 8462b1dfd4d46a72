"""Look into a run folder from a terminal. Reads only.

Exit code 0: all fine. 1: something is damaged. 2: wrong usage.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, Protocol

import typer

from buffer.codec import UnreadableRecordError, decode_trace
from buffer.records import Acceptance, Trace
from buffer.segments import SegmentReader, SegmentReport, recover
from buffer.weights import BundleError, check_bundle, read_manifest, versions
from configs.cli import VersionOption

app = typer.Typer(no_args_is_help=True, help=__doc__)


class Report(Protocol):
    """One line of the output."""

    @property
    def is_damaged(self) -> bool: ...

    def to_line(self) -> str: ...

    def to_json(self) -> dict[str, Any]: ...


@dataclass(frozen=True, slots=True)
class SegmentLine:
    """One segment of the trace log."""

    segment: SegmentReport

    @property
    def is_damaged(self) -> bool:
        return self.segment.damaged > 0

    def to_line(self) -> str:
        one = self.segment
        live = ", being written" if one.live else ""
        return (
            f"segment {one.writer}/{one.segment:06d}: {one.records} records, "
            f"{one.num_bytes} bytes, torn {one.torn_bytes} bytes, damaged {one.damaged}{live}"
        )

    def to_json(self) -> dict[str, Any]:
        return {"kind": "segment", **asdict(self.segment)}


@dataclass(frozen=True, slots=True)
class TracesLine:
    """All traces of the log together."""

    traces: int
    prompt_tokens: int
    completion_tokens: int
    acceptance: Acceptance
    tenants: dict[str, int]
    """Traces of each."""
    unreadable: dict[str, int]
    """Records that are no trace, by reason."""

    @property
    def is_damaged(self) -> bool:
        return bool(self.unreadable)

    def to_line(self) -> str:
        tenants = ", ".join(f"{name or '(none)'} {count}" for name, count in self.tenants.items())
        unreadable = ", ".join(f"{reason} {count}" for reason, count in self.unreadable.items())
        return (
            f"traces: {self.traces}, tokens {self.prompt_tokens} prompt + {self.completion_tokens} "
            f"completion, tokens_per_step {_figure(self.acceptance.tokens_per_step)}, "
            f"tenants: {tenants or 'none'}; unreadable: {unreadable or 'none'}"
        )

    def to_json(self) -> dict[str, Any]:
        tokens_per_step = self.acceptance.tokens_per_step
        return {"kind": "traces", **asdict(self), "tokens_per_step": tokens_per_step}


@dataclass(frozen=True, slots=True)
class BundleLine:
    """One published version."""

    version: int
    parent: int | None
    gate: dict[str, Any]
    problem: str | None

    @property
    def is_damaged(self) -> bool:
        return self.problem is not None

    def to_line(self) -> str:
        gate = ", ".join(f"{name} {_figure(value)}" for name, value in self.gate.items())
        state = "ok" if self.problem is None else f"DAMAGED: {self.problem}"
        parent = "none" if self.parent is None else self.parent
        return f"bundle {self.version}: parent {parent}, gate: {gate or 'no figures'}; {state}"

    def to_json(self) -> dict[str, Any]:
        return {"kind": "bundle", **asdict(self)}


@app.callback()
def main(version: VersionOption = False) -> None:
    """Look into a run folder from a terminal. Reads only."""  # keeps `inspect` a subcommand


@app.command()
def inspect(
    run: Annotated[
        Path, typer.Argument(exists=True, file_okay=False, help="run folder, e.g. runs/demo")
    ],
    as_json: Annotated[bool, typer.Option("--json", help="one JSON object per line")] = False,
) -> None:
    """Check every trace segment and every published bundle, one line for each.

    Exit code 0: all fine. 1: something is damaged. 2: wrong usage.
    """
    reports = list(look_into(run))
    for report in reports:
        typer.echo(json.dumps(report.to_json()) if as_json else report.to_line())
    if any(report.is_damaged for report in reports):
        raise typer.Exit(code=1)


def look_into(run: Path) -> Iterator[Report]:
    """Reports on all segments, on the traces in them, and on all bundles."""
    yield from map(SegmentLine, recover(run / "traces"))
    yield summarise_traces(run / "traces")
    for version in versions(run / "weights"):
        yield summarise_bundle(run / "weights" / str(version))


def summarise_traces(root: Path) -> TracesLine:
    """Count what the log holds; reads from its beginning and moves no other reader."""
    acceptance = Acceptance()
    counts, tenants, unreadable = Counter[str](), Counter[str](), Counter[str]()
    for trace in _traces(root, unreadable):
        acceptance += _acceptance_of(trace)
        tenants[trace.tenant] += 1
        counts["prompt"] += trace.prompt_length
        counts["completion"] += trace.token_ids.size - trace.prompt_length
    return TracesLine(
        traces=tenants.total(),
        prompt_tokens=counts["prompt"],
        completion_tokens=counts["completion"],
        acceptance=acceptance,
        tenants=dict(tenants.most_common()),
        unreadable=dict(unreadable),
    )


def summarise_bundle(path: Path) -> BundleLine:
    """Check one bundle; what its manifest says is shown also when a file of it is damaged."""
    problem = None
    try:
        check_bundle(path)
    except BundleError as error:
        problem = error.problem
    try:
        manifest = read_manifest(path)
    except BundleError:
        return BundleLine(int(path.name), None, {}, problem)
    return BundleLine(manifest.version, manifest.parent, manifest.gate, problem)


def _traces(root: Path, unreadable: Counter[str]) -> Iterator[Trace]:
    reader = SegmentReader(root)
    while records := reader.read(64):
        for record in records:
            try:
                yield decode_trace(record.payload)
            except UnreadableRecordError as error:
                unreadable[error.reason] += 1


def _acceptance_of(trace: Trace) -> Acceptance:
    return Acceptance(
        num_steps=len(trace.rounds),
        num_proposed=sum(len(one.draft_ids) for one in trace.rounds),
        num_accepted=sum(one.num_accepted for one in trace.rounds),
    )


def _figure(value: Any) -> str:
    if value is None:
        return "unknown"
    return f"{value:.3f}" if isinstance(value, float) else str(value)
