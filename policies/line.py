"""A line through scattered values that forgets, for what one more of something takes."""

from __future__ import annotations

_GAIN = 0.002
_PRIOR_SPREAD = 20.0
"""Sum of squared distances that the prior of the slope is worth."""


class Line:
    """Least squares of y on x, each value counting a little less than the one after it."""

    def __init__(self) -> None:
        self._weight = self._x = self._y = self._xx = self._xy = 0.0

    def add(self, x: float, y: float) -> None:
        """Take in a value."""
        keep = 1 - _GAIN
        self._weight = keep * self._weight + 1
        gain = 1 / self._weight
        before = x - self._x
        self._x += gain * before
        self._y += gain * (y - self._y)
        self._xx = keep * self._xx + before * (x - self._x)
        self._xy = keep * self._xy + before * (y - self._y)

    def slope(self, prior: float) -> float:
        """What one more takes, at least 0.

        Args:
            prior: what is believed before any value.
        """
        return max((self._xy + _PRIOR_SPREAD * prior) / (self._xx + _PRIOR_SPREAD), 0.0)
