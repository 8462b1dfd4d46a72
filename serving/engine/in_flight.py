"""A round between its launch and its commit, and what the host's clock says of it."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import compress

from policies.interface import Decision, DraftPolicy, Outcome, RowOutcomes
from policies.switching import FEW_ROWS
from serving.engine.commit import Step
from serving.engine.cuda_graphs import Landing
from serving.engine.grouping import Composition
from serving.engine.proposed import Decoded, Proposed
from serving.engine.rounds import Launched, Rounds

_MOST_UNTIMED = 8
"""Rounds beside prompt chunks in a row whose times are not reported to the policy: the host has
more to do for them than for others. If there are no others, their times have to do, as far as they
have no chunk in them: a drafter that ends requests sooner has chunks beside more of its rounds than
plain decoding has, and would be charged for them."""

Matches = bytes | None
"""Kind of the match that was observed for each request when a round was planned; ``None``: nobody
looked."""


@dataclass(frozen=True, slots=True)
class PlannedRound:
    """A round that was launched, and what planning it has cost."""

    launched: Launched
    matches: Matches
    policy: DraftPolicy
    """Made the decision, and learns the outcome."""
    decision: Decision
    versions: Mapping[str, int]
    """See ``Drafting.versions_of``, when the round was launched."""
    started_s: float
    """``time.perf_counter()`` when the engine began to plan."""
    before_s: float
    """Seconds before the device began. With a host drafter these are all seconds since the last
    outcome, because it proposes nothing without that, so they are a cost of drafting."""
    made_of: Composition
    """Its batch."""
    follows_swap: bool
    """Weights were copied since the round before it was launched, which is part of its time."""

    @property
    def is_alone(self) -> bool:
        """Nothing was computed in its time that says nothing about other rounds: log probabilities,
        or a copy of weights."""
        return self.launched.scores is None and not self.follows_swap

    @property
    def catches_up(self) -> bool:
        """Much of its time went into rows that its drafter lacked."""
        return self.launched.num_caught_up > FEW_ROWS * len(self.launched.batch)


@dataclass(frozen=True, slots=True)
class Arrival:
    """The outcome of a round that was read and not committed yet."""

    decoded: Decoded
    step_s: float
    host_waited: bool
    """The host had nothing left to do while the round ran."""
    plan_s: float
    """Part of ``step_s`` in which the host planned and the device had nothing to do: this round, or
    the next one while this one ran."""

    def step(self, planned: PlannedRound, decoded: Decoded, is_timed: bool) -> Step:
        """What the requests of the round drafted and kept.

        Args:
            decoded: the outcome for those that had not ended when the round was read; what others
                drafted means nothing.
            is_timed: see ``RoundClock``.
        """
        beside_s = max(0.0, self.step_s - planned.before_s)
        draft_s = planned.before_s + planned.launched.draft_share * beside_s
        is_timed = is_timed and planned.is_alone and not planned.catches_up
        return Step(
            decoded.proposed, decoded.verified, draft_s, planned.versions, self.step_s, is_timed
        )

    def outcome(
        self, planned: PlannedRound, step: Step, lives: list[bool], is_timed: bool
    ) -> Outcome:
        """What the policy learns from the round.

        Args:
            lives: [R] requests that had not ended when the round was read.
            is_timed: see ``RoundClock``. What catching up takes is for the policy to learn.
        """
        launched = planned.launched
        accepted, draft, matches = step.verified.num_accepted, step.proposed, planned.matches
        lens = list(map(len, draft.tokens)) if draft else [0] * len(accepted)
        if draft and draft.most is not None:
            # A drafter that had no more to say would have failed there. If such drafts said nothing
            # of further places, these would seem as good as the drafts that reach them.
            lens = [draft.most if length else 0 for length in lens]
        if matches is not None and len(matches) > len(accepted):
            matches = bytes(compress(matches, lives))
        groups = planned.made_of.groups
        if groups is not None and len(groups) > len(accepted):
            groups = bytes(compress(groups, lives))
        return Outcome(
            decision=planned.decision,
            batch=len(planned.launched.batch),
            rows=RowOutcomes(
                # Where the device picks, a mix is one drafter to the policy.
                lens,
                accepted,
                matches,
                draft.kinds() if draft and launched.picks else None,
                groups,
                _judged(draft, groups),
            ),
            step_s=self.step_s,
            draft_s=step.draft_s,
            has_prefill=not (is_timed and planned.is_alone),
            version=step.version,
            plan_s=self.plan_s,
            num_caught_up=planned.launched.num_caught_up,
            context=planned.made_of.context,
        )


def _judged(draft: Proposed | None, groups: bytes | None) -> dict[str, RowOutcomes]:
    """Rounds of a drafter that did not draft alone, see ``RowOutcomes.judged``."""
    if draft is None or (own := draft.judged) is None:
        return {}
    return {own.drafter: RowOutcomes(own.num_decided, own.num_kept, groups=groups)}


class RoundClock:
    """Times rounds from one outcome to the next, and knows which times mean something.

    Where the device has a clock, a round is timed by that, from the end of what the device did
    before it: the host may read an outcome late, because it launches chunks or has requests to
    begin and to end, and it cannot tell a round from chunks that ran before it.
    """

    def __init__(self) -> None:
        self.last_outcome_s = 0.0
        self.is_timed = True
        """The time of the round under way says something about rounds alone."""
        self.plan_s = 0.0
        """Seconds of planning since the last outcome."""
        self._num_untimed = 0
        self._versions: Mapping[str, int] | None = None
        self._last: Landing | None = None
        """What the device did last before the round under way."""

    def was_launched_with(self, versions: Mapping[str, int]) -> bool:
        """A round was launched with these versions of the drafters that learn; whether they are
        others than those of the round before."""
        before, self._versions = self._versions, versions
        return before is not None and before != versions

    def read(self, rounds: Rounds, planned: PlannedRound) -> Arrival:
        """Wait for a round."""
        step_s, host_waited = self.lap(planned.launched.landed, planned.started_s)
        # A host that still had to wait has planned while the device was busy anyway.
        plan_s, self.plan_s = 0.0 if host_waited else min(self.plan_s, step_s), 0.0
        return Arrival(rounds.read(planned.launched), step_s, host_waited, plan_s)

    def lap(self, landed: Landing, started_s: float) -> tuple[float, bool]:
        """Wait for an outcome.

        Args:
            started_s: ``time.perf_counter()`` when the engine began to plan its round.

        Returns:
            Seconds of the round, and whether the host had to wait.
        """
        host_waited = landed.wait()
        now_s = time.perf_counter()
        step_s = now_s - max(started_s, self.last_outcome_s)
        if (device_s := landed.seconds_since(self._last)) is not None:
            # The device may have had nothing to do before the round was planned.
            step_s = min(device_s, now_s - started_s)
        self.last_outcome_s, self._last = now_s, landed
        return step_s, host_waited

    def round_was_committed(self) -> None:
        self._num_untimed = 0 if self.is_timed else self._num_untimed + 1
        self.is_timed = True

    def chunks_were_launched(self) -> None:
        """The round under way is read later because of them, unless the device times it."""
        is_exact = self._last is not None and self._last.event is not None
        self.is_timed = self.is_timed and (is_exact or self._num_untimed >= _MOST_UNTIMED)

    def chunks_were_read(self, done: Landing, host_waited: bool, is_exact: bool) -> None:
        """A round behind them is timed from here on, unless nobody knows when they ended.

        Args:
            done: the device's clock at their end, if it has one.
            is_exact: they have ended just now, and no round is under way.
        """
        is_known = host_waited or done.event is not None
        self.is_timed = is_exact or (is_known and self._num_untimed >= _MOST_UNTIMED)
        self.last_outcome_s, self._last = time.perf_counter(), done
