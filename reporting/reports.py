"""Where server and trainer put what they report. Nothing here waits, and nothing here raises."""

from __future__ import annotations

import logging
import math
import re
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from configs.schema import Settings
from reporting.catalog import asked_for, writer_kind
from reporting.channel import Channel
from reporting.records import Alert, Bundle, Cell, Figures, Greeting, Record, Row, shown

log = logging.getLogger(__name__)

OTHER = "other"
"""Domain of what ``reports.domains`` does not list."""
_UNFIT = re.compile(r"[^A-Za-z0-9_.-]")


class Reports:
    """Gives every record to all writers. Without writers it does nothing."""

    def __init__(self, channels: tuple[Channel, ...] = (), domains: tuple[str, ...] = ()) -> None:
        """
        Args:
            domains: those that may be named.
        """
        self._channels = channels
        self._domains = frozenset(domains)

    @property
    def is_on(self) -> bool:
        """Somebody writes."""
        return bool(self._channels)

    def figures(self, values: Mapping[str, float | None], unix_s: float | None = None) -> None:
        """Report figures of now; those that are unknown or not finite are left out."""
        known = {n: float(v) for n, v in values.items() if v is not None and math.isfinite(v)}
        if known:
            self._put(Figures(_now(unix_s), known))

    def row(self, table: str, cells: Mapping[str, Cell], unix_s: float | None = None) -> None:
        """Add a row to a table."""
        plain = {name: _cell(value) for name, value in cells.items()}
        self._put(Row(_now(unix_s), table, plain))

    def alert(self, title: str, text: str) -> None:
        """Tell somebody."""
        self._put(Alert(time.time(), title, text))

    def bundle(
        self, version: int, folder: Path, facts: Mapping[str, Cell], drafter: str = ""
    ) -> None:
        """Keep a published version.

        Args:
            drafter: see ``Bundle``.
        """
        self._put(Bundle(time.time(), version, str(folder), dict(facts), drafter))

    def domain(self, name: str) -> str:
        """The name under which a domain is reported. Clients choose the names of domains, so only
        those that the settings list are shown."""
        return _UNFIT.sub("_", name) if name in self._domains else OTHER

    def counts(self) -> dict[str, dict[str, int]]:
        """See ``Channel.counts``, by writer."""
        return {channel.name: channel.counts() for channel in self._channels}

    @property
    def num_lost(self) -> int:
        """Records that a writer did not get, or could not write."""
        return sum(c["dropped"] + c["failed"] for c in self.counts().values())

    def close(self, timeout_s: float) -> None:
        """Give each writer so much time for what waits."""
        for channel in self._channels:
            channel.close(timeout_s)
            counts = channel.counts()
            if counts["dropped"] or counts["failed"]:
                log.warning("reports to %s: %s", channel.name, counts)

    def _put(self, record: Record) -> None:
        for channel in self._channels:
            channel.put(record)


@contextmanager
def reports_of(settings: Settings, role: str) -> Iterator[Reports]:
    """The writers that the settings ask for, until the block ends.

    Args:
        role: ``server`` or ``trainer``.
    """
    channels = tuple(
        Channel(_greeting(settings, name, role), settings.reports.queue)
        for name in asked_for(settings)
    )
    reports = Reports(channels, settings.reports.domains)
    try:
        yield reports
    finally:
        reports.close(settings.reports.close_s)


def _greeting(settings: Settings, name: str, role: str) -> Greeting:
    return Greeting(
        writer=name,
        role=role,
        group=settings.reports.group or settings.run_dir.resolve().name,
        folder=str(settings.run_dir.resolve()),
        settings=writer_kind(name).section(settings),
        facts=shown(settings.model_dump(mode="json")),
    )


def _now(unix_s: float | None) -> float:
    return time.time() if unix_s is None else unix_s


def _cell(value: Cell) -> Cell:
    return None if isinstance(value, float) and not math.isfinite(value) else value
