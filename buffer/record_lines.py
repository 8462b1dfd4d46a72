"""Lines of ``buffer inspect`` for single records, and for those that were put aside."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from itertools import islice
from typing import Any

from buffer.codec import UnreadableRecordError, decode_traces
from buffer.interface import Backend, Record, Report, Unreadable
from buffer.records import Count, Trace

_RECORDS_AT_ONCE = 8


@dataclass(frozen=True, slots=True)
class RecordLine(Report):
    """What is known of one trace besides its content."""

    writer: str
    location: str
    num_bytes: int
    producer: str
    epoch: int
    seq: int
    tenant: str
    domain: str
    finished: str
    """ISO 8601, UTC."""
    target: str
    """First digits of the target's fingerprint."""
    prompt_tokens: int
    completion_tokens: int
    rounds: int
    proposed: int
    accepted: int
    versions: tuple[int, ...]
    """Of the drafters of its rounds."""
    rows: str
    """Number and dtype of its hidden rows."""
    token_ids: tuple[int, ...] | None
    """``None`` unless asked for: they are the prompt and the completion."""

    @property
    def is_damaged(self) -> bool:
        return False

    def to_line(self) -> str:
        versions = ",".join(map(str, self.versions)) or "none"
        ids = "" if self.token_ids is None else f", token ids {list(self.token_ids)}"
        return (
            f"record {self.writer}/{self.location}: {self.num_bytes} bytes, "
            f"{self.producer}/{self.epoch}/{self.seq}, tenant {self.tenant or '(none)'}, "
            f"domain {self.domain or '(none)'}, finished {self.finished}, target {self.target}, "
            f"tokens {self.prompt_tokens} prompt + {self.completion_tokens} completion, "
            f"rounds {self.rounds}, proposed {self.proposed}, accepted {self.accepted}, "
            f"versions {versions}, rows {self.rows}{ids}"
        )

    def to_json(self) -> dict[str, Any]:
        values = asdict(self)
        if self.token_ids is None:
            del values["token_ids"]
        return {"kind": "record", **values}


@dataclass(frozen=True, slots=True)
class UnreadableLine(Report):
    """One record that is no trace."""

    writer: str
    location: str
    num_bytes: int
    reason: str

    @property
    def is_damaged(self) -> bool:
        return True

    def to_line(self) -> str:
        return (
            f"record {self.writer}/{self.location}: {self.num_bytes} bytes, "
            f"UNREADABLE: {self.reason}"
        )

    def to_json(self) -> dict[str, Any]:
        return {"kind": "unreadable", **asdict(self)}


@dataclass(frozen=True, slots=True)
class QuarantineLine(Report):
    """The records that readers have put aside."""

    records: tuple[Unreadable, ...]
    with_names: bool

    @property
    def is_damaged(self) -> bool:
        return False  # a trainer has counted them

    def to_line(self) -> str:
        num_bytes = sum(one.num_bytes for one in self.records)
        names = ": " + ", ".join(f"{one.name} ({one.num_bytes} bytes)" for one in self.records)
        return (
            f"quarantine: {len(self.records)} records, {num_bytes} bytes"
            f"{names if self.with_names else ''}"
        )

    def to_json(self) -> dict[str, Any]:
        names = [asdict(one) for one in self.records] if self.with_names else None
        num_bytes = sum(one.num_bytes for one in self.records)
        line = {"kind": "quarantine", "records": len(self.records), "bytes": num_bytes}
        return line if names is None else {**line, "names": names}


def record_lines(backend: Backend, most: int | None, with_token_ids: bool) -> Iterator[Report]:
    """A line for each record, oldest first; the offsets of other readers do not move.

    Args:
        most: number of records; ``None``: all.
        with_token_ids: also show prompts and completions.
    """
    for record in islice(_records(backend), most):
        [trace] = decode_traces([record.payload])
        if isinstance(trace, UnreadableRecordError):
            num_bytes = len(record.payload)
            yield UnreadableLine(record.writer, record.location, num_bytes, trace.reason)
        else:
            yield _line_of(record, trace, with_token_ids)


def _records(backend: Backend) -> Iterator[Record]:
    reader = backend.open_record_reader()
    try:
        while records := reader.read(_RECORDS_AT_ONCE):
            yield from records
    finally:
        reader.close()


def _line_of(record: Record, trace: Trace, with_token_ids: bool) -> RecordLine:
    features, rounds = trace.features, trace.rounds
    return RecordLine(
        writer=record.writer,
        location=record.location,
        num_bytes=len(record.payload),
        producer=trace.producer,
        epoch=trace.epoch,
        seq=trace.seq,
        tenant=trace.tenant,
        domain=trace.domain,
        finished=_time(trace.finished_unix_ms),
        target=trace.target_fingerprint[:12],
        prompt_tokens=trace.prompt_length,
        completion_tokens=trace.token_ids.size - trace.prompt_length,
        rounds=len(rounds),
        proposed=rounds.draft_ids.size,
        accepted=int(rounds.counts[Count.NUM_ACCEPTED].sum()),
        versions=tuple(sorted(trace.versions)),
        rows="none" if features is None else f"{features.positions.size} {features.dtype}",
        token_ids=tuple(trace.token_ids.tolist()) if with_token_ids else None,
    )


def _time(unix_ms: int) -> str:
    try:
        return datetime.fromtimestamp(unix_ms / 1000, UTC).isoformat(timespec="milliseconds")
    except (ValueError, OverflowError, OSError):  # whatever a server's clock said
        return f"{unix_ms} ms"
