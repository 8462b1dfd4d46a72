"""Whether acceptance has fallen since a version came into use, by domain. No clocks, no I/O.

Only whether the first draft token of a round was kept counts, which does not depend on K. Surprises
are summed by CUSUM (``policies.cusum``), trace by trace, because rounds of one request are alike:
the variance of traces is learned on the way.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from policies.cusum import LIMIT, Cusum

_REFERENCE_ROUNDS = 1000
"""Rounds of a domain from which its usual acceptance is taken."""
_MOST_DOMAINS = 32
"""Domains watched one by one; clients name them, so further ones are watched together."""


@dataclass(slots=True)
class _Domain:
    """One domain."""

    rounds: int = 0
    kept: int = 0
    cusum: Cusum = field(default_factory=Cusum)

    @property
    def is_known(self) -> bool:
        return self.rounds >= _REFERENCE_ROUNDS

    @property
    def rate(self) -> float:
        return self.kept / self.rounds


@dataclass(slots=True)
class DriftWatch:
    """Watches the acceptance of one version."""

    version: int | None = None
    domains: dict[str, _Domain] = field(default_factory=dict)
    num_alarms: int = 0

    def observe(self, domain: str, version: int, rounds: int, kept: int) -> bool:
        """Take in one trace.

        Args:
            version: newest one that drafted in it. Traces of older ones say nothing; a newer one
                begins anew.
            rounds: those in which it drafted.
            kept: those of them whose first token was accepted.

        Returns:
            Acceptance has fallen: an alarm, after which that domain's usual acceptance is taken
            anew.
        """
        if rounds == 0 or (self.version is not None and version < self.version):
            return False
        if version != self.version:
            self.version, self.domains = version, {}
        one = self._domain(domain)
        usual = one.rate if one.is_known else self._usual(domain)
        if usual is not None:
            surprise = kept - usual * rounds
            if one.cusum.notices_shift(surprise, rounds):
                fell = surprise < 0
                self.num_alarms += fell
                one.rounds = one.kept = 0
                return fell
        if not one.is_known:
            one.rounds, one.kept = one.rounds + rounds, one.kept + kept
        return False

    @property
    def level(self) -> float:
        """Largest evidence over the domains, as a share of what starts an alarm; 0 to 1."""
        return max((one.cusum.below / LIMIT for one in self.domains.values()), default=0.0)

    def figures(self) -> dict[str, Any]:
        """For the status."""
        return {"level": self.level, "alarms": self.num_alarms, "version": self.version}

    def _domain(self, name: str) -> _Domain:
        if name not in self.domains and len(self.domains) >= _MOST_DOMAINS:
            name = ""
        return self.domains.setdefault(name, _Domain())

    def _usual(self, domain: str) -> float | None:
        """What a new domain is held against: the acceptance of the others."""
        known = [d for name, d in self.domains.items() if d.is_known and name != domain]
        rounds = sum(d.rounds for d in known)
        return sum(d.kept for d in known) / rounds if rounds else None
