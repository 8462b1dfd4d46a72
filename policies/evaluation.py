"""How every policy would have done on a log, against the best fixed K of each load in hindsight and
against an oracle that knows every round's outcome beforehand.

Speeds compare the time for the same tokens. At each load (size of the batch) a way of decoding has
a speed, tokens over seconds; over all loads it is the logged tokens over the time that they would
have taken. The oracle is the best quotient of all tokens and all seconds (Dinkelbach 1967), not the
mean of the best quotients, so nothing that takes one K for a whole step is above it; a policy whose
drafts the device cuts request by request may be.

Shapes: S steps, K the largest draft length.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from configs.schema import PolicySettings
from policies.catalog import CATALOG, build_policy, cuts_of, uncut
from policies.interface import Decision, DraftPolicy, StepObs
from policies.logged import Floats
from policies.off_policy import (
    Estimate,
    Reward,
    Sampled,
    by_position,
    importance_weights,
    mean_of,
    normalised,
    throughput,
)
from policies.replayed_log import Played, ReplayedLog, play

Ks = NDArray[np.int64]

_ROUNDS_OF_DINKELBACH = 50


@dataclass(frozen=True, slots=True)
class Load:
    """What is known of one size of batch."""

    smallest_batch: int
    num_steps: int
    best_k: int
    """Of the best fixed K."""
    plain_rate: float
    """Tokens per second of plain decoding,"""
    best_rate: float
    """of the best fixed K,"""
    oracle_rate: float
    """and of the oracle."""
    rates: tuple[float, ...]
    """[K + 1] of each fixed K."""


@dataclass(frozen=True, slots=True)
class Judged:
    """One policy on one log."""

    name: str
    rate: float
    """Tokens per second over all loads; mean over seeds."""
    over_plain: float
    regret_fixed: float
    """1 - rate / that of the best fixed K for each load; below 0 if it beats them."""
    regret_oracle: float
    headroom: float | None
    """Share of the gap between both that it closes; ``None`` if there is none."""
    mean_k: float
    """Mean over seeds, like all that follows."""
    extrapolated: float
    """Share of its tokens that rests on hazards."""
    verified: float
    """Share of its draft tokens that is verified; 1 unless the device cuts drafts."""
    plan_us: float | None
    """99th percentile of ``plan`` in microseconds of the processor; ``None`` for fixed K."""
    off_policy: Estimate | None
    """Doubly robust tokens per second, by the decisions that the log has in common with it."""


@dataclass(frozen=True, slots=True)
class Evaluation:
    """All policies on one log."""

    drafter: str
    num_steps: int
    num_rounds: int
    hazards: tuple[float, ...]
    reached: tuple[int, ...]
    measured_rate: float
    """Tokens per second of the log itself, by its own times."""
    table_rate: float
    """The same by the step table; far from it, the times are another machine's."""
    loads: tuple[Load, ...]
    policies: tuple[Judged, ...]
    """The fastest first."""


def evaluate(
    log: ReplayedLog,
    settings: PolicySettings,
    kinds: Iterable[str] = CATALOG,
    seeds: Sequence[int] = (0, 1, 2),
) -> Evaluation:
    """Judge every fixed K, and every policy of the catalog with these settings. Policies that let
    the device cut drafts are judged on logs that have figures of confidence alone."""
    bench = _Bench.of(log)
    judged = [bench.judge(f"fixed, K = {k}", [_always(log, k)], None) for k in _all_ks(log)]
    for kind in kinds:
        if kind == "fixed":
            continue
        own = settings.model_copy(update={"kind": kind, "drafter": log.drafter})
        for name, chosen in _variants(own, log).items():

            def build(seed: int, own: PolicySettings = chosen) -> DraftPolicy:
                return build_policy(own, log.traits, seed, log.max_draft)

            found = judge_policy(bench, name, build, seeds)
            if name == kind or found.rate != judged[-1].rate:  # or else nothing was cut
                judged.append(found)
    oracle = bench.judge("oracle of each round", [bench.oracle_ks], None)
    # It knows what came of the logged steps, so those that it shares are no fair sample.
    judged.append(replace(oracle, off_policy=None))
    taken = np.minimum([step.draft_k for step in log.steps], log.max_draft)
    at = np.arange(len(log.steps))
    return Evaluation(
        drafter=log.drafter,
        num_steps=len(log.steps),
        num_rounds=sum(len(step.rows) for step in log.steps),
        hazards=tuple(log.hazards.round(4).tolist()),
        reached=tuple(log.reached.tolist()),
        measured_rate=sum(s.tokens for s in log.steps) / sum(s.step_s for s in log.steps),
        table_rate=float(log.tokens[at, taken].sum() / log.seconds[at, taken].sum()),
        loads=bench.loads,
        policies=tuple(sorted(judged, key=lambda one: -one.rate)),
    )


def _variants(settings: PolicySettings, log: ReplayedLog) -> dict[str, PolicySettings]:
    """Settings by which a kind is judged on a log, by name: those that are given, and, where they
    let the device cut drafts of a policy that can do without, the same without cuts."""
    kind, whole = settings.kind, uncut(settings)
    if not cuts_of(settings):
        return {kind: settings}
    if not any(step.has_figures for step in log.steps):
        return {} if whole is None else {kind: whole}
    return {kind: settings} if whole is None else {kind: settings, f"{kind}, K alone": whole}


def judge_policy(
    bench: _Bench, name: str, build: Callable[[int], DraftPolicy], seeds: Sequence[int]
) -> Judged:
    """Play a policy with several seeds, and time its plans."""
    played, plans = [], []
    for seed in seeds:
        timed = _Timed(build(seed))
        played.append(play(timed, bench.log, seed))
        plans += timed.plans_s
    plan_us = 1e6 * float(np.percentile(plans, 99)) if plans else None
    return bench.judge(name, [one.ks for one in played], plan_us, played)


def best_ks(log: ReplayedLog, by: ReplayedLog | None = None) -> Ks:
    """[S] the best fixed K of each step's load.

    Args:
        by: the log that tells which is the best; ``None``: this one, in hindsight. A load that it
            does not have takes the best K of all.
    """
    by = log if by is None else by
    overall = int(_rates(by, np.ones(len(by.steps), np.bool_)).argmax())
    best = {size: int(_rates(by, by.sizes == size).argmax()) for size in set(by.sizes.tolist())}
    return np.array([best.get(size, overall) for size in log.sizes.tolist()], np.int64)


def rate_of(log: ReplayedLog, ks: Ks) -> float:
    """Tokens per second over all loads, for the tokens that the log has."""
    return _Bench.of(log).rate(ks)


def speed_of(log: ReplayedLog, tokens: Floats, seconds: Floats) -> float:
    """Tokens per second over all loads, for the tokens that the log has.

    Args:
        tokens, seconds: [S] of each step.
    """
    return _Bench.of(log).speed(tokens, seconds)


def _all_ks(log: ReplayedLog) -> range:
    return range(log.max_draft + 1)


def _always(log: ReplayedLog, k: int) -> Ks:
    return np.full(len(log.steps), k, np.int64)


def _rates(log: ReplayedLog, rows: NDArray[np.bool_]) -> Floats:
    """[K + 1] tokens per second of each fixed K."""
    rates: Floats = log.tokens[rows].sum(axis=0) / log.seconds[rows].sum(axis=0)
    return rates


def _oracle(tokens: Floats, seconds: Floats) -> Ks:
    """[S] the K with which the quotient of all tokens and all seconds is the largest."""
    at = np.arange(len(tokens))
    ks: Ks = (tokens / seconds).argmax(axis=1)
    for _ in range(_ROUNDS_OF_DINKELBACH):
        rate = tokens[at, ks].sum() / seconds[at, ks].sum()
        better = (tokens - rate * seconds).argmax(axis=1)
        if (better == ks).all():
            break
        ks = better
    return ks


@dataclass(frozen=True, slots=True, eq=False)
class _Bench:
    """A log, and what everything on it is compared with."""

    log: ReplayedLog
    loads: tuple[Load, ...]
    oracle_ks: Ks

    @classmethod
    def of(cls, log: ReplayedLog) -> _Bench:
        sizes, loads = log.sizes, []
        oracle_ks = np.zeros(len(log.steps), np.int64)
        for size in sorted(set(sizes.tolist())):
            rows = sizes == size
            ks = oracle_ks[rows] = _oracle(log.tokens[rows], log.seconds[rows])
            at = np.arange(len(ks))
            rates = _rates(log, rows)
            tokens, seconds = log.tokens[rows][at, ks], log.seconds[rows][at, ks]
            loads.append(
                Load(
                    smallest_batch=2**size,
                    num_steps=int(rows.sum()),
                    best_k=int(rates.argmax()),
                    plain_rate=float(rates[0]),
                    best_rate=float(rates.max()),
                    oracle_rate=float(tokens.sum() / seconds.sum()),
                    rates=tuple(rates.tolist()),
                )
            )
        return cls(log, tuple(loads), oracle_ks)

    def rate(self, ks: Ks) -> float:
        """Tokens per second over all loads."""
        at = np.arange(len(ks))
        return self.speed(self.log.tokens[at, ks], self.log.seconds[at, ks])

    def speed(self, tokens: Floats, seconds: Floats) -> float:
        """Tokens per second over all loads."""
        log, rates = self.log, {}
        for load in self.loads:
            rows = log.sizes == load.smallest_batch.bit_length() - 1
            rates[load.smallest_batch] = float(tokens[rows].sum() / seconds[rows].sum())
        return self._joined(rates)

    def _joined(self, rates: Mapping[int, float]) -> float:
        """Speed over all loads of something that has these speeds by smallest batch."""
        work = self._work()
        return sum(work.values()) / sum(tokens / rates[b] for b, tokens in work.items())

    def _work(self) -> dict[int, float]:
        """Tokens that the log has at each load."""
        work: dict[int, float] = {load.smallest_batch: 0.0 for load in self.loads}
        for step in self.log.steps:
            work[2 ** (step.batch.bit_length() - 1)] += step.tokens
        return work

    def judge(
        self,
        name: str,
        ks_of: Sequence[Ks],
        plan_us: float | None,
        played: Sequence[Played] = (),
    ) -> Judged:
        """
        Args:
            ks_of: [S] K of each step, one for each seed.
            played: what was done besides, if it was a policy that played.
        """
        runs = played or [Played(ks, {}) for ks in ks_of]
        columns = [run.columns(self.log) for run in runs]
        rate = float(np.mean([self.speed(tokens, seconds) for tokens, _, seconds in columns]))
        best = self._joined({load.smallest_batch: load.best_rate for load in self.loads})
        oracle = self._joined({load.smallest_batch: load.oracle_rate for load in self.loads})
        plain = self._joined({load.smallest_batch: load.plain_rate for load in self.loads})
        gap = oracle - best
        # The log's decisions have no cuts to have in common with.
        is_cut = any(run.is_cut for run in runs)
        return Judged(
            name=name,
            rate=rate,
            over_plain=rate / plain,
            regret_fixed=1 - rate / best,
            regret_oracle=1 - rate / oracle,
            headroom=(rate - best) / gap if gap > 1e-9 * best else None,
            mean_k=float(np.mean([ks.mean() for ks in ks_of])),
            extrapolated=float(np.mean([guess.sum() / all.sum() for all, guess, _ in columns])),
            verified=float(np.mean([run.verified for run in runs])),
            plan_us=plan_us,
            off_policy=None if is_cut else mean_of([off_policy_rate(self.log, ks) for ks in ks_of]),
        )


def off_policy_rate(log: ReplayedLog, ks: Ks) -> Estimate | None:
    """Tokens per second of these decisions, see ``sampled_rate``; ``None`` if the log has no step
    in common with them, or too few."""
    found = sampled_rate(log, ks)
    return None if found is None else found.estimate()


def off_policy_gain(log: ReplayedLog, ks: Ks, others: Ks) -> Estimate | None:
    """Speed of some decisions over that of others; ``None`` if that of one of them is not known."""
    ours, theirs = sampled_rate(log, ks), sampled_rate(log, others)
    return None if ours is None or theirs is None else ours.over(theirs)


def sampled_rate(log: ReplayedLog, ks: Ks) -> Sampled | None:
    """Doubly robust tokens per second of these decisions. The model is the replayed log without a
    step's outcome, so it knows loads and hazards alone.

    Tokens come from all drafts that were long enough (``off_policy.by_position``), seconds from
    steps in which the log took the same K. Of these only the times count that mean something: no
    prompts were computed beside the step, and a draft did not come right after a plain step, when
    the drafter must catch up first, as it never must where K stays the same.

    Returns:
        ``None`` if the log has no step in common with the decisions, or too few steps.
    """
    taken = np.array([step.draft_k for step in log.steps])
    # What a cut draft brought says nothing of its K.
    inside = (taken <= log.max_draft) & ~np.array([step.may_cut for step in log.steps])
    taken = np.minimum(taken, log.max_draft)
    at, sizes = np.arange(len(ks)), log.sizes
    propensity = np.array([step.propensity for step in log.steps])
    weights = importance_weights((taken == ks) & inside, propensity)
    batches = np.array([step.batch for step in log.steps], np.float64)
    kept = by_position(
        log.survivors,
        batches[:, None] * np.cumprod(log.hazards),
        taken,
        ks,
        np.where(inside, propensity, np.inf),
        sizes,
    )
    seconds = np.array([step.step_s for step in log.steps])
    in_row = np.concatenate(([False], taken[:-1] > 0)) | (taken == 0)
    means_something = in_row & np.array([step.is_timed for step in log.steps])
    timed = normalised(weights * means_something, 2 * sizes + (ks > 0))
    return throughput(
        Reward(batches + kept, weights=np.ones(len(ks))),
        Reward(seconds, log.seconds[at, taken], log.seconds[at, ks], timed),
        weights * means_something,
        sizes,
        work=np.array([step.tokens for step in log.steps]),
    )


class _Timed:
    """Passes everything on, and times plans."""

    def __init__(self, inner: DraftPolicy) -> None:
        self._inner = inner
        self.plans_s: list[float] = []

    def plan(self, obs: StepObs) -> Decision:
        started = time.thread_time()  # not what other processes take
        decision = self._inner.plan(obs)
        self.plans_s.append(time.thread_time() - started)
        return decision

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)
