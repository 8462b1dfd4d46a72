"""Work of start-up that goes on beside the main thread, such as importing torch."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Generic, TypeVar

from configs.phases import took

ResultT = TypeVar("ResultT")


class Ahead(threading.Thread, Generic[ResultT]):
    """Begins some work at once. The process does not end before the work has: a library that is
    being loaded cannot be cut off."""

    def __init__(self, what: str, work: Callable[[], ResultT]) -> None:
        """
        Args:
            what: name of the work for the log, which says how long it took.
        """
        super().__init__(name=what)
        self._what = what
        self._work = work
        self._done: list[ResultT] = []
        self._error: BaseException | None = None
        self.start()

    def run(self) -> None:
        started_s = time.perf_counter()
        try:
            self._done.append(self._work())
        except BaseException as error:  # raised by ``result``
            self._error = error
        took(f"beside, {self._what}", time.perf_counter() - started_s)

    def result(self) -> ResultT:
        """Wait until it is done.

        Raises:
            BaseException: what the work raised.
        """
        self.join()
        if self._error is not None:
            raise self._error
        return self._done[0]
