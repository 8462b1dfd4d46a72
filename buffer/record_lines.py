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
    trace: Trace
    with_token_ids: bool
    """Show them, which are the prompt and the completion."""

    @property
    def is_damaged(self) -> bool:
        return False

    def to_line(self) -> str:
        v = self.to_json()
        versions = ",".join(map(str, v["versions"])) or "none"
        ids = f", token ids {v['token_ids']}" if self.with_token_ids else ""
        return (
            f"record {self.writer}/{self.location}: {self.num_bytes} bytes, "
            f"{v['producer']}/{v['epoch']}/{v['seq']}, tenant {v['tenant'] or '(none)'}, "
            f"domain {v['domain'] or '(none)'}, finished {v['finished']}, target {v['target']}, "
            f"tokens {v['prompt_tokens']} prompt + {v['completion_tokens']} completion, "
            f"rounds {v['rounds']}, proposed {v['proposed']}, accepted {v['accepted']}, "
            f"versions {versions}, rows {v['rows']}{ids}"
        )

    def to_json(self) -> dict[str, Any]:
        trace, rounds, features = self.trace, self.trace.rounds, self.trace.features
        values = {
            "kind": "record",
            "writer": self.writer,
            "location": self.location,
            "bytes": self.num_bytes,
            "producer": trace.producer,
            "epoch": trace.epoch,
            "seq": trace.seq,
            "tenant": trace.tenant,
            "domain": trace.domain,
            "finished": _time(trace.finished_unix_ms),
            "target": trace.target_fingerprint[:12],
            "prompt_tokens": trace.prompt_length,
            "completion_tokens": trace.token_ids.size - trace.prompt_length,
            "rounds": len(rounds),
            "proposed": rounds.draft_ids.size,
            "accepted": int(rounds.counts[Count.NUM_ACCEPTED].sum()),
            "versions": sorted(trace.versions),
            "rows": "none" if features is None else f"{features.positions.size} {features.dtype}",
        }
        return {**values, "token_ids": trace.token_ids.tolist()} if self.with_token_ids else values


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
        where = record.writer, record.location, len(record.payload)
        if isinstance(trace, UnreadableRecordError):
            yield UnreadableLine(*where, trace.reason)
        else:
            yield RecordLine(*where, trace, with_token_ids)


def _records(backend: Backend) -> Iterator[Record]:
    reader = backend.open_record_reader()
    try:
        while records := reader.read(_RECORDS_AT_ONCE):
            yield from records
    finally:
        reader.close()


def _time(unix_ms: int) -> str:
    try:
        return datetime.fromtimestamp(unix_ms / 1000, UTC).isoformat(timespec="milliseconds")
    except (ValueError, OverflowError, OSError):  # whatever a server's clock said
        return f"{unix_ms} ms"
