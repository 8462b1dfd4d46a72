"""Goodput's K as a budget of verification for the whole batch, spent where drafts are confident.

``goodput`` chooses a drafter and K. Here the drafter proposes some tokens more for every request,
and the device verifies as many draft tokens over the batch as ``goodput`` would have, those with
the highest products of top probabilities. Verification takes as long as before, drafting longer;
whether that pays is measured: for every size of batch both ways run in turns, most steps in the
way that has brought more tokens per second. What ``goodput`` learns comes from steps as it planned
them alone, because drafts that were cut by confidence say nothing of others.

Source: the selection is that of TETRIS (arXiv:2502.15197), with the likeliest token's probability
in place of the drawn one's, which would not be lossless.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar, NamedTuple, Self

from configs.policies import RaggedSettings
from configs.schema import PolicySettings
from policies.allocation import Allocation, Cut
from policies.average import Average
from policies.goodput import GoodputPolicy
from policies.interface import (
    CostSample,
    Decision,
    DraftPolicy,
    Outcome,
    PolicyContext,
    StepObs,
)
from policies.live_costs import size_of

_CUT = Cut("top", cumulative=True)
_GAIN = 0.02
_LEAST_STEPS = 16
"""Steps of each way from which on they are compared."""
_OTHER_SHARE = 1 / 8
"""Share of steps in the way that seems slower."""


class _Way:
    """Tokens and seconds of steps of one way, for one size of batch."""

    def __init__(self) -> None:
        self.tokens, self.seconds = Average(_GAIN), Average(_GAIN)

    @property
    def rate(self) -> float:
        """Tokens per second and request."""
        return self.tokens.mean / self.seconds.mean


class _Drawn(NamedTuple):
    """The note of every decision."""

    inner: Decision
    """As ``goodput`` made it."""

    def columns(self) -> Mapping[str, float]:
        return self.inner.columns()


class RaggedPolicy:
    """Implements ``DraftPolicy`` around ``goodput``."""

    kind = "ragged"
    wants_profile = True
    wants_guard = False
    """``goodput`` has a floor, and a way that is slower is left."""
    device_cuts: ClassVar = (_CUT,)

    def __init__(self, inner: GoodputPolicy, context: PolicyContext, own: RaggedSettings) -> None:
        self.inner = inner
        self._on_device = {kind for kind, traits in context.drafters.items() if traits.on_device}
        self._max_draft, self._extra = context.max_draft, own.extra
        self._rng = random.Random(context.seed + 2)
        self._ways: dict[int, tuple[_Way, _Way]] = {}
        """By size of batch: as planned, and ragged."""
        self._batch = 1
        """Of the last step seen: a resting policy is not told."""

    @classmethod
    def from_settings(cls, settings: PolicySettings, context: PolicyContext) -> Self:
        """Read the settings of ``goodput`` and ``policy.ragged``."""
        return cls(GoodputPolicy.from_settings(settings, context), context, settings.ragged)

    def calibrate(self, samples: Sequence[CostSample]) -> None:
        """Pass them on."""
        self.inner.calibrate(samples)

    def start_from(self, other: DraftPolicy) -> None:
        """Take over what ``goodput`` does.

        Raises:
            TypeError: the other one is of another class.
        """
        if not isinstance(other, RaggedPolicy):
            raise TypeError(f"start_from needs a RaggedPolicy, got {type(other).__name__}")
        self.inner.start_from(other.inner)

    def rest(self) -> Decision | None:
        """As ``goodput`` rests, ragged or not."""
        decision = self.inner.rest()
        return None if decision is None else self._drawn(decision, self._max_draft)

    def wants_matches(self) -> bool:
        """As ``goodput`` wants."""
        return self.inner.wants_matches()

    def match_values(self, drafter: str) -> list[float] | None:
        """As ``goodput`` knows them."""
        return self.inner.match_values(drafter)

    def plan(self, obs: StepObs) -> Decision:
        """As ``goodput`` plans, ragged or not."""
        self._batch = obs.batch
        return self._drawn(self.inner.plan(obs), obs.max_draft)

    def _drawn(self, inner: Decision, most: int) -> Decision:
        """A decision of ``goodput``, as it is or with longer drafts under its budget."""
        k = min(inner.draft_k + self._extra, most)
        can_be = inner.drafter in self._on_device and not inner.explore
        if not can_be or k <= inner.draft_k or self._batch < 2:
            return replace(inner, policy=self.kind, note=_Drawn(inner))
        share = self._ragged_share()
        if self._rng.random() >= share:
            chance = inner.propensity * (1 - share)
            # Ways are compared on steps of both that could have been either.
            return replace(
                inner, policy=self.kind, propensity=chance, reason="planned", note=_Drawn(inner)
            )
        allocation = Allocation(_CUT, 0.0, budget_each=float(inner.draft_k))
        return replace(
            inner, policy=self.kind, propensity=inner.propensity * share, reason="ragged",
            draft_k=k, allocation=allocation, note=_Drawn(inner),
        )  # fmt: skip

    def _ragged_share(self) -> float:
        """Probability of a ragged step."""
        planned, ragged = self._ways.setdefault(size_of(self._batch), (_Way(), _Way()))
        if min(planned.seconds.num, ragged.seconds.num) < _LEAST_STEPS:
            return 0.5
        return 1 - _OTHER_SHARE if ragged.rate > planned.rate else _OTHER_SHARE

    def observe(self, outcome: Outcome) -> None:
        """Compare both ways, and pass on steps that ran as ``goodput`` planned them."""
        self._batch = outcome.batch
        decision = outcome.decision
        is_timed = not outcome.has_prefill and outcome.step_s > outcome.plan_s
        if decision.reason in ("planned", "ragged") and is_timed and len(outcome.rows):
            ways = self._ways.setdefault(size_of(outcome.batch), (_Way(), _Way()))
            way = ways[decision.reason == "ragged"]
            kept = outcome.rows.num_accepted
            way.tokens.add(1 + sum(kept) / len(kept))
            way.seconds.add(outcome.step_s - outcome.plan_s)
        if isinstance(drawn := decision.note, _Drawn) and decision.allocation is None:
            # The engine may have held it to what the requests allow.
            inner = replace(drawn.inner, drafter=decision.drafter, draft_k=decision.draft_k)
            self.inner.observe(replace(outcome, decision=inner))
        else:
            self.inner.prepare(outcome.batch)

    def on_swap(self, drafter: str, version: int, calibration: dict[str, Any]) -> None:
        """Compare anew."""
        self._ways.clear()
        self.inner.on_swap(drafter, version, calibration)

    def figures(self) -> dict[str, Any]:
        """Those of ``goodput``, and under ``ragged`` tokens per second and request of both ways by
        size of batch. JSON-ready."""
        ragged = {
            str(2**size): [None if not way.seconds.num else round(way.rate, 3) for way in ways]
            for size, ways in self._ways.items()
        }
        return {**self.inner.figures(), "kind": self.kind, "ragged": ragged}
