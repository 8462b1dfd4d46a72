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


_FIRST = 5
"""Values of which a ``Typical`` takes the median."""
_MOST = 3.0
"""Largest value that counts, relative to the mean: more is a machine's hiccup."""


class Typical:
    """A running mean that a first value, or a late one, of another size does not spoil."""

    def __init__(self, gain: float) -> None:
        self._average = Average(gain)
        self._first: list[float] = []
        """The first values, as long as they are few."""

    @property
    def num(self) -> int:
        return len(self._first) or self._average.num

    @property
    def mean(self) -> float:
        """0 without values; of few, the median, of two the smaller one."""
        if not self._first:
            return self._average.mean
        return sorted(self._first)[(len(self._first) - 1) // 2]

    def add(self, value: float) -> None:
        if self._average.num:
            self._average.add(
                min(value, _MOST * self._average.mean) if self._average.mean else value
            )
            return
        self._first.append(value)
        if len(self._first) == _FIRST:
            usual = self.mean
            for one in self._first:
                self._average.add(min(one, _MOST * usual) if usual else one)
            self._first = []
