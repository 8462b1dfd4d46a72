"""What ``goodput`` weighs for a plan, in the two parts in which it becomes known.

Most of it does not depend on the requests of the step: which way to decode is the base, and what
the seconds of every arm are worth. That is computed in ``observe``, while the device works, as long
as the next batch is of the same size. What requests may draft, and their matches, are known only
when the plan is asked for, and only what they change is computed then.
"""

from __future__ import annotations

from typing import NamedTuple

from policies.choice import Choice, Footing
from policies.forecast import Arm, Forecast, Outline
from policies.interface import StepObs
from policies.probes import Priced


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
    """Seconds to come back to each neural drafter that may propose."""
    footing: Footing

    def is_for(self, obs: StepObs, max_k: int, fresh: str) -> bool:
        """Whether this is what the plan would weigh."""
        own = self.obs
        return (
            obs.batch == own.batch
            and max_k == self.max_k
            and fresh == self.fresh
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
