"""What plain decoding would bring if an index were asked at every step: a rival of neural drafters.

While a drafter is the base, an index interrupts it only where one step gains more than coming back
to the drafter costs. Text that repeats itself may be decoded twice as fast by plain steps with an
index, although no single step of the index pays beside the drafter. So every look at matches, made
beside plain steps or beside drafts, planned for or not, also tells what a plain step would have
done with it, by what is known of the index.
"""

from __future__ import annotations

from collections import deque
from typing import NamedTuple

import numpy as np

from policies.drafter_acceptance import Floats

_MOST_LOOKS = 128
"""Looks that are remembered."""
_SPACED_GAIN, _DENSE_GAIN = 0.05, 0.01
"""Weight of a new look: of one made now and then, and of one that follows another at once."""
_LEAST_ROWS = 24
"""Requests that must have been looked at before the rival is believed: a match is luck."""


class Look(NamedTuple):
    """What one look found, and when it was made."""

    rows: Floats
    """[B] by kind of match."""
    batch: int
    is_dense: bool
    """The step before looked, too."""
    is_plain: bool
    """Plain decoding was the base."""
    is_planned: bool
    """A plan was made of it; otherwise a glance was enough."""


class IndexAlone:
    """Tokens and time of plain decoding with an index, per request and in plain steps.

    The latest looks are kept and appraised again whenever more is known of the index: what is
    believed of it before it has drafted may be far off.
    """

    def __init__(self) -> None:
        self.pending: list[Look] = []
        """Looks that nothing was learned from yet."""
        self._seen: deque[Floats] = deque(maxlen=_MOST_LOOKS)
        """[B] share of rows by kind of match, of the latest looks,"""
        self._gains: deque[float] = deque(maxlen=_MOST_LOOKS)
        """and the share of the weight that each of them has taken from those before it."""
        self._num_rows = 0
        self._arms: tuple[Floats, Floats] | None = None
        self._is_due = False
        """They are not appraised yet."""
        self._tokens = self._steps = 1.0

    def note(self, rows: Floats, batch: int, *, is_dense: bool) -> float:
        """Take in a look.

        Args:
            rows: [B] by kind of match.
            is_dense: the step before looked, too.

        Returns:
            Plain steps' worth of time that the look would have saved beside plain decoding.
        """
        self.appraise()
        shares = rows / batch
        self._seen.append(shares)
        self._gains.append(_DENSE_GAIN if is_dense else _SPACED_GAIN)
        self._num_rows += batch
        if self._arms is None:
            return 0.0
        (tokens, steps), speed = self._arms, self._tokens / self._steps
        gain = float((shares @ tokens - steps * speed).max()) - (1.0 - speed)
        return max(gain, 0.0) / speed

    def learn(self, tokens: Floats, steps: Floats) -> None:
        """Take in what is known of the arms of drafters that need matches.

        Args:
            tokens: [B, A] expected tokens of a row, by kind of match.
            steps: [A] time of a step, in plain steps.
        """
        self._arms, self._is_due = (tokens, steps), True

    def appraise(self) -> None:
        """Work out what the looks would have brought with these arms, unless that is done. It takes
        as long as a plan, and is best called while the device works."""
        if not self._is_due or self._arms is None or not self._seen:
            return
        self._is_due, (tokens, steps) = False, self._arms
        gains = np.array(self._gains)
        left = np.concatenate(([1.0], 1 - gains[:0:-1])).cumprod()[::-1]
        weights = gains * left / (gains @ left)
        each = np.array(self._seen) @ tokens
        speed = self._tokens / self._steps
        values = each - steps * speed
        best = values.argmax(axis=1)
        looks = np.arange(len(best))
        pays = weights * (values[looks, best] > 1.0 - speed)
        self._tokens = 1.0 + float(pays @ (each[looks, best] - 1.0))
        self._steps = 1.0 + float(pays @ (steps[best] - 1.0))

    def lead(self, cost: float) -> float:
        """Speed relative to plain decoding alone; 1 while too few requests were looked at.

        Args:
            cost: time of a look at every step, in plain steps.
        """
        if self._num_rows < _LEAST_ROWS:
            return 1.0
        self.appraise()
        return max(self._tokens / (self._steps + cost), 1.0)
