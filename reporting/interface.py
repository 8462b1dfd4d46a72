"""What a writer is. It runs in a process of its own, so it may wait, and it may fail."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from configs.schema import Settings
from reporting.records import Alert, Bundle, Figures, Greeting, Row


class Writer(Protocol):
    """Writes records somewhere, in the order in which they come. Any method may raise: that record
    is counted as failed, and the next one is tried."""

    def figures(self, record: Figures) -> None:
        """Write figures, each a point of a curve over time."""
        ...

    def row(self, record: Row) -> None:
        """Add a row to a table."""
        ...

    def alert(self, record: Alert) -> None:
        """Tell somebody."""
        ...

    def bundle(self, record: Bundle) -> None:
        """Keep a version. One that was pruned meanwhile is an ``OSError``."""
        ...

    def close(self) -> None:
        """Write what is held back, and end."""
        ...


@dataclass(frozen=True, slots=True)
class WriterKind:
    """A writer in the catalog. Its module is imported by everybody, so it imports the packages of
    its extra only where ``open`` is called."""

    extra: str
    """Extra of our package that it needs."""
    module: str
    """Module of that extra; if it cannot be found, the extra is not installed."""
    asked_by: Callable[[Settings], str | None]
    """The setting that asks for this writer, with its value, as text; ``None`` if none does."""
    section: Callable[[Settings], dict[str, object]]
    """Its section of the settings, for ``Greeting``."""
    open: Callable[[Greeting], Writer]
    """A writer. Called in the writer's own process; whatever it raises ends that process."""
    where: Callable[[Settings], str | None]
    """How to look at what it writes, in words."""
