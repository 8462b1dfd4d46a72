"""What learning costs and brings, and whether the trainer learns at all.

A trainer that learns on and on uses a device for nothing once its drafter fits the traffic. With
``trainer.payback_s`` it pauses when learning has not earned what it took, and with ``trainer.learn:
on_drift`` when candidates are no better any more. Acceptance that falls on live traffic wakes it.

It also says when learning is urgent, for ``trainer.allowance``: while nothing has been learnt yet
and after acceptance has fallen, until candidates are no better.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from buffer.records import Manifest
from configs.schema import TrainerSettings
from drafters.samples import Sample, Steps
from policies.cost_table import CostTable, unique_pairs
from policies.drift import DriftWatch
from policies.payback import Payback
from trainer.allowance import Allowance
from trainer.gate import Judgement

ENOUGH_REFUSED = 3
"""Candidates refused in a row from which on ``on_drift`` has nothing more to learn."""

Tell = Callable[..., None]
"""``Journal.event``."""


@dataclass(slots=True)
class Worth:
    """The account of learning, the drift of the traffic, and what follows from both."""

    settings: TrainerSettings
    tell: Tell
    payback: Payback
    costs: CostTable = field(default_factory=CostTable)
    drift: DriftWatch = field(default_factory=DriftWatch)
    rests: str | None = None
    """Why the trainer does not learn now; ``None``: it does."""
    looked_s: float = field(default_factory=time.monotonic)
    """Monotonic time up to which the window of the payback has been told."""
    allowance: Allowance | None = None
    """What learning may cost a server on the same device; ``None``: it does not depend on whether
    learning is urgent."""
    drafter: str = ""
    """Name of the drafter that learns, among those that share the allowance."""
    num_refused: int = 0
    """Candidates refused in a row since learning became urgent."""

    def begin(self, published: Manifest) -> None:
        """The trainer starts from this version. One that a trainer has judged before fits some
        traffic: with ``on_drift``, whether it fits this one is measured first."""
        self.looked_s = time.monotonic()
        if not published.policy.get("acceptance"):
            self.hurry("nothing has been learnt yet")
        if self.settings.learn == "on_drift" and published.policy.get("acceptance"):
            self._rest(f"version {published.version} has learnt, and drift is measured first")

    def take_in(self, samples: Sequence[Sample]) -> None:
        """Learn from traces what steps take, what they saved, and whether acceptance has fallen."""
        found = [(x.domain, x.steps) for x in samples if x.steps and len(x.steps.batch_R)]
        if not found:
            return
        joined = Steps.joined([steps for _, steps in found])
        counts = (joined.draft_k_R == 0) | joined.is_own_R
        self.costs.observe(
            joined.batch_R[counts], joined.draft_k_R[counts], joined.step_s_R[counts], len(found)
        )
        self._account(joined)
        for domain, steps in found:
            self._watch(domain, steps)

    def spend(self, seconds: float) -> None:
        """Learning took so long."""
        self.payback.spend(seconds)

    def look(self) -> None:
        """Pause if a window is over that has not paid. Call it often."""
        now_s = time.monotonic()
        passed_s, self.looked_s = now_s - self.looked_s, now_s
        if self.rests is not None:
            return
        account = self.payback
        spent_s, earned_s = account.window_spent_s, account.window_earned_s
        if account.passed(passed_s):
            self._rest(
                f"learning took {spent_s:.1f} s and has saved {earned_s:.1f} s of serving within "
                f"trainer.payback_s = {account.within_s:g} s"
            )

    def judged(self, judgement: Judgement, refused_in_row: int) -> None:
        """A candidate was judged, and published if it passed."""
        gain = judgement.gain_over_static
        if gain is not None:
            self.payback.gain = gain
        self.num_refused = 0 if judgement.verdict.passed else self.num_refused + 1
        if self.num_refused >= ENOUGH_REFUSED:
            self._calm()
        if self.settings.learn == "on_drift" and refused_in_row >= ENOUGH_REFUSED:
            self._rest(f"{refused_in_row} candidates in a row were no better")

    def replace_target(self) -> None:
        """The target has other weights. A paused trainer goes on pausing as long as acceptance is
        what it was; if that is not known, it learns."""
        if not self.drift.replace_target() and self.rests is not None:
            self.tell(
                "woke",
                text="the target has other weights, and acceptance under the former ones is not "
                "known: learning goes on",
            )
            self._go_on()

    def figures(self) -> dict[str, Any]:
        """For the status."""
        return {
            "payback": self.payback.figures(),
            "drift": self.drift.figures(),
            "paused": self.rests,
        }

    def to_json(self) -> dict[str, Any]:
        """What a restart must remember."""
        return {"payback": self.payback.to_json(), "rests": self.rests}

    def restore(self, stored: dict[str, Any]) -> None:
        """Become what ``to_json`` described."""
        self.payback.restore(stored.get("payback", {}))
        can_rest = self.settings.learn == "on_drift" or self.settings.payback_s is not None
        self.rests = stored.get("rests") if can_rest else None

    def _watch(self, domain: str, steps: Steps) -> None:
        """Whether acceptance has fallen in one trace."""
        drafted = steps.is_own_R & (steps.num_drafted_R > 0)
        kept = int((steps.num_accepted_R[drafted] > 0).sum())
        version = int(steps.version_R[drafted].max()) if drafted.any() else 0
        same = drafted & (steps.version_R == version)
        if same.sum() == drafted.sum() and self.drift.observe(
            domain, version, int(drafted.sum()), kept
        ):
            self._wake(version)

    def _account(self, steps: Steps) -> None:
        """A round's share of its step's time, and of what a plain step would have taken."""
        decode_s = plain_s = own_s = 0.0
        counts_R = (steps.is_own_R | (steps.draft_k_R == 0)) & (steps.batch_R > 0)
        pairs, which_R = unique_pairs(steps.batch_R[counts_R], steps.draft_k_R[counts_R])
        rounds, tokens, own = (
            np.bincount(which_R, weights, len(pairs)).tolist()
            for weights in (
                None,
                1.0 + steps.num_accepted_R[counts_R],
                steps.is_own_R[counts_R],
            )
        )
        for place, (batch, k) in enumerate(pairs):
            each_s, plain_each_s = self.costs.step_s(batch, k), self.costs.step_s(batch, 0)
            if each_s is None or plain_each_s is None:
                continue
            decode_s += each_s / batch * rounds[place]
            plain_s += plain_each_s / batch * tokens[place]
            own_s += each_s / batch * own[place]
        self.payback.serve(decode_s, plain_s, own_s)

    def hurry(self, why: str) -> None:
        """What is learnt now pays back soon."""
        self.num_refused = 0
        if self.allowance is not None:
            self.allowance.hurry(self.drafter, why)

    def _calm(self) -> None:
        if self.allowance is not None:
            self.allowance.calm(self.drafter)

    def _rest(self, reason: str) -> None:
        self._calm()
        if self.rests is None:
            self.rests = reason
            self.tell("paused", text=reason)

    def _wake(self, version: int) -> None:
        self.tell("drift", version=version, woke=self.rests is not None)
        self.hurry("acceptance has fallen")
        self._go_on()

    def _go_on(self) -> None:
        self.rests = None
        self.payback.begin()
        self.looked_s = time.monotonic()
