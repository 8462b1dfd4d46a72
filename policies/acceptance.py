"""Acceptance of every drafter and mix, on one clock; see ``drafter_acceptance``.

A mix is expected to keep at each place as much as the best of its members, until its own rounds say
otherwise. Where the rounds of a member stop fitting, those of an idle mix of it count little, too.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from policies.drafter_acceptance import NOTHING, POOL, DrafterAcceptance, Floats
from policies.hope import Hopes
from policies.interface import DrafterTraits
from policies.regimes import Evidence
from policies.round_counts import NOTHING_BEYOND, Beyond, ByBucket

MAX_DRAFT = 16
"""Largest K that settings allow."""
_IDLE_STEPS = 8
"""Steps without a mix after which its rounds are of the time before, if the traffic of a member
has changed."""
NO_MIXES: Mapping[str, Sequence[str]] = {}


def num_buckets(drafters: Mapping[str, DrafterTraits]) -> int:
    """Kinds of match that some drafters tell apart, no match included."""
    return max((len(traits.prior_acceptance) for traits in drafters.values()), default=1)


class AcceptanceModel:
    """Conditional acceptance of every drafter, and the clock of decay."""

    def __init__(
        self,
        half_life_rounds: float,
        drafters: Mapping[str, DrafterTraits],
        max_draft: int = MAX_DRAFT,
        mixes: Mapping[str, Sequence[str]] = NO_MIXES,
    ) -> None:
        """
        Args:
            half_life_rounds: rounds after which an old observation counts half.
            drafters: traits by kind; no other kind may be observed or asked for.
            max_draft: largest K ever observed or asked for.
            mixes: members of those kinds that are mixes. A mix is expected to keep as much as the
                best of them at each place, until its own rounds say otherwise.

        Raises:
            ValueError: a drafter has neither one prior nor one for each bucket.
        """
        pooled = {kind for kind, one in drafters.items() if len(one.prior_acceptance) == 1}
        self._mixes = {
            mix: [kind for kind in members if kind in pooled] for mix, members in mixes.items()
        }
        self.num_buckets = num_buckets(drafters)
        shape = self.num_buckets, max_draft
        self._drafters = {
            kind: DrafterAcceptance(kind, traits, half_life_rounds, shape)
            for kind, traits in drafters.items()
        }
        self._values: dict[str, tuple[Floats, list[float]]] = {}
        """Expected tokens, and ``match_values`` by them, by drafter."""
        self._hopes = Hopes(half_life_rounds)
        self._drafted_at: dict[str, float] = {}
        """The clock at the last rounds of each."""
        self._clock = 0.0
        self.batch = 1
        """Requests of the last step."""

    def tick(self, batch: int, num_steps: int = 1) -> None:
        """Advance the clock by the rounds that the engine did in some steps, each of so many
        requests, with any drafter or none."""
        self._clock += batch * num_steps
        self.batch = batch

    def observe(
        self, drafter: str, step: ByBucket, batch: int, beyond: Beyond = NOTHING_BEYOND
    ) -> None:
        """Take in the rounds of one step, by bucket.

        Args:
            batch: requests of the step; sets the least half-life.
            beyond: what they have kept because of whose they are, which says nothing of others.
        """
        own = self._drafters[drafter]
        before = own.num_shifts
        own.observe(step, batch, self._clock, beyond)
        self._drafted_at[drafter] = self._clock
        if self._mixes:
            self._tell_mixes(drafter, has_changed=own.num_shifts > before)
        self._hopes.drafted(drafter, step, self._clock)

    def _tell_mixes(self, member: str, *, has_changed: bool = False) -> None:
        for mix, members in self._mixes.items():
            if member in members:
                kept = [self._drafters[kind].hazards()[POOL].cumprod() for kind in members]
                most = np.maximum(np.max(kept, axis=0), NOTHING)
                most[1:] /= most[:-1].copy()
                idle = self._clock - self._drafted_at.get(mix, 0.0)
                is_stale = has_changed and idle > _IDLE_STEPS * self.batch
                self._drafters[mix].expect(np.minimum(most, 1.0), self._clock, is_stale=is_stale)

    def hazards(self, drafter: str, bucket: int) -> list[float]:
        """c_1, c_2, ... c_K, each in [0, 1]."""
        self._drafters[drafter].fade(self._clock, self.batch)
        hazards: list[float] = self._drafters[drafter].hazards()[bucket].tolist()
        return hazards

    def all_hazards(self, drafter: str) -> Floats:
        """[B + 1, K] the same by bucket; the last row is that of all. Must not be changed."""
        self._drafters[drafter].fade(self._clock, self.batch)
        return self._drafters[drafter].hazards()

    def expected_tokens(self, drafter: str) -> Floats:
        """[B, K + 1] expected tokens of a round, the target's own included, by bucket at k = 0, 1,
        ... K.

        All 1 in bucket 0 of a drafter that needs a match: it proposes nothing there.
        """
        own = self._drafters[drafter]
        own.fade(self._clock, self.batch)
        return own.expected_tokens()

    def hopeful_tokens(self, drafter: str) -> Floats:
        """[B, K + 1] likewise, by an upper bound: a standard deviation above the mean, of what
        recent rounds leave open and of how much may have changed since."""
        expected, own = self.expected_tokens(drafter), self._drafters[drafter]
        return self._hopes.tokens(drafter, expected, own.recent, self._clock)

    def match_values(self, drafter: str) -> list[float] | None:
        """[B] expected tokens of a drafter's longest draft, by kind of match; ``None`` if it is not
        known. The same list until evidence comes."""
        if drafter not in self._drafters:
            return None
        expected = self.expected_tokens(drafter)
        known = self._values.get(drafter)
        if known is None or known[0] is not expected:
            known = self._values[drafter] = expected, expected[:, -1].tolist()
        return known[1]

    def doubt(self, drafter: str, k: int) -> float:
        """Standard deviation of what position k adds to a drafter's rounds, as a share of the
        tokens of k - 1; 0 for drafters whose buckets are independent."""
        return self._drafters[drafter].doubt(k)

    def spread(self, drafter: str, k: int) -> float:
        """Standard deviation of the expected tokens of a drafter's rounds at k, as a share of them;
        0 for drafters whose buckets are independent."""
        return self._drafters[drafter].spread(k)

    def num_shifts(self, drafter: str) -> int:
        """How often the rounds of a drafter have stopped fitting what was usual."""
        return self._drafters[drafter].num_shifts

    def usual(self, drafter: str) -> tuple[Evidence, Floats]:
        """A drafter's lasting counts, and a copy of their hazards, [B + 1, K]."""
        return self._drafters[drafter].usual()

    def replace(self, drafter: str, evidence: Evidence) -> None:
        """Go on from other evidence, as other weights draft now."""
        self._drafters[drafter].replace(evidence, self._clock)
        self._tell_mixes(drafter)

    def figures(self) -> dict[str, Any]:
        """JSON-ready: hazards and weights by ``drafter/bucket``."""
        return {
            f"{kind}/{row}": figures
            for kind, own in sorted(self._drafters.items())
            for row, figures in own.figures().items()
        }
