"""Where the wall time of a trainer's loop goes, so that an operator sees what bounds learning."""

from __future__ import annotations

import contextlib
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Literal, get_args

WINDOW_S = 10.0
"""Seconds that the shares are over."""

Part = Literal[
    "updates", "taking_in", "judging", "publishing", "checkpoints", "reporting", "resting",
    "waiting", "other",
]  # fmt: skip
"""What the loop's thread does. ``updates``: draws and launches them, and waits while it is too far
ahead of the device. ``taking_in``: moves traces into memory. ``judging``, ``publishing`` and
``checkpoints`` are what keeps updates from going on; what is done beside them does not count.
``reporting``: writes status and journal. ``resting``: leaves the device to a server, see
``trainer.duty``. ``waiting``: for traces."""
PARTS: tuple[Part, ...] = get_args(Part)


@dataclass(slots=True)
class Times:
    """Seconds by part, each counted once: a part within another one is not counted as that."""

    clock: Callable[[], float] = time.monotonic
    seconds: Counter[Part] = field(default_factory=Counter)
    """Of the window that is not full yet."""
    now: Part = "other"
    since_s: float = field(init=False)
    """Time at which ``now`` began, or the window."""
    shares: dict[Part, float] = field(default_factory=dict)
    """Of the last full window; empty before its end."""

    def __post_init__(self) -> None:
        self.since_s = self.clock()

    @contextlib.contextmanager
    def during(self, part: Part) -> Iterator[None]:
        """The loop does this."""
        before, self.now = self._switched(), part
        try:
            yield
        finally:
            self._switched()
            self.now = before

    def figures(self) -> dict[Part, float]:
        """Shares of the last ``WINDOW_S`` seconds and more by part, which sum to 1; over the
        beginning while there is no full window."""
        self._switched()
        return dict(self.shares or self._shares())

    def _switched(self) -> Part:
        """Count what was done until now; returns what that was."""
        now_s = self.clock()
        self.seconds[self.now] += now_s - self.since_s  # type: ignore[assignment]
        self.since_s = now_s
        if self.seconds.total() >= WINDOW_S:
            self.shares = self._shares()
            self.seconds.clear()
        return self.now

    def _shares(self) -> dict[Part, float]:
        total = self.seconds.total()
        return {part: self.seconds[part] / total if total else 0.0 for part in PARTS}
