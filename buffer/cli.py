"""Inspect the traces and versions of a run, copy them to another buffer, send them again, and
delete what a tenant left.

Exit code 0: all fine. 1: something is damaged or missing. 2: wrong usage or settings, or the buffer
cannot be reached.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from buffer.backends import limits_of
from buffer.bundles import BundleError
from buffer.codec import UnreadableRecordError, decode_trace
from buffer.command_delete import delete, undelete
from buffer.command_keys import keys
from buffer.command_line import JsonOption, RunArgument, accessed, print_reports, refusing
from buffer.command_resend import copy, replay
from buffer.counts import BufferStats, GroupCounts
from buffer.interface import Backend, Report, TraceLimits
from buffer.record_lines import QuarantineLine, record_lines
from buffer.records import Acceptance, Count, Trace
from buffer.signed_weights import open_weights
from buffer.weights_store import WeightsStore
from configs.cli import Commands, ConfigOption, SetOption, VersionOption, settings_from_cli

app = typer.Typer(cls=Commands, no_args_is_help=True, help=__doc__, pretty_exceptions_enable=False)


@dataclass(frozen=True, slots=True)
class TracesLine(Report):
    """All traces together."""

    traces: int
    prompt_tokens: int
    completion_tokens: int
    acceptance: Acceptance
    tenants: dict[str, int]
    """Number of traces of each tenant."""
    unreadable: dict[str, int]
    """Number of records that are not a trace, by reason."""

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
class BundleLine(Report):
    """One published version."""

    version: int
    parent: int | None
    gate: dict[str, Any]
    problem: str | None
    line: str = ""
    """Of which drafter, where a run has several; empty for the first."""

    @property
    def is_damaged(self) -> bool:
        return self.problem is not None

    def to_line(self) -> str:
        gate = ", ".join(f"{name} {_figure(value)}" for name, value in self.gate.items())
        state = "ok" if self.problem is None else f"DAMAGED: {self.problem}"
        parent = "none" if self.parent is None else self.parent
        name = f"{self.line}/{self.version}" if self.line else self.version
        return f"bundle {name}: parent {parent}, gate: {gate or 'no figures'}; {state}"

    def to_json(self) -> dict[str, Any]:
        return {"kind": "bundle", **asdict(self)}


@dataclass(frozen=True, slots=True)
class ProblemLine(Report):
    """Something beside traces and bundles that cannot be read."""

    text: str

    @property
    def is_damaged(self) -> bool:
        return True

    def to_line(self) -> str:
        return f"DAMAGED: {self.text}"

    def to_json(self) -> dict[str, Any]:
        return {"kind": "problem", **asdict(self)}


@dataclass(frozen=True, slots=True)
class StatsLine(Report):
    """All records together."""

    stats: BufferStats

    @property
    def is_damaged(self) -> bool:
        return False

    def to_line(self) -> str:
        s = self.stats
        deleted = f", {s.deleted} deleted" if s.deleted else ""
        theirs = f" ({s.deleted_bytes} of deleted records)" if s.deleted_bytes else ""
        forgotten = (
            f"; {s.forgotten} that groups had passed are unknown to the store, which was started "
            f"without its data or whose files somebody has overwritten"
            if s.forgotten
            else ""
        )
        return (
            f"records: {s.appended} written by {s.num_writers} writers, {s.held} held, "
            f"{s.held_bytes} bytes{theirs}{deleted}{forgotten}"
        )

    def to_json(self) -> dict[str, Any]:
        values = asdict(self.stats)
        del values["groups"]
        # ``appended`` is what the code calls it; scripts that read it go on working.
        return {"kind": "records", "written": self.stats.appended, **values}


@dataclass(frozen=True, slots=True)
class GroupLine(Report):
    """What one group has done with them."""

    counts: GroupCounts

    @property
    def is_damaged(self) -> bool:
        return False

    def to_line(self) -> str:
        c = self.counts
        deleted = f", {c.deleted} deleted" if c.deleted else ""
        return (
            f"group {c.group}: {c.committed} committed, {c.pending} pending, {c.lost} lost{deleted}"
        )

    def to_json(self) -> dict[str, Any]:
        return {"kind": "group", **asdict(self.counts)}


@app.callback()
def main(version: VersionOption = False) -> None:
    """Inspect, copy, send again and delete what a buffer holds."""  # keeps `inspect` a subcommand


app.command()(copy)
app.command()(replay)
app.command()(delete)
app.command()(undelete)
app.command()(keys)


@app.command()
def inspect(
    run: RunArgument = None,
    records: Annotated[
        bool, typer.Option("--records", help="also a line for each trace and quarantined record")
    ] = False,
    limit: Annotated[
        int | None, typer.Option(min=1, help="so many traces at most, oldest first")
    ] = None,
    token_ids: Annotated[
        bool,
        typer.Option(
            "--token-ids", help="with --records: also prompts and completions, as token ids"
        ),
    ] = False,
    config: ConfigOption = None,
    set_: SetOption = None,
    as_json: JsonOption = False,
) -> None:
    """Check all traces that ``buffer.url`` holds and every published bundle, one line for each
    segment and bundle, and count the records that were put aside. No prompt, completion or hidden
    row is shown unless asked for.

    Exit code 0: all fine. 1: something is damaged. 2: wrong usage or settings, or the buffer
    cannot be reached.
    """
    settings = settings_from_cli(config, set_, print_config=False, loads_target=False)
    with refusing(), accessed(run, settings, "inspect") as (backend, counts):
        key = settings.swap.public_key
        beside = [one.kind for one in settings.drafter.beside]
        reports = list(inspect_backend(backend, limits_of(settings.buffer), key, beside))
        if records:
            reports += record_lines(backend, limit, token_ids)
        if put_aside := tuple(backend.unreadable()):
            reports.append(QuarantineLine(put_aside, records))
        counts["traces"] = sum(one.traces for one in reports if isinstance(one, TracesLine))
        counts["put_aside"] = len(put_aside)
    print_reports(reports, as_json)
    if any(report.is_damaged for report in reports):
        raise typer.Exit(code=1)


@app.command()
def stats(
    run: RunArgument = None,
    config: ConfigOption = None,
    set_: SetOption = None,
    as_json: JsonOption = False,
) -> None:
    """Count the records that ``buffer.url`` holds, and what each group of trainers has committed,
    has still to do, and has lost.

    Exit code 0: they were counted. 2: wrong usage or settings, or the buffer cannot be reached.
    """
    settings = settings_from_cli(config, set_, print_config=False, loads_target=False)
    with refusing(), accessed(run, settings, "stats") as (backend, counts):
        found = backend.stats()
        counts.update(written=found.appended, held=found.held, deleted=found.deleted)
    print_reports([StatsLine(found), *map(GroupLine, found.groups)], as_json)


def inspect_backend(
    backend: Backend,
    limits: TraceLimits,
    public_key: Path | None = None,
    beside: Iterable[str] = (),
) -> Iterator[Report]:
    """Reports on the storage of the traces, on the traces themselves, on every bundle, and on
    damaged lists of deletions and versions.

    Args:
        public_key: a bundle without a signature of it is reported as damaged.
        beside: further drafters whose bundles to look for; those in folders are found anyway.
    """
    yield from backend.reports(limits)
    yield summarise_traces(backend)
    lines = ["", *sorted({*backend.version_lines(), *beside})]
    stores = {line: open_weights(backend, public_key, line=line) for line in lines}
    for line, store in stores.items():
        for version in store.versions():
            yield summarise_bundle(store, version, line)
    for read in (backend.deletions, *(store.next_version for store in stores.values())):
        try:
            read()
        except ValueError as error:
            yield ProblemLine(str(error))


def summarise_traces(backend: Backend) -> TracesLine:
    """Count all stored traces, oldest first; the offsets of other readers do not move."""
    acceptance = Acceptance()
    counts, tenants, unreadable = Counter[str](), Counter[str](), Counter[str]()
    for trace in _traces(backend, unreadable):
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


def summarise_bundle(store: WeightsStore, version: int, line: str = "") -> BundleLine:
    """Check one bundle; its manifest is shown even if another of its files is damaged.

    Args:
        line: whose versions the store has.
    """
    problem = None
    try:
        store.read(version)
    except BundleError as error:
        problem = error.problem
    try:
        manifest = store.read_manifest(version)
    except BundleError:
        return BundleLine(version, None, {}, problem, line)
    return BundleLine(manifest.version, manifest.parent, manifest.gate, problem, line)


def _traces(backend: Backend, unreadable: Counter[str]) -> Iterator[Trace]:
    reader = backend.open_record_reader()  # not a TraceReader, which keeps what it cannot decode
    while records := reader.read(64):
        for record in records:
            try:
                yield decode_trace(record.payload)
            except UnreadableRecordError as error:
                unreadable[error.reason] += 1


def _acceptance_of(trace: Trace) -> Acceptance:
    rounds = trace.rounds
    return Acceptance(
        num_steps=len(rounds),
        num_proposed=rounds.draft_ids.size,
        num_accepted=int(rounds.counts[Count.NUM_ACCEPTED].sum()),
    )


def _figure(value: Any) -> str:
    if value is None:
        return "unknown"
    return f"{value:.3f}" if isinstance(value, float) else str(value)
