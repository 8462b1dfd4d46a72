"""Leaving out plans, and looks at matches, where they do not pay.

Planning and learning from a step take the host 0.15 to 0.3 ms, and looking up the matches of many
requests up to several times that (benchmarks/engine/host.py), while a step of a small target takes
a GPU 0.6 to 1.2 ms. So a plan holds for some steps, and looks are made at every step only where
they find more than they cost.
"""

from __future__ import annotations

import math
from collections import Counter
from itertools import repeat
from typing import NamedTuple

import numpy as np

from policies.acceptance import Floats, match_bucket
from policies.average import Average
from policies.forecast import PLAIN_ARM, Arm, by_bucket
from policies.interface import Outcome, RowOutcomes, StepObs

_REST_SHARE = 0.006
"""Share of the time that plans may take, and that looks may take while they find less than they
cost."""
_REST_GAIN = 0.05
"""Gain of the moving averages of what inspecting costs and finds."""
_MOST_REST, _MOST_UNLOOKED = 64, 1024
"""Most steps without a plan, and without a look at matches."""


class Rest:
    """Leaves out plans, and looks at matches, where they do not pay."""

    def __init__(self) -> None:
        self._costs = {looked: Average(_REST_GAIN) for looked in (False, True)}
        """Time of a plan without and with a look, as shares of a plain step."""
        self._find = Average(_REST_GAIN, mean=1.0)
        """Time that a look saves beyond what the best arm without one takes, likewise."""
        self.num_unlooked = 0
        """Steps since the last look."""
        self.left = 0
        self.arm: Arm = PLAIN_ARM
        """What is done meanwhile."""
        self.num_since = 1
        """Steps since the last plan."""
        self.glance: Glance | None = None
        """Replaces plans while looks find nothing; ``None``: every look is planned for."""
        self._looked: bool | None = None
        """Whether the last plan looked at matches; ``None`` once its time is known."""

    @property
    def pays(self) -> bool:
        """Looking at every step finds more than it costs."""
        return self._find.mean >= self._costs[True].mean

    def wants_look(self) -> bool:
        least = min(math.ceil(self._costs[True].mean / _REST_SHARE), _MOST_UNLOOKED)
        return self.pays or self.num_unlooked >= least

    def plan_begins(self, *, looked: bool) -> None:
        """A plan is asked for."""
        self._looked = looked
        self.num_unlooked += not looked

    def note_cost(self, share: float) -> None:
        """Take in what the last plan took, unless that is known.

        Args:
            share: its time relative to a plain step; 0 where the host had time for it.
        """
        if self._looked is not None:
            self._costs[self._looked].add(share)
            self._looked = None

    def note_find(self, share: float) -> None:
        """Take in one look.

        Args:
            share: time that it saved beyond the best arm that needs none, relative to a plain step.
        """
        self._find.add(share)
        self.num_unlooked = 0

    def begin(self, arm: Arm, glance: Glance | None) -> None:
        """Go on with an arm until the next plan is due."""
        self.glance = glance
        self.num_since = 1
        self.arm = arm
        self.left = min(math.ceil(self._costs[False].mean / _REST_SHARE), _MOST_REST)

    def take(self) -> Arm:
        """The arm of a step without a plan."""
        self.left -= 1
        self.num_since += 1
        self.num_unlooked += 1
        return self.arm

    def may_go_on(self, obs: StepObs) -> bool:
        """A glance at the matches of a step finds nothing to plan for."""
        return (
            self.left > 0
            and self.glance is not None
            and obs.matches is not None
            and self.arm[1] <= min(obs.max_draft, max(obs.caps))
            and self.glance.finds_nothing(obs.matches)
        )

    def reset(self) -> None:
        """Forget what looks found: other weights draft now."""
        self.glance = None
        self._find, self.left = Average(_REST_GAIN, mean=1.0), 0


class Glance(NamedTuple):
    """Decides from a look alone, between plans, whether a drafter that needs matches may gain."""

    gains: Floats
    """[arms, 6] tokens that a row of each bucket gains over the arm in use."""
    losses: Floats
    """[arms] tokens' worth of time that the step takes longer."""

    def finds_nothing(self, matches: tuple[int, ...]) -> bool:
        """No arm gains with these matches."""
        return not (self.gains @ np.array(by_bucket(matches)) > self.losses).any()


class Gathered:
    """Outcomes of a rest, learned at the next plan."""

    def __init__(self) -> None:
        self.drafter = "none"
        self.rounds: dict[int | None, Counter[tuple[int, int]]] = {}
        self.num_steps = 0
        self.seconds = 0.0

    def add(self, outcome: Outcome) -> None:
        self.num_steps += 1
        if not outcome.has_prefill:
            self.seconds += outcome.step_s
        self.drafter = outcome.decision.drafter
        if outcome.decision.draft_k:
            count_rows(outcome.rows, self.rounds)


def count_rows(rows: RowOutcomes, into: dict[int | None, Counter[tuple[int, int]]]) -> None:
    """Count rounds in which something was verified by (num_verified, num_accepted), by bucket."""
    matches = repeat(None) if rows.matches is None else rows.matches
    rounds = zip(matches, rows.num_verified, rows.num_accepted, strict=False)
    for (match, num_verified, num_accepted), count in Counter(rounds).items():
        if num_verified:
            bucket = None if match is None else match_bucket(match)
            into.setdefault(bucket, Counter())[num_verified, num_accepted] += count
