"""How much more a drafter's rounds scatter than independent ones would.

The rounds of one request resemble each other: a hundred of them say little more of the traffic than
ten of as many requests. A mean over n rounds is then as uncertain as one over n / f independent
ones, where f, the design effect (Kish 1965), is measured: the square of what blocks of steps, about
as long as requests, keep beyond what was expected, relative to its variance if every round were
drawn anew.
"""

from __future__ import annotations

from dataclasses import dataclass

_BLOCK_STEPS = 64
"""Steps of a block."""
_START, _START_BLOCKS = 6.0, 4.0
"""Design effect before anything is measured, and the blocks that this counts for."""
_GAIN = 0.02
_MOST = 50.0
"""Largest square that counts: more is a change of the traffic."""


@dataclass(slots=True)
class Dispersion:
    """The design effect of one drafter's rounds, by their first positions."""

    factor: float = _START
    _num_blocks: float = _START_BLOCKS
    _rounds: float = 0.0
    _excess: float = 0.0
    """First positions kept in this block, less those expected."""
    _variance: float = 0.0

    def observe(self, reached: float, accepted: float, hazard: float, batch: int) -> None:
        """Take in the rounds of some steps.

        Args:
            reached: rounds that verified a first position.
            accepted: those that kept it.
            hazard: what was expected of each.
            batch: requests in a step.
        """
        self._rounds += reached
        self._excess += accepted - reached * hazard
        self._variance += reached * hazard * (1 - hazard)
        if self._rounds < _BLOCK_STEPS * batch:
            return
        square = min(self._excess**2 / max(self._variance, 1.0), _MOST)
        self._num_blocks += 1
        self.factor += max(1 / self._num_blocks, _GAIN) * (square - self.factor)
        self._rounds = self._excess = self._variance = 0.0
