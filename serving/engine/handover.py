"""Puts off what the engine's thread need not do before it launches the next round."""

from __future__ import annotations

from collections.abc import Callable


class Handover:
    """Calls that wait until the engine's thread is about to wait for the device or to sleep.

    Outputs of a step leave the engine's process this way: in one piece, and at a time when the
    device has work. All methods are for the engine's thread.
    """

    def __init__(self) -> None:
        self._calls: list[Callable[[], None]] = []

    def put_off(self, call: Callable[[], None]) -> None:
        """Call it once, soon. It must return at once."""
        self._calls.append(call)

    def run(self) -> None:
        """Do all that was put off."""
        while self._calls:  # one that fails takes none of the others with it
            self._calls.pop()()
