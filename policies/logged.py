"""The steps of a log of traces, and what every K would have brought in each of them.

A round that verified v tokens and kept A says exactly what any K up to v would have brought, and,
where a token was rejected or the request could not use more, what any longer K would have, too.
Only where all v tokens were kept and the step's K was v is a longer K unknown (right-censored): its
expected tokens follow from the Kaplan-Meier hazards of all rounds of the log, and are counted as
extrapolated.

Exact for greedy requests and the standard rule of verification. With block verification, whether at
least j tokens are kept has the same probability at every K >= j (Sun et al. 2024,
arXiv:2403.10444), so shorter and longer K are exact in their mean, not round by round.

Shapes: S steps, R rounds, K the largest draft length that is asked for.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from buffer.records import Round, Trace

Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]

_DEPTH_FACTOR = 0.97
"""Hazard of a position that no round reached, relative to the one before it."""


@dataclass(frozen=True, slots=True)
class LoggedRow:
    """One request's part in a step."""

    num_verified: int
    num_accepted: int


@dataclass(frozen=True, slots=True)
class LoggedStep:
    """One decision, and what came of it in the requests that left a trace."""

    drafter: str
    """``none`` where K is 0."""
    draft_k: int
    batch: int
    """Requests in the step, those without a trace included."""
    propensity: float
    policy: str
    """Empty in traces that do not tell."""
    version: int
    step_s: float
    rows: tuple[LoggedRow, ...]

    @property
    def tokens(self) -> float:
        """Tokens of the whole batch, if requests without a trace did as those with one."""
        kept = sum(row.num_accepted for row in self.rows)
        return self.batch * (1 + kept / len(self.rows))


def steps_of(traces: Iterable[Trace]) -> list[LoggedStep]:
    """The steps of some traces, in order.

    Rounds of traces that do not number steps are put together by all that a step has in common, its
    time in nanoseconds included, and keep the order in which their requests ended.
    """
    found: dict[tuple[object, ...], list[Round]] = {}
    ordered = sorted(traces, key=lambda trace: (trace.epoch, trace.producer))
    numbered: list[tuple[object, ...]] = []
    for trace in ordered:
        for one in trace.rounds:
            shared = one.step_s, one.batch, one.draft_k, one.version, one.propensity
            is_numbered = one.step is not None
            key = trace.epoch, trace.producer, one.step if is_numbered else shared
            if key not in found:
                found[key] = []
                if is_numbered:
                    numbered.append(key)
            found[key].append(one)
    numbers = {key: at for at, key in enumerate(sorted(numbered))}
    keys = sorted(found, key=lambda key: numbers.get(key, -1))
    return [_step_of(found[key]) for key in keys]


def _step_of(rounds: Sequence[Round]) -> LoggedStep:
    one = rounds[0]
    drafters = [r.drafter for r in rounds if r.draft_ids]
    return LoggedStep(
        drafter=drafters[0] if drafters else "none",
        draft_k=one.draft_k,
        batch=one.batch,
        propensity=one.propensity,
        policy=one.policy,
        version=one.version,
        step_s=one.step_s,
        rows=tuple(LoggedRow(len(r.draft_ids), r.num_accepted) for r in rounds),
    )


def drafters_of(steps: Iterable[LoggedStep]) -> list[str]:
    """Kinds of drafters that drafted, the one with the most steps first."""
    counts: dict[str, int] = {}
    for step in steps:
        if step.drafter != "none":
            counts[step.drafter] = counts.get(step.drafter, 0) + 1
    return sorted(counts, key=lambda kind: (-counts[kind], kind))


def of_drafter(steps: Iterable[LoggedStep], drafter: str) -> list[LoggedStep]:
    """Steps that say something about one drafter: its own, and those that did without any."""
    return [s for s in steps if s.drafter == drafter or (s.drafter == "none" and s.draft_k == 0)]


def hazards_of(steps: Iterable[LoggedStep], max_draft: int) -> tuple[Floats, NDArray[np.int64]]:
    """Kaplan-Meier: P(position j is kept | all before it were) for j = 1, 2, ... max_draft.

    Returns:
        [max_draft] hazards, and [max_draft] the rounds that reached each position. A position that
        none reached is a little less likely than the one before it.

    Raises:
        ValueError: no round drafted anything.
    """
    reached, kept = np.zeros(max_draft, np.int64), np.zeros(max_draft, np.int64)
    for step in steps:
        for row in step.rows:
            num_kept = min(row.num_accepted, max_draft)
            kept[:num_kept] += 1
            reached[: min(row.num_accepted + 1, row.num_verified, max_draft)] += 1
    if max_draft and not reached[0]:
        raise ValueError("no round of these traces drafted anything, so no K can be scored")
    hazards = np.empty(max_draft)
    for j in range(max_draft):
        before = hazards[j - 1] if j else 0.0
        hazards[j] = kept[j] / reached[j] if reached[j] else _DEPTH_FACTOR * before
    return hazards, reached


@dataclass(frozen=True, slots=True)
class Scores:
    """What every K would have brought in every step."""

    tokens: Floats
    """[S, K + 1] tokens of the whole batch; expected ones where ``extrapolated`` is not 0."""
    extrapolated: Floats
    """[S, K + 1] of these, the ones that rest on hazards instead of on what was verified."""


def scores_of(steps: Sequence[LoggedStep], hazards: Floats) -> Scores:
    """Score every K from 0 to ``len(hazards)`` in every step."""
    at, verified, accepted, capped = _columns(steps)
    ks = np.arange(len(hazards) + 1)
    exact = 1 + np.minimum(accepted[:, None], np.minimum(verified[:, None], ks))
    censored = (accepted == verified) & ~capped
    beyond = np.where(censored[:, None] & (ks > verified[:, None]), _beyond(hazards)[verified], 0.0)
    tokens, extrapolated = np.zeros((2, len(steps), len(ks)))
    np.add.at(tokens, at, exact + beyond)
    np.add.at(extrapolated, at, beyond)
    scale = np.array([step.batch / len(step.rows) for step in steps])[:, None]
    return Scores(tokens * scale, extrapolated * scale)


def _columns(
    steps: Sequence[LoggedStep],
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64], Bools]:
    """[R] each: the round's step, its verified and kept tokens, and whether it could not use as
    many as the step's K."""
    rows = [
        (at, row.num_verified, row.num_accepted, row.num_verified < step.draft_k)
        for at, step in enumerate(steps)
        for row in step.rows
    ]
    table = np.array(rows, np.int64).reshape(-1, 4)
    return table[:, 0], table[:, 1], table[:, 2], table[:, 3].astype(np.bool_)


def _beyond(hazards: Floats) -> Floats:
    """[K + 1, K + 1] expected tokens between position v and position k, where all v were kept."""
    size = len(hazards) + 1
    found = np.zeros((size, size))
    for v in range(size):
        found[v, v + 1 :] = np.cumprod(hazards[v:]).cumsum()
    return found
