"""Splits the time of a round that runs synchronously between drafting and the rest."""

from __future__ import annotations

import time


class Stopwatch:
    """Splits the time of a round that runs synchronously, on a CPU."""

    def __init__(self) -> None:
        self._last_s = time.perf_counter()
        self._draft_s = self._rest_s = 0.0

    def count_drafting(self) -> None:
        """The time since the last count was spent on drafting."""
        self._draft_s += self._lap()

    def count_rest(self) -> None:
        """The time since the last count was spent on verification."""
        self._rest_s += self._lap()

    def draft_share(self) -> float:
        return self._draft_s / (self._draft_s + self._rest_s)

    def _lap(self) -> float:
        now_s = time.perf_counter()
        lap_s, self._last_s = now_s - self._last_s, now_s
        return lap_s
