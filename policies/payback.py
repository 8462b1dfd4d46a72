"""Whether learning earns back what it takes: seconds spent on it against seconds that it saves in
serving. No clocks, no I/O.

``saved_s`` is what drafting has saved against plain decoding; a drafter that never learns saves,
too. What *learning* has saved is the part that the version learning began from would not have: with
``gain``, the speed of the published version relative to that one on the same held-out traces, it is
``(gain - 1)`` times the time that serving took.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(slots=True)
class Payback:
    """The account of one trainer."""

    within_s: float | None
    """Time in which learning must earn back what it took; ``None``: it need not."""
    spent_s: float = 0.0
    """Seconds that learning has taken: updates, and judging candidates."""
    decode_s: float = 0.0
    """Seconds of serving seen in traces."""
    saved_s: float = 0.0
    """Those that drafting has saved, against plain decoding."""
    earned_s: float = 0.0
    """Those that learning has saved."""
    gain: float | None = None
    """Speed of the published version relative to the one that learning began from; ``None`` while
    unknown."""
    window_s: float = 0.0
    """Age of the present window."""
    window_spent_s: float = 0.0
    window_earned_s: float = 0.0

    def spend(self, seconds: float) -> None:
        """Learning took so long."""
        self.spent_s += seconds
        self.window_spent_s += seconds

    def serve(self, decode_s: float, plain_s: float, own_s: float) -> None:
        """Serving took ``decode_s``, ``own_s`` of it with drafts of the drafter that learns, and
        plain decoding would have taken ``plain_s``."""
        earned_s = 0.0 if self.gain is None else (self.gain - 1) * own_s
        self.decode_s += decode_s
        self.saved_s += plain_s - decode_s
        self.earned_s += earned_s
        self.window_earned_s += earned_s

    def passed(self, seconds: float) -> bool:
        """So much time went by while the trainer was not paused. True once a window is over in
        which learning has not earned what it took; then the next window begins. A window begins
        with the first work in it: waiting for traces costs nothing that could be earned back."""
        if not self.window_spent_s:
            self.begin()
            return False
        self.window_s += seconds
        if self.within_s is None or self.window_s < self.within_s:
            return False
        fails = self.window_spent_s > self.window_earned_s
        self.begin()
        return fails

    def begin(self) -> None:
        """Begin a new window."""
        self.window_s = self.window_spent_s = self.window_earned_s = 0.0

    @property
    def ratio(self) -> float | None:
        """Earned / spent; ``None`` before anything was spent or what is earned is known."""
        return None if self.gain is None or not self.spent_s else self.earned_s / self.spent_s

    def figures(self) -> dict[str, float | None]:
        """For status and reports."""
        return {
            "spent_s": self.spent_s,
            "saved_s": self.saved_s,
            "saved_by_learning_s": None if self.gain is None else self.earned_s,
            "ratio": self.ratio,
        }

    def to_json(self) -> dict[str, Any]:
        """What a restart must remember."""
        return {
            name: getattr(self, name)
            for name in ("spent_s", "decode_s", "saved_s", "earned_s", "gain")
        }

    def restore(self, stored: dict[str, Any]) -> None:
        """Become what ``to_json`` described."""
        for name in self.to_json():
            setattr(self, name, stored.get(name, getattr(self, name)))
