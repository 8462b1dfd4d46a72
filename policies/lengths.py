"""What policies share that draft with one drafter and decide on K alone.

Such a policy is a law: the probability of every K, given the batch and what earlier steps brought.
From it follow the decision and its propensity, which traces keep, so that any other policy can be
judged on the log. A policy whose law is certain takes any K in a small share of its steps instead,
unless it stands for a published rule that does not.
"""

from __future__ import annotations

import random
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, NamedTuple

from policies.interface import CostSample, Decision, Outcome, PolicyContext, StepObs
from policies.live_costs import LiveCosts

_NOTHING: Mapping[str, float] = {}


class Law(NamedTuple):
    """The note of a decision: what K was drawn from."""

    chances: Sequence[float]
    """[max_k + 1] probability of K = 0, 1, ... max_k."""
    noted: Mapping[str, float] = _NOTHING
    """What traces keep of what the policy decided besides K."""

    def columns(self) -> Mapping[str, float]:
        return self.noted


def spread(best: int, max_k: int, share: float) -> list[float]:
    """The law of one best K: any K, itself included, in a share of the steps."""
    law = [share / (max_k + 1)] * (max_k + 1)
    law[best] += 1 - share
    return law


def drafter_for(wanted: str, context: PolicyContext) -> str:
    """The drafter that settings name, or, where the server does not hold it, the first one that
    computes on the device, or else the first."""
    if wanted in context.drafters:
        return wanted
    on_device = (kind for kind, traits in context.drafters.items() if traits.on_device)
    return next(on_device, next(iter(context.drafters)))


class LengthPolicy(ABC):
    """Implements ``DraftPolicy`` but for ``from_settings``, by the law of K."""

    kind: ClassVar[str]
    """Name in the catalog."""
    wants_profile = True
    wants_guard = True

    def __init__(self, context: PolicyContext, drafter: str) -> None:
        self.max_draft = context.max_draft
        self.drafter = drafter_for(drafter, context)
        self.costs = LiveCosts(context.drafters, self.drafter, context.max_draft)
        self.version: int | None = None
        """Of the drafter, now in force; ``None`` before the first is named."""
        self.plain_chance = 0.0
        """Probability that the last plan had of plain decoding."""
        self._needs_match = context.drafters[self.drafter].needs_match
        self._rng = random.Random(context.seed)
        self._counts = Counter[int]()
        self._ahead: dict[tuple[int, int], Sequence[float]] = {}
        """The next step's law by (batch, max_k), computed while the device works."""
        self._seen: tuple[int, int] | None = None
        """Batch and max_k of the last plan."""

    @abstractmethod
    def law(self, batch: int, max_k: int) -> Sequence[float]:
        """[max_k + 1] probability of K = 0, 1, ... max_k in the next step.

        Args:
            max_k: >= 1.
        """

    @abstractmethod
    def learn(self, outcome: Outcome, law: Sequence[float]) -> None:
        """Learn from an outcome of this policy's decision.

        Args:
            law: that the decision was drawn from.
        """

    @abstractmethod
    def forget(self, calibration: dict[str, Any]) -> None:
        """Other weights draft from now on.

        Args:
            calibration: what was published with them.
        """

    def state(self) -> dict[str, Any]:
        """JSON-ready figures of the policy's own."""
        return {}

    def calibrate(self, samples: Sequence[CostSample]) -> None:
        """Start the step times from those measured at start-up."""
        self.costs.calibrate(samples)
        self._ahead.clear()

    def rest(self) -> Decision | None:
        """``None``: every step is planned."""
        return None

    def wants_matches(self) -> bool:
        """Only for a drafter that needs them."""
        return self._needs_match

    def plan(self, obs: StepObs) -> Decision:
        """Draw K from the law."""
        max_k = obs.longest(self.max_draft)
        law: Sequence[float] = (1.0,)
        if max_k and self.drafter in obs.drafters:
            law = self._law_of(obs.batch, max_k)
        k = self._drawn(law)
        self.plain_chance = law[0]
        self._counts[k] += 1
        drafter = self.drafter if k else "none"
        explore = law[k] < max(law)
        decision = Decision(drafter, k, law[k], explore, self.kind, self.kind, note=Law(law))
        return self.completed(decision, obs.batch) if k else decision

    def _law_of(self, batch: int, max_k: int) -> Sequence[float]:
        self._seen = batch, max_k
        law = self._ahead.get((batch, max_k))
        if law is None:
            law = self._ahead[batch, max_k] = self.law(batch, max_k)
        return law

    def completed(self, decision: Decision, batch: int) -> Decision:
        """A decision to draft, with what the policy decides besides K."""
        return decision

    def _drawn(self, law: Sequence[float]) -> int:
        left = self._rng.random()
        for k, chance in enumerate(law):
            left -= chance
            if left < 0:
                return k
        # The probabilities add up to a little less than 1.
        return max(range(len(law)), key=law.__getitem__)

    def observe(self, outcome: Outcome) -> None:
        """Follow the times of steps without prompts, learn from what this policy decided, and
        compute the law of the next step, which most likely has the batch of the last one."""
        if not outcome.has_prefill and outcome.step_s > outcome.plan_s:
            self._observe_time(outcome)
        if isinstance(law := outcome.decision.note, Law):
            self.learn(outcome, law.chances)
        self._ahead.clear()
        if self._seen is not None:
            self._law_of(*self._seen)

    def _observe_time(self, outcome: Outcome) -> None:
        k = max(outcome.rows.num_verified, default=0) if outcome.decision.draft_k else 0
        if outcome.decision.allocation is not None:
            k = outcome.decision.draft_k  # all of it was drafted, whatever was cut
        # A step whose drafter found nothing to propose is no plain step: it has looked.
        if bool(k) == bool(outcome.decision.draft_k):
            self.costs.observe(k, outcome.batch, outcome.step_s - outcome.plan_s)

    def on_swap(self, drafter: str, version: int, calibration: dict[str, Any]) -> None:
        """Forget what the former weights brought."""
        if drafter == self.drafter:
            self._ahead.clear()
            self.version = version
            self.forget(calibration)

    def figures(self) -> dict[str, Any]:
        """JSON-ready state."""
        return {
            "kind": self.kind,
            "drafter": self.drafter,
            "decisions": {str(k): count for k, count in sorted(self._counts.items())},
            "step_time": self.costs.figures(),
            **self.state(),
        }


def tokens_by_k(outcome: Outcome, most: int) -> list[float]:
    """[most + 1] mean tokens of a row, had K been 0, 1, ... most; known up to the K that ran."""
    accepted = outcome.rows.num_accepted
    counts = Counter(accepted)
    tokens, rows = [1.0], max(len(accepted), 1)
    longer = len(accepted)
    for k in range(1, most + 1):
        longer -= counts[k - 1]
        tokens.append(tokens[-1] + longer / rows)
    return tokens
