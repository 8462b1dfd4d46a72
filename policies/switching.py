"""What it costs to come back to a drafter on the device after steps without it.

It must first compute the rows that were committed meanwhile, and on a GPU the host cannot launch
the round before it has read the last one. Neither is part of an ordinary step, so the first step
after others is timed apart.

It may also have to catch up although it drafted in the step before: where a watch goes back to
former weights, all rows are computed again. That belongs to the exchange of weights and not to a
step of drafting. Booked as the time of its draft, it would make drafts seem as dear as the few
steps between two exchanges; so it is spread over all steps of the server, drafted or not.

The first steps at another K may take longer than those that repeat it. As the time of that K they
would make every K seem dearer than the one in use. Whether they do is seen where the one in use
comes back; then they are timed apart, and a stretch of another K pays for changing there and back.
"""

from __future__ import annotations

from collections.abc import Iterable

from policies.average import Average

_START = 0.2
"""Cost before anything is measured, as a share of a plain step."""
_GAIN = 0.1
_MOST_SURPRISE = 1.0
"""Largest surprise that counts, in plain steps or relative to the average: a first step may be late
for any other reason, and few are seen."""
_MANY_ROWS = 64.0
"""Missing rows of a request that double the cost of catching up."""

FEW_ROWS = 8
"""Missing rows of a request that cost a drafter no more than any other first step."""
_FORCED_GAIN = 0.001
"""Gain, in steps, of the average of what catching up takes that no decision has caused."""
_MOST_FORCED = 64.0
"""Most of it that one step counts, in plain steps."""
_TAKEN_OVER = 2
"""First steps that an average taken over from others counts for at most."""


FRESH_STEPS = 2
"""Steps of a drafter at another K than before that are timed apart where they take longer: what
repeats is faster (K = 5 alone took 3.0 ms on an H200 and K = 3 in a row 2.0)."""
_FRESH_GAIN = 0.02
_PROOF = 4.0
"""Square of the standard errors by which these must take longer before it counts; beyond that it
counts the more the clearer it is (James-Stein)."""


class SwitchCosts:
    """Seconds that the first step of a drafter on the device takes beyond its others."""

    def __init__(self, drafters: Iterable[str]) -> None:
        self._shares = dict.fromkeys(drafters, _START)
        self._num = dict.fromkeys(self._shares, 0)
        self._forced, self._steps_since = 0.0, 0
        """That average as it was so many steps ago."""
        self._fresh = {kind: Average(_FRESH_GAIN) for kind in self._shares}
        """What a first step at another K takes longer, in plain steps."""

    def start_from(self, other: SwitchCosts) -> None:
        """Take over what others of the same drafters have learned; few steps outvote it."""
        self._shares = dict(other._shares)
        self._num = {kind: min(num, _TAKEN_OVER) for kind, num in other._num.items()}
        self._forced, self._steps_since = other.forced, 0

    def observe(
        self, drafter: str, excess_s: float, pending_rows: int, batch: int, plain_s: float
    ) -> None:
        """Take in a first step.

        Args:
            excess_s: its seconds beyond those predicted for an ordinary step.
            pending_rows: rows that the batch lacked.
            plain_s: seconds of a plain step at this batch.
        """
        share = self._shares[drafter]
        self._num[drafter] += 1
        gain = max(_GAIN, 1 / (self._num[drafter] + 1))
        most = _MOST_SURPRISE * max(1.0, share)
        surprise = excess_s / (plain_s * _load(pending_rows, batch)) - share
        self._shares[drafter] = max(0.0, share + gain * min(surprise, most))

    def observe_fresh(self, drafter: str, excess_s: float, plain_s: float) -> None:
        """Take in one of the first steps of a drafter at another K.

        Args:
            excess_s: its seconds beyond those predicted for one that repeats it.
            plain_s: seconds of a plain step at this batch.
        """
        most = _MOST_SURPRISE
        self._fresh[drafter].add(min(max(excess_s / plain_s, -most), most))

    def fresh(self, drafter: str) -> float:
        """Time that a stretch of another K takes to begin and to end, in plain steps, as far as
        that is clear; otherwise 0."""
        own = self._fresh.get(drafter)
        if own is None or own.mean <= 0:
            return 0.0
        squares = own.mean**2 * own.weight / max(own.variance, 1e-9)
        return 2 * FRESH_STEPS * own.mean * max(1 - _PROOF / squares, 0.0)

    def stepped(self, num_steps: int = 1) -> None:
        """Steps have ended."""
        self._steps_since += num_steps

    def observe_forced(self, excess_s: float, plain_s: float) -> None:
        """Take in a step that had to catch up although its drafter drafted in the one before.

        Args:
            excess_s: its seconds beyond those predicted for an ordinary step.
            plain_s: seconds of a plain step at this batch.
        """
        excess = min(max(excess_s / plain_s, 0.0), _MOST_FORCED)
        self._forced, self._steps_since = self.forced + _FORCED_GAIN * excess, 0

    @property
    def forced(self) -> float:
        """Mean time in each step that catching up took and no decision has caused, in plain
        steps."""
        return self._forced * (1 - _FORCED_GAIN) ** self._steps_since

    def seconds(self, drafter: str, pending_rows: int, batch: int, plain_s: float) -> float:
        """Predicted seconds, by the rows that the batch lacks; 0 for plain decoding."""
        return self._shares.get(drafter, 0.0) * _load(pending_rows, batch) * plain_s

    def figures(self) -> dict[str, float]:
        """JSON-ready, in plain steps."""
        return {kind: round(share, 4) for kind, share in self._shares.items()}


def _load(pending_rows: int, batch: int) -> float:
    return 1 + pending_rows / batch / _MANY_ROWS
