"""A writer for storage that does not answer yet: opened with the first record that it lets in."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from buffer.counts import WriterCounts
from buffer.interface import Payload, TraceWriter


class LateWriter(TraceWriter):
    """Tries to open a writer whenever there are records. Until it can, it refuses them, and whoever
    appends counts them."""

    def __init__(self, open_writer: Callable[[], TraceWriter]) -> None:
        """
        Args:
            open_writer: raises OSError, or ValueError, as long as there is none.
        """
        self._open_writer = open_writer
        self._below: TraceWriter | None = None

    @property
    def name(self) -> str:
        """Empty until it is open."""
        return "" if self._below is None else self._below.name

    @property
    def counts(self) -> WriterCounts:
        return WriterCounts(0, 0, 0, 0, 0, 0) if self._below is None else self._below.counts

    def append(self, payload: Payload) -> int:
        return self._opened().append(payload)

    def append_all(self, payloads: Sequence[Payload]) -> list[OSError]:
        if not payloads:
            return []
        try:
            below = self._opened()
        except OSError as error:
            return [error] * len(payloads)
        return below.append_all(payloads)

    def sync(self) -> range:
        return range(0) if self._below is None else self._below.sync()

    def tend(self) -> range:
        return range(0) if self._below is None else self._below.tend()

    def remove(self, is_unwanted: Callable[[Payload], bool]) -> int:
        return 0 if self._below is None else self._below.remove(is_unwanted)

    def close(self) -> None:
        if self._below is not None:
            self._below.close()

    def _opened(self) -> TraceWriter:
        if self._below is None:
            try:
                self._below = self._open_writer()
            except ValueError as error:  # as that the key is another: nothing may be written
                raise OSError(str(error)) from error
        return self._below
