"""A log on which any policy can be played: what every K brings and takes in each of its steps.

Exact as far as ``policies.logged`` says. What stays out: which tokens come next does not depend on
the K that is played, so a replayed step begins where the logged one began; and what it costs to
come back to a drafter after plain steps is not charged, because a step table does not know it.

Shapes: S steps, K the largest draft length.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import compress
from typing import Any

import numpy as np
from numpy.typing import NDArray

from policies.allocation import NUM_FIGURES
from policies.costs import CostTable
from policies.interface import (
    CostSample,
    Decision,
    DrafterTraits,
    DraftPolicy,
    Outcome,
    PolicyContext,
    RowOutcomes,
    StepObs,
)
from policies.logged import (
    Continuations,
    Floats,
    LoggedStep,
    cut_score,
    hazards_of,
    of_drafter,
    scores_of,
)

_LEAST_HASTE, _MOST_HASTE = 0.25, 4.0
"""Bounds on the time of a logged step relative to the table's."""


@dataclass(frozen=True, slots=True)
class _Traits:
    """What a log knows of its drafter."""

    on_device: bool = True
    needs_match: bool = False
    picks_itself: bool = False
    prior_acceptance: tuple[float, ...] = (0.6,)
    prior_draft_cost: float = 0.05
    former_of: str | None = None


@dataclass(frozen=True, slots=True, eq=False)
class ReplayedLog:
    """Steps of one drafter, and all that is known of every K in them."""

    drafter: str
    max_draft: int
    steps: tuple[LoggedStep, ...]
    hazards: Floats
    """[K] Kaplan-Meier, from all steps."""
    reached: NDArray[np.int64]
    """[K] rounds behind each hazard."""
    tokens: Floats
    """[S, K + 1] of the whole batch."""
    extrapolated: Floats
    """[S, K + 1] of these, by hazards."""
    seconds: Floats
    """[S, K + 1]."""
    table: CostTable
    beyond: Continuations
    """What would have been kept of positions that were not verified."""
    known_cuts: dict[tuple[int, int, int, int], list[int] | None] = field(default_factory=dict)
    """What ``policies.budgets.cut_rows`` has found: a fit asks for the same again and again."""

    @classmethod
    def of(
        cls,
        steps: Sequence[LoggedStep],
        drafter: str,
        samples: Sequence[CostSample],
        max_draft: int,
        hazards: Floats | None = None,
    ) -> ReplayedLog:
        """
        Args:
            steps: those of other drafters are left out.
            samples: step times.
            hazards: of another part of the log; ``None``: of these steps.

        Raises:
            ValueError: nothing was drafted, or times are missing.
        """
        own = tuple(of_drafter(steps, drafter))
        counted, reached = hazards_of(own, max_draft)
        used = counted if hazards is None else hazards
        table = CostTable(samples, drafter, max_draft)
        beyond = Continuations.of(own, used)
        scores = scores_of(own, used, beyond)
        return cls(
            drafter, max_draft, own, used, reached, scores.tokens, scores.extrapolated,
            table.of_steps(own), table, beyond,
        )  # fmt: skip

    def rows(self, kept: NDArray[np.bool_]) -> ReplayedLog:
        """Some of the steps, with the hazards and times of the whole.

        Args:
            kept: [S].
        """
        steps = tuple(compress(self.steps, kept.tolist()))
        return replace(
            self,
            steps=steps,
            tokens=self.tokens[kept],
            extrapolated=self.extrapolated[kept],
            seconds=self.seconds[kept],
            known_cuts={},
        )

    @property
    def survivors(self) -> Floats:
        """[S, K] requests of the whole batch that kept position 1, 2, ... and all before it, in the
        draft that was verified."""
        found = np.zeros((len(self.steps), self.max_draft))
        for at, step in enumerate(self.steps):
            for row in step.rows:
                found[at, : row.num_accepted] += step.batch / len(step.rows)
        return found

    @property
    def sizes(self) -> NDArray[np.int64]:
        """[S] size of each step's batch, see ``live_costs.size_of``."""
        return np.array([step.batch.bit_length() - 1 for step in self.steps], np.int64)

    @property
    def plain_rate(self) -> Floats:
        """[S] tokens per second of plain decoding."""
        rate: Floats = self.tokens[:, 0] / self.seconds[:, 0]
        return rate

    @property
    def traits(self) -> dict[str, DrafterTraits]:
        """Of the one drafter."""
        return {self.drafter: _Traits()}

    def context(self, seed: int = 0) -> PolicyContext:
        """What a policy that is played on the log is built for."""
        return PolicyContext(self.traits, self.max_draft, seed)

    def outcome(self, at: int, k: int, rng: random.Random) -> tuple[list[int], list[int]]:
        """Verified and kept tokens of each logged request of a step, had K been ``k``. Where that
        is unknown, further tokens are drawn by the hazards."""
        step = self.steps[at]
        verified, accepted = [], []
        for row in step.rows:
            longest = row.longest(step.draft_k)
            most = k if longest is None else min(k, longest)
            kept = min(row.num_accepted, most)
            if kept == row.num_verified < most:
                chances = self.beyond.probabilities(row)
                while kept < most and rng.random() < chances[kept]:
                    kept += 1
            verified.append(most)
            accepted.append(kept)
        return verified, accepted

    def lengths(self, at: int, decision: Decision) -> list[int]:
        """Lengths to which a decision cuts the drafts of a step's logged requests. Drafts without
        figures, and positions beyond those that were drafted, are not there to be verified."""
        step, allocation, k = self.steps[at], decision.allocation, decision.draft_k
        assert allocation is not None
        most = [min(k, k if (n := row.longest(step.draft_k)) is None else n) for row in step.rows]
        known = [0 if row.considered is None else row.considered.length for row in step.rows]
        figures = np.zeros((len(step.rows), k, NUM_FIGURES))
        for r, row in enumerate(step.rows):
            if row.considered is not None:
                own = np.array(row.considered.confidence).reshape(-1, NUM_FIGURES)[:k]
                figures[r, : len(own)] = own
        offered = [min(pair) for pair in zip(most, known, strict=True)]
        temperature = np.array([row.temperature for row in step.rows])
        found: list[int] = allocation.lengths(figures, offered, temperature, step.batch).tolist()
        return found

    def haste(self) -> Floats:
        """[S] time of each logged step relative to the table's; the median is 1."""
        taken = np.array([step.step_s for step in self.steps])
        timed = np.array([step.is_timed for step in self.steps], np.bool_)
        ks = np.minimum([step.draft_k for step in self.steps], self.max_draft)
        ratio = taken / self.seconds[np.arange(len(ks)), ks]
        ratio /= np.median(ratio[timed]) if timed.any() else 1.0
        return np.clip(ratio, _LEAST_HASTE, _MOST_HASTE)


@dataclass(frozen=True, slots=True, eq=False)
class Played:
    """What a policy did on a log."""

    ks: NDArray[np.int64]
    """[S] K of each step."""
    figures: dict[str, Any]
    """Of the policy, at the end."""
    cuts: dict[int, tuple[float, float, float]] = field(default_factory=dict)
    """Number of a step whose drafts were cut -> tokens of the whole batch, those of them that rest
    on hazards, and seconds."""
    verified: float = 1.0
    """Share of the draft tokens that is verified; 1 where nothing is drafted."""

    @property
    def is_cut(self) -> bool:
        return bool(self.cuts)

    def columns(self, log: ReplayedLog) -> tuple[Floats, Floats, Floats]:
        """[S] tokens, extrapolated ones among them, and seconds of every step."""
        at = np.arange(len(self.ks))
        tokens, extrapolated = log.tokens[at, self.ks], log.extrapolated[at, self.ks]
        seconds = log.seconds[at, self.ks]
        for step, found in self.cuts.items():
            tokens[step], extrapolated[step], seconds[step] = found
        return tokens, extrapolated, seconds


def play(policy: DraftPolicy, log: ReplayedLog, seed: int = 0) -> Played:
    """Let a policy decide every step of a log, and learn what its own K would have brought. Times
    scatter as those of the log did."""
    rng = random.Random(seed)
    policy.calibrate(log.table.samples(log.drafter))
    haste = log.haste().tolist()
    ks = np.zeros(len(log.steps), np.int64)
    version = None
    cuts: dict[int, tuple[float, float, float]] = {}
    num_drafted = num_verified = 0
    for at, step in enumerate(log.steps):
        if version is not None and step.version != version:
            policy.on_swap(log.drafter, step.version, {})
        version = step.version
        decision = _decided(policy, at, step, log)
        k = ks[at] = decision.draft_k
        verified, accepted = log.outcome(at, int(k), rng)
        num_drafted += sum(verified)
        seconds = float(log.seconds[at, k])
        if decision.allocation is not None and decision.allocation.may_cut and step.has_figures:
            verified = log.lengths(at, decision)
            accepted = list(map(min, accepted, verified))
            cuts[at] = found = _cut(log, at, decision, verified)
            seconds = found[2]
        num_verified += sum(verified)
        step_s = seconds * haste[at]
        policy.observe(
            Outcome(
                decision=decision,
                batch=step.batch,
                rows=RowOutcomes(verified, accepted, groups=bytes(r.group for r in step.rows)),
                step_s=step_s,
                draft_s=0.0,
                has_prefill=not step.is_timed,
                version=step.version,
                context=step.context,
            )
        )
    share = num_verified / num_drafted if num_drafted else 1.0
    return Played(ks, policy.figures(), cuts, share)


def _cut(
    log: ReplayedLog, at: int, decision: Decision, lengths: list[int]
) -> tuple[float, float, float]:
    """Tokens, extrapolated ones, and seconds of a step whose drafts are cut. Where rows are packed,
    verification takes as long as that of the rows there is room for."""
    step, k, allocation = log.steps[at], decision.draft_k, decision.allocation
    assert allocation is not None
    seconds = float(log.seconds[at, k])
    if allocation.budget_each is not None:
        each = allocation.budget(step.batch, k) / step.batch
        seconds -= log.table.saved(step.batch, k, each)
    return (*cut_score(step, lengths, log.beyond), seconds)


def _decided(policy: DraftPolicy, at: int, step: LoggedStep, log: ReplayedLog) -> Decision:
    resting = policy.rest()
    if resting is not None:
        return resting
    return policy.plan(
        StepObs(
            step=at,
            batch=step.batch,
            caps=bytes((log.max_draft,)) * step.batch,
            matches=None,
            drafters=(log.drafter,),
            max_draft=log.max_draft,
            version=step.version,
            groups=step.groups,
            context=step.context,
        )
    )
