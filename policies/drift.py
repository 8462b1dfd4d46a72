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
_FEWEST_ROUNDS = 100
"""Rounds of a domain that must do as its usual acceptance once the target is another one."""
_LATE_TRACES = 64
"""Traces in a row that may be of requests, or of a server, that had not taken the version yet."""
_MOST_DOMAINS = 32
"""Domains watched one by one; clients name them, so further ones are watched together."""


@dataclass(slots=True)
class _Domain:
    """One domain."""

    rounds: int = 0
    kept: int = 0
    cusum: Cusum = field(default_factory=Cusum)
    wanted: int = _REFERENCE_ROUNDS
    """Rounds from which its usual acceptance is known."""

    @property
    def is_known(self) -> bool:
        return self.rounds >= self.wanted

    @property
    def rate(self) -> float:
        return self.kept / self.rounds


@dataclass(slots=True)
class DriftWatch:
    """Watches the acceptance of one version."""

    version: int | None = None
    domains: dict[str, _Domain] = field(default_factory=dict)
    num_alarms: int = 0
    num_older: int = 0
    """Traces of older versions since the last one of this version."""

    def observe(self, domain: str, version: int, rounds: int, kept: int) -> bool:
        """Take in one trace.

        Args:
            version: newest one that drafted in it. A newer one begins anew, and so does an older
                one that many traces in a row are of: servers have gone back to it. A few traces of
                older ones say nothing.
            rounds: those in which it drafted.
            kept: those of them whose first token was accepted.

        Returns:
            Acceptance has fallen: an alarm, after which that domain's usual acceptance is taken
            anew.
        """
        if rounds == 0 or self._is_late(version):
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
                one.rounds, one.kept, one.wanted = 0, 0, _REFERENCE_ROUNDS
                return fell
        if not one.is_known:
            one.rounds, one.kept = one.rounds + rounds, one.kept + kept
        return False

    def replace_target(self) -> bool:
        """The target has other weights: from now on, acceptance is held against what it was under
        the former ones.

        Returns:
            Whether that is known of any domain. If not, a fall cannot be noticed.
        """
        self.domains = {n: d for n, d in self.domains.items() if d.rounds >= _FEWEST_ROUNDS}
        for one in self.domains.values():
            one.wanted = min(one.wanted, one.rounds)
            one.cusum.reset()
        return bool(self.domains)

    def _is_late(self, version: int) -> bool:
        """The trace is of a version that was in use before, and may not be any more."""
        if self.version is None or version >= self.version:
            self.num_older = 0
            return False
        self.num_older += 1
        if self.num_older <= _LATE_TRACES:
            return True
        self.num_older = 0
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
