"""What ``goodput`` weighs for a plan, in the two parts in which it becomes known.

Most of it does not depend on the requests of the step: which way to decode is the base, and what
the seconds of every arm are worth. That is computed in ``observe``, while the device works, as long
as the next batch is of the same size. What requests may draft, and their matches, are known only
when the plan is asked for, and only what they change is computed then.
"""

from __future__ import annotations

from collections import Counter
from typing import NamedTuple

from policies.choice import Choice, Footing
from policies.forecast import PLAIN_ARM, Arm, Forecast, Outline
from policies.groups import Mix
from policies.interface import Decision, StepObs
from policies.probes import Priced
from policies.trials import Trials

_OTHERS = 0.25
"""Share of the requests that are of other groups than those that were planned for, from which on
another plan is worth its time,"""
_LONGER = 2
"""and half octaves by which they read more or less text."""


class Like(NamedTuple):
    """What the requests of a batch are like, as far as plans depend on it."""

    mix: Mix | None
    """Their groups."""
    context: int
    """See ``StepTimes``."""

    def is_far_from(self, planned: Like) -> bool:
        """Whether a plan for these others should not be followed any more."""
        if abs(self.context - planned.context) >= _LONGER:
            return True
        if self.mix is None or planned.mix is None or self.mix is planned.mix:
            return False
        return self.mix.distance(planned.mix) >= _OTHERS


NOBODY = Like(None, 0)


class Basis(NamedTuple):
    """What a plan weighs whatever its requests are like: computed when it is asked for, or ahead
    of it."""

    obs: StepObs
    """For which it was computed."""
    max_k: int
    fresh: str
    """The drafter of the decision before."""
    outline: Outline
    catch_up_s: dict[str, float]
    """Seconds to come back to each drafter on the device that may propose."""
    footing: Footing
    like: Like

    def is_for(self, obs: StepObs, max_k: int, fresh: str, like: Like = NOBODY) -> bool:
        """Whether this is what the plan would weigh."""
        own = self.obs
        return (
            obs.batch == own.batch
            and max_k == self.max_k
            and fresh == self.fresh
            and (like is self.like or not like.is_far_from(self.like))
            and obs.drafters == own.drafters
            and obs.pending_rows == own.pending_rows
        )


class Weighed(NamedTuple):
    """All that a plan weighs before it draws: computed when it is asked for, or ahead of it."""

    basis: Basis
    seen: Forecast
    choice: Choice
    options: list[Priced]
    """Stretches that could begin."""
    blind: Arm
    """The best arm that needs no look at matches."""
    draft: Arm
    """The best arm that drafts; plain decoding if none can."""


class Made(NamedTuple):
    """A plan that was made."""

    weighed: Weighed
    before: str
    """The drafter of the decision before."""
    looked: bool
    """Matches were known."""


class Steps:
    """What ``goodput`` decided last."""

    def __init__(self, trials: Trials) -> None:
        self.trials = trials
        """Drafters that are to be tried."""
        self.counts: Counter[str] = Counter()
        """Decisions by reason."""
        self.drafter = "none"
        """That of the last decision."""
        self.best = PLAIN_ARM
        """The best arm that drafts, when one was chosen last."""
        self.obs: dict[bool, StepObs] = {}
        """What the last plans with and without a look were for."""
        self.tokens = 1.0
        """Those of a request that the last plan expected."""
        self.clock_s = 0.0
        """Time of all steps."""
        self.like = NOBODY
        """The requests of the last plan,"""
        self.now = NOBODY
        """and those of the last step."""
        self.made: Made | None = None
        """The last plan, until ``_settle``,"""
        self.look: Weighed | None = None
        """and what its look found, if it had one."""

    def note(self, decision: Decision) -> Decision:
        """Count a decision."""
        self.drafter = decision.drafter
        self.counts[decision.reason] += 1
        return decision
