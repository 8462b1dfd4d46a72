"""A running mean that forgets."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(slots=True)
class Average:
    """A mean and a variance that start exact and then move by a least gain."""

    gain: float
    num: int = 0
    mean: float = 0.0
    """At first what is believed before any value; the first one replaces it."""
    square: float = 0.0

    def add(self, value: float) -> None:
        self.num += 1
        gain = max(self.gain, 1 / self.num)
        self.mean += gain * (value - self.mean)
        self.square += gain * (value * value - self.square)

    @property
    def variance(self) -> float:
        return max(self.square - self.mean**2, 0.0)

    @property
    def weight(self) -> float:
        """Number of values that the mean is worth."""
        return min(float(self.num), 2 / self.gain)
