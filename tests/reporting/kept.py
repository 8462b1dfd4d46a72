"""A sink of reports that keeps them."""

from __future__ import annotations

from typing import Any

from reporting.records import Record
from reporting.reports import Reports


class Kept(Reports):
    """Keeps all records, as a writer would get them."""

    def __init__(self) -> None:
        super().__init__()
        self.records: list[Record] = []

    def _put(self, record: Record) -> None:
        self.records.append(record)

    def of(self, kind: type) -> list[Any]:
        """Records of one kind."""
        return [one for one in self.records if isinstance(one, kind)]
