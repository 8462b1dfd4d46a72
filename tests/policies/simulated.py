"""A simulated engine with known acceptance and step times, so that the best arm is known too.

Step times scatter and have tails, start-up profiles may be wrong, requests may be of unequal
difficulty, a neural drafter must catch up after steps without it, and rounds beside prompts are not
timed. The policy sees drawn tokens and such times; speeds are made of expected tokens and expected
seconds of the arms that it chose, so that short runs compare closely.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import accumulate
from math import exp, log
from operator import mul
from typing import Any

from policies.interface import (
    CostSample,
    Decision,
    DraftPolicy,
    DraftRecord,
    Outcome,
    PolicyContext,
    RowOutcomes,
    StepObs,
)


@dataclass(frozen=True)
class Traits:
    """Satisfies ``DrafterTraits``."""

    on_device: bool
    needs_match: bool
    prior_acceptance: tuple[float, ...]
    prior_draft_cost: float
    picks_itself: bool = False
    former_of: str | None = None


NEURAL = Traits(True, False, (0.6,), 0.08)
INDEX = Traits(False, True, (0.0, 0.35, 0.45, 0.55, 0.7, 0.8), 0.005)
DRAFTERS = {"eagle3": NEURAL, "suffix": INDEX}


def context(
    drafters: Mapping[str, Traits] = DRAFTERS,
    max_draft: int = 8,
    seed: int = 0,
    mixes: Mapping[str, tuple[str, ...]] | None = None,
) -> PolicyContext:
    return PolicyContext(drafters, max_draft, seed, mixes or {})


@dataclass(frozen=True)
class Rows:
    """Rows whose match is of one kind."""

    share: float
    """Share of rows in a step."""
    suffix: float
    """Acceptance of the index at every position."""
    shift: float = 0.0
    """Added to the log-odds of a neural drafter's acceptance."""


@dataclass(frozen=True)
class Noise:
    """How step times vary."""

    scatter: float = 0.03
    """Standard deviation of the logarithm; the mean is kept."""
    late_share: float = 0.002
    late_s: float = 0.02
    """Steps that are late by up to this many seconds, evenly spread."""

    @property
    def mean_late_s(self) -> float:
        return self.late_share * self.late_s / 2

    def draw(self, seconds: float, rng: random.Random) -> float:
        factor = rng.lognormvariate(-(self.scatter**2) / 2, self.scatter)
        late = rng.random() * self.late_s if rng.random() < self.late_share else 0.0
        return seconds * factor + late


@dataclass(frozen=True)
class World:
    """The traffic and the machine that a policy faces."""

    batch: int = 1
    eagle: tuple[float, ...] = (0.8,) * 8
    """Conditional acceptance of the neural drafter at position 1, 2, ..."""
    suffix: float = 0.8
    """Acceptance of the index at every position of a row with a match."""
    match_share: float = 0.0
    """Share of rows that have a match (of kind 4) in a step."""
    rows: Mapping[int, Rows] = field(default_factory=dict)
    """Rows by kind of match, in place of ``suffix`` and ``match_share``; the rest has no match."""
    others: Mapping[str, tuple[float, ...]] = field(default_factory=dict)
    """Conditional acceptance of further neural drafters, by kind."""
    mixes: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """Drafters that may draft in one step, by name."""
    are_opposed: bool = False
    """What is hard for the first neural drafter is easy for the others."""
    difficulties: tuple[float, ...] = (0.0,)
    """Added to the log-odds of acceptance, one drawn for each request."""
    groups: Mapping[float, int] = field(default_factory=dict)
    """Group of a request by its difficulty, as the policy is told; empty: it is told nothing."""
    request_tokens: int = 100
    plain_s: float = 0.010
    verify_per_token_s: float = 0.0003
    """Seconds for each draft token and row."""
    draft_s: float = 0.001
    """Seconds of a neural drafter for each draft token, at any batch."""
    plan_s: float = 0.0
    """Seconds to plan; the fixed arms of comparisons do without."""
    look_s: float = 0.0
    """Seconds to look up matches; fixed arms of the index take them too."""
    index_s: float = 0.0
    """Seconds by which a draft of the index lengthens a step whatever its length: the host makes it
    while nothing runs on the device."""
    hidden_look_s: float = 0.0
    """Seconds for each request by which a look at its matches lengthens the step, and which do not
    count as planning: the host looks while the device works, and has less time for all else."""
    cold_s: float = 0.0
    """Seconds a neural drafter needs to catch up after a step without it; not in the profile."""
    row_s: float = 0.0
    """Seconds for each row that it then computes."""
    copy_s: float = 0.0
    """Seconds by which copying other weights lengthens the next step, whoever drafts in it."""
    fresh_share: float = 0.0
    """Share by which drafting steps are longer that follow another arm,"""
    fresh_steps: int = 1
    """and so many steps in all: what repeats is faster on real machines."""
    text_tokens: int = 290
    """Rows of a request that are computed again where former weights come back."""
    slowdown: float = 1.0
    noise: Noise = Noise()
    untimed_share: float = 0.0
    """Share of steps beside prompts, whose times mean nothing."""
    max_draft: int = 8
    has_index: bool = True

    @property
    def drafters(self) -> tuple[str, ...]:
        return ("eagle3", *(("suffix",) if self.has_index else ()), *self.others, *self.mixes)

    @property
    def neural(self) -> Mapping[str, tuple[float, ...]]:
        return {"eagle3": self.eagle, **self.others}

    @cached_property
    def kinds_of_rows(self) -> Mapping[int, Rows]:
        """All rows by kind of match, those without a match included."""
        known = dict(self.rows) or {4: Rows(self.match_share, self.suffix)}
        return {0: Rows(1 - sum(rows.share for rows in known.values()), 0.0), **known}

    def matches(self, rng: random.Random) -> tuple[int, ...]:
        kinds = list(self.kinds_of_rows)
        if len(kinds) == 1 or not self.has_index:
            return (0,) * self.batch
        shares = [rows.share for rows in self.kinds_of_rows.values()]
        return tuple(rng.choices(kinds, shares, k=self.batch))

    def hazards(self, drafter: str, match: int, difficulty: float) -> tuple[float, ...]:
        """Acceptance of each draft token whose predecessors were accepted."""
        key = (drafter, match, difficulty)
        found = self._hazards.get(key)
        if found is None:
            rows = self.kinds_of_rows[match]
            if drafter == "suffix":
                found = (_moved(rows.suffix, difficulty),) * self.max_draft if match else ()
            else:
                sign = -1 if self.are_opposed and drafter != "eagle3" else 1
                found = tuple(
                    _moved(c, sign * difficulty + rows.shift) for c in self.neural[drafter]
                )
            self._hazards[key] = found
        return found

    @cached_property
    def _hazards(self) -> dict[tuple[str, int, float], tuple[float, ...]]:
        return {}

    def expected(self, drafter: str, match: int, difficulty: float, k: int) -> float:
        """Expected tokens of one row."""
        key = (drafter, match, difficulty)
        found = self._expected.get(key)
        if found is None:
            survivals = accumulate(self.hazards(*key), mul)
            found = self._expected[key] = list(accumulate(survivals, initial=1.0))
        return found[min(k, len(found) - 1)]

    @cached_property
    def _expected(self) -> dict[tuple[str, int, float], list[float]]:
        return {}

    def seconds(self, drafter: str, k: int) -> tuple[float, float]:
        """(step, draft), late steps aside."""
        num_neural = len(self.rows_of(drafter))
        draft = self.draft_s * k * num_neural
        if not num_neural and k:
            draft = 0.00002 * k + self.index_s
        step = self.plain_s + self.verify_per_token_s * k * self.batch + draft
        return self.slowdown * step, self.slowdown * draft

    def rows_of(self, drafter: str) -> set[str]:
        """Neural drafters whose rows a step computes."""
        return {kind for kind in self.mixes.get(drafter, (drafter,)) if kind in self.neural}

    def profile(self, scale: float = 1.0, draft: float = 1.0, slope: float = 1.0):
        """The samples that a server takes at start-up, wrong by these factors: on all times, on
        drafting, and on verification of each token."""
        arms = [("none", 0)] + [(d, k) for d in (*self.neural, *self.mixes) for k in (1, 2, 4, 8)]
        wrong = replace(
            self,
            slowdown=scale,
            draft_s=self.draft_s * draft,
            verify_per_token_s=self.verify_per_token_s * slope,
        )
        return [
            CostSample(d, k, batch, *replace(wrong, batch=batch).seconds(d, k))
            for d, k in arms
            for batch in (1, 4, 16, 64)
        ]


@dataclass
class Totals:
    tokens: float = 0.0
    seconds: float = 0.0
    by_difficulty: Counter[float] = field(default_factory=Counter)
    """These tokens by difficulty of the requests."""

    @property
    def speed(self) -> float:
        return self.tokens / self.seconds


class Simulation:
    """One server: a policy, and requests that outlast changes of the world."""

    def __init__(self, policy: DraftPolicy, seed: int) -> None:
        self.policy = policy
        self.version = 0
        self._rng = random.Random(seed)
        self._step = 0
        self._last_drafter = "none"
        self._last_arm, self._num_alike = ("none", 0), 0
        """The last decision, and the steps in a row that it was made before."""
        self._missing: list[int] = []
        """Rows of each request that the neural drafters lack."""
        self._is_copied = False
        """Other weights were copied since the last step."""
        self._left: list[int] = []
        self._difficulty: list[float] = []
        self._records: list[dict[str, DraftRecord]] = []

    def swap(self, version: int, calibration: dict[str, Any]) -> None:
        """Other weights; the world's acceptance must be changed to match."""
        self.version = version
        self._is_copied = True
        self.policy.on_swap("eagle3", version, calibration)

    def forget(self, world: World) -> None:
        """Former weights have come back: no row of the others' is used."""
        self._last_drafter = "none"
        self._missing = [world.text_tokens] * len(self._missing)

    def run(
        self,
        world: World,
        steps: int,
        on_step: Callable[[Decision, RowOutcomes], object] | None = None,
    ) -> Totals:
        """Decode; returns expected tokens and seconds of the chosen arms."""
        totals = Totals()
        for _ in range(steps):
            decision, rows, tokens, seconds = self._decode(world)
            totals.tokens += sum(tokens.values())
            totals.seconds += seconds
            totals.by_difficulty.update(tokens)
            if on_step:
                on_step(decision, rows)
        return totals

    def _decode(self, world: World) -> tuple[Decision, RowOutcomes, dict[float, float], float]:
        rng = self._rng
        self._admit(world)
        matches = self._matches(world)
        decision, plan_s, seen = self.policy.rest(), 0.0, False
        if decision is None:
            seen = world.has_index and self.policy.wants_matches()
            plan_s = world.plan_s + seen * world.look_s
            decision = self.policy.plan(self._seen(world, matches if seen else None))
            if decision.reason == "rest":  # a glance was enough
                plan_s = world.look_s
        drafter, k = decision.drafter, decision.draft_k
        groups = self._groups(world)
        who = [pick.drafter for pick in decision.picks or ()] or [drafter] * world.batch
        drafts = [
            world.hazards(kind, match, hard)[:k] if k else ()
            for kind, match, hard in zip(who, matches, self._difficulty, strict=True)
        ]
        accepted = [draw(hazards, rng) for hazards in drafts]
        rows = RowOutcomes(
            list(map(len, drafts)),
            accepted,
            matches if seen else None,
            who if decision.picks else None,
            groups,
        )
        rows = self._judged(world, drafter, rows)
        tokens = dict.fromkeys(self._difficulty, 0.0)
        alike = Counter(zip(who, matches, self._difficulty, strict=True))
        for (kind, match, hard), num in alike.items():
            tokens[hard] += num * (world.expected(kind, match, hard, k) if k else 1.0)
        step_s, draft_s = world.seconds(drafter, k)
        step_s += plan_s + seen * world.hidden_look_s * world.batch
        is_again = self._last_arm == (drafter, k)
        self._num_alike = self._num_alike + 1 if is_again else 0
        self._last_arm = drafter, k
        if k and self._num_alike < world.fresh_steps:
            step_s *= 1 + world.fresh_share
        own = world.rows_of(drafter)
        is_neural = bool(own)
        caught_up = 0
        if not own <= world.rows_of(self._last_drafter):
            caught_up = sum(self._missing)
            step_s += world.cold_s + world.row_s * caught_up
        if self._is_copied:
            step_s += world.copy_s
        measured_s = world.noise.draw(step_s, rng)
        untimed = rng.random() < world.untimed_share
        follows_swap, self._is_copied = self._is_copied and world.copy_s > 0, False
        self.policy.observe(
            Outcome(
                decision,
                world.batch,
                rows,
                measured_s * (3 if untimed else 1),
                (draft_s + plan_s) * measured_s / step_s,
                untimed or follows_swap,
                self.version,
                plan_s=plan_s * measured_s / step_s,
                num_caught_up=caught_up,
            )
        )
        self._left = [left - 1 - kept for left, kept in zip(self._left, accepted, strict=True)]
        self._missing = [
            0 if is_neural else missing + 1 + kept
            for missing, kept in zip(self._missing, accepted, strict=True)
        ]
        for record, kind, draft, kept in zip(self._records, who, drafts, accepted, strict=True):
            if draft:
                num, tried, own = record.get(kind, (0.0, 0.0, 0.0))
                record[kind] = DraftRecord(
                    31 / 32 * num + 1, 31 / 32 * tried + len(draft), 31 / 32 * own + kept
                )
        self._last_drafter = drafter
        self._step += 1
        return decision, rows, tokens, step_s + world.noise.mean_late_s

    def _judged(self, world: Any, drafter: str, rows: RowOutcomes) -> RowOutcomes:
        """Add what other drafters would have kept, where that is known."""
        return rows

    def _matches(self, world: World) -> tuple[int, ...]:
        """Kind of the match of each request in this step."""
        return world.matches(self._rng)

    def _admit(self, world: World) -> None:
        """Replace requests that have ended, so that the batch is full."""
        del self._left[world.batch :], self._difficulty[world.batch :]
        del self._missing[world.batch :], self._records[world.batch :]
        for r in range(world.batch):
            if r == len(self._left):
                self._left.append(0)
                self._difficulty.append(0.0)
                self._missing.append(0)
                self._records.append({})
            if self._left[r] <= 0:
                self._left[r] = self._rng.randint(1, 2 * world.request_tokens)
                self._difficulty[r] = self._rng.choice(world.difficulties)
                self._missing[r] = 0
                self._records[r] = {}

    def _seen(self, world: World, matches: tuple[int, ...] | None) -> StepObs:
        return StepObs(
            step=self._step,
            batch=world.batch,
            caps=bytes((world.max_draft,)) * world.batch,
            matches=None if matches is None else bytes(matches),
            drafters=tuple(d for d in world.drafters if "suffix" not in d or matches is not None),
            max_draft=world.max_draft,
            version=self.version,
            pending_rows=dict.fromkeys((*world.neural, *world.mixes), sum(self._missing)),
            records=tuple(self._records) if world.mixes else None,
            groups=self._groups(world),
        )

    def _groups(self, world: World) -> bytes | None:
        return bytes(world.groups[hard] for hard in self._difficulty) if world.groups else None


def run(policy, world, *, steps, seed, on_step=None):
    """Decode ``steps`` steps with a policy that may have decoded before."""
    return Simulation(policy, seed).run(world, steps, on_step)


def draw(hazards: Sequence[float], rng: random.Random) -> int:
    """Number of draft tokens that are accepted."""
    accepted = 0
    for hazard in hazards:
        if rng.random() >= hazard:
            break
        accepted += 1
    return accepted


def fixed_speed(
    world: World, drafter: str, k: int, tokens: Mapping[float, float] | None = None
) -> float:
    """Expected tokens per second of a fixed arm.

    Args:
        tokens: that were decoded, by difficulty of the requests: the arm decodes the same, so that
            the luck of a run with its requests is no figure of its policy. ``None``: as many of
            each difficulty.
    """
    tokens = tokens or dict.fromkeys(world.difficulties, 1.0)
    row_steps = 0.0
    for hard, number in tokens.items():
        each = sum(
            rows.share * (world.expected(drafter, match, hard, k) if k else 1.0)
            for match, rows in world.kinds_of_rows.items()
        )
        row_steps += number / each
    look_s = world.look_s + world.hidden_look_s * world.batch if drafter == "suffix" else 0.0
    step_s = world.seconds(drafter, k)[0] + world.noise.mean_late_s + look_s
    return world.batch * sum(tokens.values()) / row_steps / step_s


def arms(world: World) -> Iterator[tuple[str, int]]:
    """Every fixed arm, plain decoding included."""
    yield "none", 0
    for drafter in world.drafters:
        for k in range(1, world.max_draft + 1):
            yield drafter, k


def best_fixed_speed(*worlds: World, tokens: Sequence[Mapping[float, float]] = ()) -> float:
    """Tokens per second of the best fixed arm, over worlds with equally many tokens each.

    Args:
        tokens: of each world, as in ``fixed_speed``; empty: as many of each difficulty.
    """
    each = list(zip(worlds, tokens, strict=True)) if tokens else [(one, None) for one in worlds]
    return max(
        len(worlds) / sum(1 / fixed_speed(world, *arm, tokens=own) for world, own in each)
        for arm in arms(worlds[0])
    )


def calibration(world: World, positions: int = 4) -> dict[str, Any]:
    """What a trainer publishes with the weights of a world."""
    reached, published = 1.0, []
    survivals = [
        list(accumulate(world.hazards("eagle3", match, hard), mul))
        for match, rows in world.kinds_of_rows.items()
        for hard in world.difficulties
        if rows.share > 0
    ]
    for j in range(positions):
        kept = sum(s[j] for s in survivals) / len(survivals)
        published.append(kept / reached)
        reached = kept
    return {"acceptance": published}


def _moved(hazard: float, shift: float) -> float:
    if not shift or not 0 < hazard < 1:
        return hazard
    return 1 / (1 + exp(-log(hazard / (1 - hazard)) - shift))
