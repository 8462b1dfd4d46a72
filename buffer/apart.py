"""Backends that hold versions of the drafter alone, and leave traces to another buffer."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from pathlib import Path

from buffer.backends import open_backend
from buffer.counts import BufferStats
from buffer.deletions import Deleted, Deletions
from buffer.interface import (
    Backend,
    Location,
    Offsets,
    Payload,
    RecordReader,
    Report,
    TraceLimits,
    TraceWriter,
    Unreadable,
)

_OPTION = "traces="


class WeightsApart(Backend):
    """A buffer whose traces are in the one that ``?traces=URL`` names, by default ``log:``.

    A subclass says where versions are.
    """

    def __init__(self, url: str, run_dir: Path) -> None:
        self._place, traces = split_url(url)
        self._run_dir = run_dir
        self._traces = open_backend(traces, run_dir)

    @property
    def spool_bytes(self) -> int | None:
        return self._traces.spool_bytes

    @property
    def run(self) -> str | None:
        return self._traces.run

    @property
    def ends_with_process(self) -> bool:
        return self._traces.ends_with_process

    def open_trace_writer(self, limits: TraceLimits) -> TraceWriter:
        return self._traces.open_trace_writer(limits)

    def open_record_reader(
        self, offsets: Offsets | None = None, group: str | None = None
    ) -> RecordReader:
        return self._traces.open_record_reader(offsets, group)

    def fetch(self, locations: Collection[Location]) -> dict[Location, Payload] | None:
        return self._traces.fetch(locations)

    def keep_unreadable(self, name: str, payload: Payload) -> None:
        self._traces.keep_unreadable(name, payload)

    def unreadable(self) -> Iterable[Unreadable]:
        return self._traces.unreadable()

    def delete(self, tenant: str, *, until_ms: int | None = None) -> Deleted:
        return self._traces.delete(tenant, until_ms=until_ms)

    def undelete(self, digest: str) -> bool:
        return self._traces.undelete(digest)

    def deletions(self) -> Deletions:
        return self._traces.deletions()

    def expire(self, limits: TraceLimits) -> None:
        self._traces.expire(limits)

    def stats(self) -> BufferStats:
        return self._traces.stats()

    def reports(self, limits: TraceLimits) -> Iterable[Report]:
        return self._traces.reports(limits)


def split_url(url: str) -> tuple[str, str]:
    """What a URL says of versions, without its scheme, and the URL of the buffer of traces.

    ``traces=`` takes the whole rest, so that this may have options of its own.

    Raises:
        ValueError: there is another option.
    """
    place, mark, query = url.partition("?")
    scheme, _, rest = place.partition(":")
    if mark and (not query.startswith(_OPTION) or query == _OPTION):
        # Never the URL itself: that of the traces may hold a password.
        raise ValueError(
            f"buffer.url begins with '{scheme}:', so behind its '?' there may be traces=URL alone: "
            f"the buffer of the traces, with options of its own"
        )
    return rest, query.removeprefix(_OPTION) or "log:"
