"""What the policy in charge decides for a batch, as long as it can be used.

A policy is a guess about speed, and requests must not pay for a wrong one. Where it raises, decides
something that cannot be run or that traces could not hold, or keeps the engine waiting, the step is
plain, and so are the next ones; then it is asked again, each failure doubling the pause up to a
limit. So a policy with a rare fault goes on, and one that always fails costs a call now and then. A
policy that never returns cannot be helped: it runs on the engine's thread, as all of them do.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from dataclasses import dataclass

from policies.allocation import Allocation
from policies.interface import Decision, DraftPolicy, Outcome, StepObs
from serving.engine.drafting import Drafting
from serving.engine.in_flight import Matches
from serving.engine.rounds import Rounds
from serving.engine.sequence import Sequence

log = logging.getLogger(__name__)

PLAIN = Decision("none", 0, 1.0, False, "plain")

_FIRST_PAUSE, _LONGEST_PAUSE = 64, 4096
"""Plain steps after a failure: at first and at most."""
_FORGIVEN = 4096
"""Steps without a failure after which the next one is a first one again."""
_LATE_S, _MOST_LATE = 0.1, 3
"""A decision that takes longer is late, and so many in a row are a failure: a busy machine may hold
up one or two. A plan is to take 50 us."""
_LARGEST = 3.4e38
"""Float32, in which traces keep what a policy notes."""


class UnusableDecisionError(ValueError):
    """A decision that cannot be run or logged."""


@dataclass(slots=True)
class _Conduct:
    """How a policy has behaved."""

    policy: DraftPolicy
    """Kept, so that nothing else gets its ``id``."""
    pause: int = 0
    """Plain steps after the last failure,"""
    left: int = 0
    """and how many of them are to come."""
    since: int = 0
    """Decisions since then."""
    num_late: int = 0
    """In a row."""


class Deciding:
    """Asks policies for decisions, and reports outcomes to them. Used by the engine's thread."""

    def __init__(
        self,
        drafting: Drafting,
        rounds: Rounds,
        policy_of: Callable[[frozenset[str]], DraftPolicy] | None,
    ) -> None:
        """
        Args:
            policy_of: see ``Engine``.
        """
        self._drafting = drafting
        self._rounds = rounds
        self._policy_of = policy_of
        self._conducts: dict[int, _Conduct] = {}
        """Of policies that have failed or were late, by ``id``; none in most servers."""
        self._checked: Decision | None = None
        """The last decision that was found usable: a policy that rests repeats it."""
        self.num_failures = 0

    def decide(
        self, ordinary: DraftPolicy, batch: list[Sequence], step: int
    ) -> tuple[DraftPolicy, Decision, Matches]:
        """The policy in charge, its decision, and the kind of the match observed for each
        request.

        Args:
            ordinary: decides for requests that do not choose their drafters.
            step: running number of the engine's steps.
        """
        policy = ordinary
        if not any(s.request.max_draft != 0 for s in batch):
            return policy, PLAIN, None
        try:
            choice = self._drafting.choice(batch)
            if choice is not None and self._policy_of is not None:
                policy = self._policy_of(choice)
            if self._conducts and self._pauses(policy):
                return policy, PLAIN, None
            decision, matches = self._asked(policy, batch, step, choice)
        except Exception as error:
            self._failed(policy, "could not decide", error)
            return policy, PLAIN, None
        return policy, decision, matches

    def _asked(
        self, policy: DraftPolicy, batch: list[Sequence], step: int, choice: frozenset[str] | None
    ) -> tuple[Decision, Matches]:
        resting = policy.rest()
        if resting is not None:
            self._check(resting, self._drafting.max_draft, batch, choice)
            if not resting.draft_k:
                return resting, None
        most = self._rounds.most_draft(batch)
        if resting is not None:
            return self._drafting.held(resting, batch, most), None
        look = policy.wants_matches()
        if look:
            self._drafting.rank_matches(policy)
        obs: StepObs | None = self._drafting.observe(batch, step, most, choice, look=look)
        if obs is None:
            return PLAIN, None
        decision = policy.plan(obs)
        self._check(decision, most, batch, choice)
        return decision, obs.matches

    def _check(
        self, decision: Decision, most: int, batch: list[Sequence], choice: frozenset[str] | None
    ) -> None:
        """
        Raises:
            UnusableDecisionError: says why it cannot be used.
        """
        if decision is self._checked and decision.draft_k <= most and choice is None:
            return
        problem = self._problem(decision, most, len(batch), choice)
        if problem is not None:
            raise UnusableDecisionError(problem)
        self._checked = decision if choice is None and decision.picks is None else None

    def _problem(
        self, decision: object, most: int, num_requests: int, choice: frozenset[str] | None
    ) -> str | None:
        if not isinstance(decision, Decision):
            return f"it decided {decision!r}, which is no Decision"
        k, drafter, picks = decision.draft_k, decision.drafter, decision.picks
        if not isinstance(k, int) or not 0 <= k <= most:
            return f"draft_k must be an int in 0..{most}, got {k!r}"
        if k and not self._drafting.can_draft(drafter, choice):
            return f"no drafter {drafter!r} can draft for this batch"
        if not k and drafter != "none":
            return f"drafter must be 'none' where draft_k is 0, got {drafter!r}"
        if not _is_probability(decision.propensity):
            return f"propensity must be in (0, 1], got {decision.propensity!r}"
        if picks is not None and len(picks) != num_requests:
            return f"picks must be for {num_requests} requests, got {len(picks)}"
        if picks:
            drafters, chances, _ = zip(*picks, strict=True)  # by columns: 5 us for 256 requests
            if not self._drafting.members(drafter).issuperset(drafters):
                return f"picks must be drafters of {drafter!r}, got {sorted(set(drafters))}"
            if not all(map(_is_probability, set(chances))):
                return "propensities of picks must be in (0, 1]"
        if not _is_usable(decision.allocation):
            return "the numbers of an allocation must be finite, and the score 'head' needs a head"
        for name, value in decision.columns().items():
            if not abs(value) <= _LARGEST:
                return f"its note must hold finite numbers, got {name} = {value!r}"
        return None

    def took(self, policy: DraftPolicy, seconds: float) -> None:
        """Deciding has taken so long."""
        conduct = self._conducts.get(id(policy))
        if seconds <= _LATE_S:
            if conduct is not None:
                conduct.num_late = 0
            return
        conduct = self._conduct_of(policy)
        conduct.num_late += 1
        if conduct.num_late >= _MOST_LATE:
            conduct.num_late = 0
            what = f"took {seconds:.2f} s, the last of {_MOST_LATE} in a row above {_LATE_S:g} s"
            self._failed(policy, what, None)

    def report(self, policy: DraftPolicy, outcome: Outcome) -> None:
        """Let a policy learn from the outcome of its decision."""
        try:
            policy.observe(outcome)
        except Exception as error:
            self._failed(policy, "could not learn from a step", error)

    def _conduct_of(self, policy: DraftPolicy) -> _Conduct:
        return self._conducts.setdefault(id(policy), _Conduct(policy))

    def _pauses(self, policy: DraftPolicy) -> bool:
        """Whether a policy is not asked, because it has failed; counts the step."""
        conduct = self._conducts.get(id(policy))
        if conduct is None:
            return False
        if conduct.left:
            conduct.left -= 1
            return True
        conduct.since += 1
        return False

    def _failed(self, policy: DraftPolicy, what: str, error: Exception | None) -> None:
        self.num_failures += 1
        self._checked = None
        conduct = self._conduct_of(policy)
        known = 0 if conduct.since >= _FORGIVEN else conduct.pause
        conduct.pause = conduct.left = min(max(2 * known, _FIRST_PAUSE), _LONGEST_PAUSE)
        conduct.since = 0
        log.error(
            "policy %s %s%s; the next %d steps are decoded plainly, then it is asked again",
            getattr(policy, "kind", type(policy).__name__), what,
            "" if error is None else f" ({error!r})", conduct.left,
            exc_info=error if not isinstance(error, UnusableDecisionError) else None,
        )  # fmt: skip


def _is_probability(value: object) -> bool:
    return isinstance(value, float | int) and 0 < value <= 1  # NaN is in no interval


def _is_usable(allocation: Allocation | None) -> bool:
    if allocation is None:
        return True
    if not isinstance(allocation, Allocation):
        return False
    numbers = (allocation.threshold, allocation.gamma, allocation.budget_each or 0.0)
    lacks_head = allocation.cut.score == "head" and allocation.head is None
    return not lacks_head and all(map(math.isfinite, numbers))
