"""How much a trainer may work beside a server that it slows down. No clocks, no I/O.

The trainer works and rests in turn, many times a second, and the server's speed is measured in
both: tokens a second while requests ran. Traffic, drafts and prompts are the same in both, so what
differs is what the trainer's work costs. If decoding is slower by ``slowdown`` while the trainer
works, and it works for the share ``duty`` of the time, serving loses ``duty * slowdown`` of its
speed, which is held at ``most``.

What is uncertain counts against the trainer, by one standard error. One that costs nothing works
all the time but for short rests in which its cost is measured again.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

_HALF_LIFE_S = 5.0
"""Of what is measured, in seconds of serving. Long enough for a hundred steps beside the
trainer at a small duty, short enough to follow the load."""
_HALF_LIFE = 16
"""The same in intervals, where these are long: half of them work, half rests."""
FIRST_SLOWDOWN = 0.5
"""Believed before anything was measured. On an H200 a trainer that never rested cost 0.42."""
_FIRST_S = 0.1
"""Seconds of serving that the first belief counts for. It fades like all that is measured."""
_RISE = 1.1
"""A duty grows by no more at a time, so that one lucky measurement costs little."""


@dataclass(slots=True)
class _Speed:
    """Tokens of intervals and the seconds that they took; old ones count less."""

    tokens: float = 0.0
    seconds: float = 0.0
    squares: tuple[float, float, float] = (0.0, 0.0, 0.0)
    """Sums of tokens^2, tokens * seconds and seconds^2 of the intervals, weighted twice."""

    def add(self, tokens: float, seconds: float) -> None:
        self.tokens += tokens
        self.seconds += seconds
        tt, ts, ss = self.squares
        self.squares = tt + tokens**2, ts + tokens * seconds, ss + seconds**2

    def fade(self, share: float) -> None:
        self.tokens *= share
        self.seconds *= share
        tt, ts, ss = self.squares
        self.squares = tt * share**2, ts * share**2, ss * share**2

    @property
    def variance(self) -> float:
        """Of the estimated speed, relative to its square, by how intervals differ."""
        if not self.tokens:
            return 0.0
        tt, ts, ss = self.squares
        speed = self.tokens / self.seconds
        return max(0.0, tt - 2 * speed * ts + speed**2 * ss) / self.tokens**2


@dataclass(slots=True)
class Sharing:
    """What is measured of one trainer and one server, and what follows."""

    most: float
    """Largest share of its speed that serving may lose, in (0, 1)."""
    working: _Speed = field(default_factory=_Speed)
    resting: _Speed = field(default_factory=_Speed)
    first_s: float = _FIRST_S
    """What is left of the first belief."""
    decided: float | None = None
    """Duty that follows from them; ``None`` while nothing was measured."""

    def __post_init__(self) -> None:
        if not 0 < self.most < 1:
            raise ValueError(f"most must be in (0, 1), got {self.most}")

    @property
    def duty(self) -> float:
        """Share of the time, in (0, 1], in which the trainer may work while requests decode."""
        return min(1.0, self.most / FIRST_SLOWDOWN) if self.decided is None else self.decided

    @property
    def slowdown(self) -> float | None:
        """Share of its speed that serving lacks while the trainer works, in [0, 1]; ``None`` while
        one of both is unknown."""
        work, rest = self.working, self.resting
        if not work.seconds or not rest.tokens:
            return None
        return min(1.0, max(0.0, 1 - work.tokens / work.seconds * rest.seconds / rest.tokens))

    @property
    def error(self) -> float:
        """Standard error of ``slowdown``."""
        left = 1 - (self.slowdown or 0.0)
        return left * math.sqrt(self.working.variance + self.resting.variance)

    @property
    def loss(self) -> float | None:
        """Share of its speed that serving has lost lately, while requests were decoding."""
        slowdown = self.slowdown
        if slowdown is None:
            return None
        return slowdown * self.working.seconds / (self.working.seconds + self.resting.seconds)

    def worked(self, tokens: float, seconds: float) -> None:
        """The trainer worked.

        Args:
            tokens: that the server committed meanwhile.
            seconds: of them, those in which requests ran.
        """
        self._add(self.working, tokens, seconds)

    def rested(self, tokens: float, seconds: float) -> None:
        """The same while it rested; then ``duty`` is what follows from all."""
        self._add(self.resting, tokens, seconds)
        slowdown = self.slowdown
        if slowdown is None:
            return
        known_s = min(self.working.seconds, self.resting.seconds)
        believed = slowdown * known_s + FIRST_SLOWDOWN * self.first_s
        believed = believed / (known_s + self.first_s) + self.error
        allowed = 1.0 if believed <= self.most else self.most / believed
        self.decided = min(allowed, _RISE * self.duty)

    def figures(self) -> dict[str, float | None]:
        """For status and journal."""
        return {"duty": self.duty, "slowdown": self.slowdown, "loss": self.loss}

    def _add(self, speed: _Speed, tokens: float, seconds: float) -> None:
        if seconds <= 0:
            return
        share = 0.5 ** min(seconds / _HALF_LIFE_S, 1 / _HALF_LIFE)
        self.working.fade(share)
        self.resting.fade(share)
        self.first_s *= share
        speed.add(tokens, seconds)
