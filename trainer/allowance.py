"""What learning may cost a server over a window of its time, and when it may cost more at once.

A trainer beside a server may cost it ``most`` of its speed on average. Spread evenly, that is so
little that a drafter follows a shift for minutes; yet once it fits the traffic, more learning
brings nothing. So half of what is allowed is saved up while learning is not urgent and spent when
it is: after the first start, and after acceptance has fallen.

The account is in seconds of serving that learning may cost. It gains ``most / 2`` for each second
in which requests decode, holds at most what that comes to in a window, and pays what is lost. Any
window can lose no more than the largest balance and what is gained meanwhile, which together are
``most`` of the window. A burst may cost no more than ``burst`` at any moment, and there is none
while more requests run than usual. No clocks, no I/O.
"""

from __future__ import annotations

from dataclasses import dataclass, field

_STEADY = 0.5
"""Share of what is allowed that is gained all the time; the rest is the largest balance."""
_TAPER_S = 10.0
"""A burst slows down when its balance would last no longer than this: it ends smoothly, and on a
measurement that was too low, not much is overdrawn."""
_LEAST = 0.2
"""Of the steady allowance: what an empty account still allows. With less, rests would be so long
that traces are read late and a shift is noticed late."""
_CROWD = 1.5
"""More running requests than this times as many as usual are a load that has risen."""
_USUAL_S = 60.0
"""Time constant of what is usual, in seconds of serving."""


@dataclass(slots=True)
class Allowance:
    """The account of one trainer process."""

    most: float
    """Largest share of its speed that a server may lose over a window, in (0, 1)."""
    burst: float
    """The same at any moment, in [most, 1)."""
    window_s: float
    """Seconds in which requests decode, whenever these are."""
    balance_s: float = -1.0
    """Seconds of serving that may be lost; it begins with as many as there can be."""
    usual: float | None = None
    """Requests that run, on average; ``None``: unknown."""
    urgent: dict[str, str] = field(default_factory=dict)
    """Why learning is urgent, by the drafter that learns."""

    def __post_init__(self) -> None:
        if not 0 < self.most <= self.burst < 1:
            raise ValueError(
                f"burst must be at least most and below 1, got {self.burst} with most {self.most}"
            )
        if self.balance_s < 0:
            self.balance_s = self.largest_s

    @property
    def steady(self) -> float:
        """Share of its speed that serving may lose all the time."""
        return self.most * _STEADY

    @property
    def largest_s(self) -> float:
        """The balance grows no further."""
        return (self.most - self.steady) * self.window_s

    def share(self, running: int) -> float:
        """Share of its speed that serving may lose now, while so many requests run."""
        is_crowded = self.usual is not None and running > _CROWD * self.usual + 1
        if self.urgent and not is_crowded:
            return min(self.burst, max(self.least, self.steady + self.balance_s / _TAPER_S))
        filled = min(1.0, max(0.0, self.balance_s / self.largest_s))
        return max(self.least, self.steady * filled)

    @property
    def least(self) -> float:
        """The smallest share."""
        return self.steady * _LEAST

    def served(self, seconds: float, running: int, lost_s: float) -> None:
        """
        Args:
            seconds: for which requests decoded.
            running: so many of them.
            lost_s: of these seconds, what the trainer's work cost.
        """
        if seconds <= 0:
            return
        self.balance_s = min(self.largest_s, self.balance_s + self.steady * seconds - lost_s)
        share = min(1.0, seconds / _USUAL_S)
        usual = running if self.usual is None else self.usual
        self.usual = usual + share * (running - usual)

    def empty(self) -> None:
        """What was lost before is unknown: begin with nothing."""
        self.balance_s = 0.0

    def hurry(self, drafter: str, why: str) -> None:
        """What this drafter learns now pays back soon."""
        self.urgent[drafter] = why

    def calm(self, drafter: str) -> None:
        """This drafter has nothing more to learn that is urgent."""
        self.urgent.pop(drafter, None)

    def figures(self) -> dict[str, float | str | None]:
        """For status and journal."""
        return {
            "balance_s": self.balance_s,
            "largest_s": self.largest_s,
            "urgent": "; ".join(sorted(set(self.urgent.values()))) or None,
        }
