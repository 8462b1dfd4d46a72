"""What it costs to come back to a neural drafter after steps without it.

It must first compute the rows that were committed meanwhile, and on a GPU the host cannot launch
the round before it has read the last one. Neither is part of an ordinary step, so the first step
after others is timed apart.
"""

from __future__ import annotations

from collections.abc import Iterable

_START = 0.2
"""Cost before anything is measured, as a share of a plain step."""
_GAIN = 0.1
_MOST_SURPRISE = 1.0
"""Largest surprise that counts, in plain steps or relative to the average: a first step may be late
for any other reason, and few are seen."""
_MANY_ROWS = 64.0
"""Missing rows of a request that double the cost of catching up."""

_TAKEN_OVER = 2
"""First steps that an average taken over from others counts for at most."""


class SwitchCosts:
    """Seconds that the first step of a neural drafter takes beyond its others."""

    def __init__(self, drafters: Iterable[str]) -> None:
        self._shares = dict.fromkeys(drafters, _START)
        self._num = dict.fromkeys(self._shares, 0)

    def start_from(self, other: SwitchCosts) -> None:
        """Take over what others of the same drafters have learned; few steps outvote it."""
        self._shares = dict(other._shares)
        self._num = {kind: min(num, _TAKEN_OVER) for kind, num in other._num.items()}

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

    def seconds(self, drafter: str, pending_rows: int, batch: int, plain_s: float) -> float:
        """Predicted seconds, by the rows that the batch lacks."""
        return self._shares[drafter] * _load(pending_rows, batch) * plain_s

    def figures(self) -> dict[str, float]:
        """JSON-ready, in plain steps."""
        return {kind: round(share, 4) for kind, share in self._shares.items()}


def _load(pending_rows: int, batch: int) -> float:
    return 1 + pending_rows / batch / _MANY_ROWS
