"""What a look at matches takes beyond what counts as planning.

While the device works, the host looks for nothing, as far as anybody sees; but it has less time for
everything else, and steps that are planned one by one leave more to do after them. So steps with a
look are compared with their neighbours without one. Where every step looks, a short stretch does
not, now and then; where looks are rare, each is compared with the steps before it. Times are those
of plain steps: what an arm takes longer is taken off.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from statistics import fmean

_WINDOW = 16
"""Steps of a stretch, with looks or without,"""
_LEAST_STEPS = 8
"""and those of which the time must be known: prompts and drafts of the index leave some out."""
_FIRST_LOOKED, _LEAST_LOOKED, _MOST_LOOKED = 32, 256, 4096
"""Steps with a look before the first stretch without, and between two of them."""
_SHARE = 0.002
"""Share of the time that stretches without looks may lose."""
_MOST_WEIGHT = 16.0
"""Stretches that the mean difference counts for at most."""
_PROOF = 2.0
"""Square of the standard errors by which steps with a look must differ from others before it
counts; beyond that it counts the more the clearer it is (James-Stein)."""
_MOST = 2.0
"""Longest time of a step that counts, relative to the expected one: more is a machine's hiccup."""
_NOISE = 0.05
"""Standard deviation of a comparison of stretches before any is made."""


class LookTime:
    """Times steps with and without looks."""

    def __init__(self) -> None:
        self._times = {looked: deque[float](maxlen=_WINDOW) for looked in (False, True)}
        """Seconds of the latest steps in a row that looked, and that did not."""
        self._before: float | None = None
        """Mean of steps with looks before the stretch without,"""
        self._blind: float | None = None
        """and that of the stretch, which steps with looks follow."""
        self._mean, self._weight, self._variance = 0.0, 0.0, _NOISE**2
        self._left = 0
        """Steps left of a stretch without looks."""
        self._num_looked, self._wanted = 0, _FIRST_LOOKED
        """Steps with looks since the last one, and those before the next one."""
        self.hidden = 0.0
        """Time by which a look lengthens a step beyond planning, in plain steps, as far as that is
        clear."""

    @property
    def is_blind(self) -> bool:
        """A stretch without looks is under way."""
        return self._left > 0

    def stepped(self, *, looks: bool, gain: Callable[[], float]) -> None:
        """A step was decided.

        Args:
            looks: it looked, because that pays at every step.
            gain: returns the time that looking saves in such a step, in plain steps.
        """
        if self._left:
            self._left -= 1
        elif looks:
            self._num_looked += 1
            if self._num_looked >= self._wanted:
                self._num_looked, self._left = 0, _WINDOW
                wanted = round(_WINDOW * max(gain(), 0.0) / _SHARE)
                self._wanted = min(max(wanted, _LEAST_LOOKED), _MOST_LOOKED)

    def note(self, seconds: float, plain_s: float, *, looked: bool, always: bool) -> None:
        """Take in a step of an arm that needs no look.

        Args:
            seconds: of the step, less what its arm takes longer than plain decoding; planning left
                out.
            plain_s: predicted seconds of a plain step.
            always: every step looks, but for such stretches.
        """
        seconds = min(max(seconds, 0.0), _MOST * plain_s)
        if not always:
            self._before = self._blind = None
            unlooked = self._times[False]
            self._times[True].clear()
            if not looked:
                unlooked.append(seconds)
            elif len(unlooked) >= _LEAST_STEPS:
                self._add((seconds - fmean(unlooked)) / plain_s, 1 / _WINDOW)
            return
        own, other = self._times[looked], self._times[not looked]
        if other:  # a stretch of the other sort has ended
            mean = fmean(other) if len(other) >= _LEAST_STEPS else None
            if looked:
                self._blind = mean
            else:
                self._before, self._blind = mean, None
            other.clear()
        own.append(seconds)
        if looked and self._before is not None and self._blind is not None:
            if len(own) < _LEAST_STEPS:
                return
            difference_s = (self._before + fmean(own)) / 2 - self._blind
            self._add(difference_s / plain_s, 1.0)
            self._before = self._blind = None

    def _add(self, difference: float, weight: float) -> None:
        surprise = difference - self._mean
        self._weight = min(self._weight + weight, _MOST_WEIGHT)
        share = weight / max(self._weight, weight)
        # At first the mean is not known, and a surprise says nothing of the scatter. That of a
        # single step does: one late look would stand for what all of them take.
        if self._weight > 2 * weight or weight < 1:
            gain = min(max(share, 0.02), 0.5)
            self._variance += gain * (surprise**2 * weight - self._variance)
        self._mean += share * surprise
        self.hidden = self._clear()

    def _clear(self) -> float:
        """The mean, as far as it is clear."""
        if self._mean <= 0:
            return 0.0
        squares = self._mean**2 * self._weight / self._variance
        return self._mean * max(1 - _PROOF / squares, 0.0) if squares else 0.0
