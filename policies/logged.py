"""The steps of a log of traces, and what every K would have brought in each of them.

A round that verified v tokens and kept A says exactly what any K up to v would have brought, and,
where a token was rejected or the request could not use more, what any longer K would have, too.
Only where all v tokens were kept and the step's K was v is a longer K unknown (right-censored).
Then the drafter can be replayed along the target's text (``trainer.replayed_drafts``), which says
how likely each further position is to be kept. Where nobody has done that, the expected tokens
follow from the Kaplan-Meier hazards of all rounds of the log, or from the figures of a draft that
the device cut, and are counted as extrapolated.

Rounds whose drafts the device could cut keep the figures by which that was decided. Steps that
might cut are left out of the hazards as long as there are others, because a draft that was not cut
is one that was likely to be kept.

Exact for greedy requests and the standard rule of verification. With block verification, whether at
least j tokens are kept has the same probability at every K >= j (Sun et al. 2024,
arXiv:2403.10444), so shorter and longer K are exact in their mean, not round by round.

Shapes: S steps, R rounds, K the largest draft length that is asked for.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from buffer.records import FIGURES, Consideration, Round, Trace
from policies.groups import group_of
from policies.interface import PICK_REASONS

Floats = NDArray[np.float64]

_TENANTS = 16
_LEAST_WHOLE = 30
"""Rounds of steps that could not cut from which on hazards are those of such steps alone."""
_BINS = 12
"""Of the top probability."""
_PRIOR = 4.0
"""Positions, kept as often as all are, that are added to each bin."""
_LEAST_POSITIONS = 100
"""With figures from which on they are looked at."""
_DEPTH_FACTOR = 0.97
"""Hazard of a position that no round reached, relative to the one before it."""


@dataclass(frozen=True, slots=True)
class LoggedRow:
    """One request's part in a step."""

    num_verified: int
    num_accepted: int
    considered: Consideration | None = None
    """The draft before the device cut it."""
    temperature: float = 1.0
    """Of the request, where ``considered`` is noted."""
    group: int = 0
    """Of the request, see ``policies.groups``."""
    replayed: tuple[float, ...] = ()
    """Probability that each position of a longer draft would have been kept, given those before it:
    the drafter's, replayed along the target's text. Only of plain rounds and of drafts that were
    kept whole; empty where nobody has replayed."""

    def longest(self, draft_k: int) -> int | None:
        """The longest draft that the request could use; ``None``: as long as any.

        Args:
            draft_k: K of the step.
        """
        length = self.num_verified if self.considered is None else self.considered.length
        return length if length < draft_k else None


@dataclass(frozen=True, slots=True)
class LoggedStep:
    """One decision, and what came of it in the requests that left a trace."""

    drafter: str
    """``none`` where K is 0; kinds joined by ``+`` where several drafted."""
    draft_k: int
    batch: int
    """Requests in the step, those without a trace included."""
    propensity: float
    policy: str
    """Empty in traces that do not tell."""
    version: int
    step_s: float
    rows: tuple[LoggedRow, ...]
    may_cut: bool = False
    """The device could shorten drafts."""
    is_timed: bool = True
    """``step_s`` is the time of rounds alone, as far as the trace tells."""
    notes: tuple[tuple[str, float], ...] = ()
    """What the policy noted, see ``buffer.records.Round``."""
    is_mixed: bool = False
    """A drafter was picked for each request of a batch. Such a step has no single drafter and no
    single propensity, and its time is no single drafter's."""
    context: int | None = None
    """Tokens of a request's text, see ``policies.interface.StepObs``."""

    @property
    def groups(self) -> bytes:
        """[batch] of the requests, if those without a trace are as those with one."""
        known = bytes(row.group for row in self.rows)
        return (known * (self.batch // len(known) + 1))[: self.batch]

    @property
    def has_figures(self) -> bool:
        """The device could have cut these drafts, or did."""
        return any(row.considered is not None for row in self.rows)

    @property
    def tokens(self) -> float:
        """Tokens of the whole batch, if requests without a trace did as those with one."""
        kept = sum(row.num_accepted for row in self.rows)
        return self.batch * (1 + kept / len(self.rows))


Replayed = Mapping[tuple[str, int, int, int], tuple[float, ...]]
"""``LoggedRow.replayed`` by producer, epoch and number of the trace, and the round's anchor."""


def steps_of(traces: Iterable[Trace], replayed: Replayed | None = None) -> list[LoggedStep]:
    """The steps of some traces, in order.

    Rounds of traces that do not number steps are put together by all that a step has in common, its
    time in nanoseconds included, and keep the order in which their requests ended.
    """
    found: dict[tuple[object, ...], list[_Noted]] = {}
    ordered = sorted(traces, key=lambda trace: (trace.epoch, trace.producer))
    numbered: list[tuple[object, ...]] = []
    tenants = _tenants(ordered)
    for trace in ordered:
        temperature = trace.sampling.temperature
        group = group_of(tenants.get((trace.tenant, trace.domain), 0), temperature)
        for one in trace.rounds:
            shared = one.step_s, one.batch, one.draft_k, one.version, one.propensity
            is_numbered = one.step is not None
            key = trace.epoch, trace.producer, one.step if is_numbered else shared
            if key not in found:
                found[key] = []
                if is_numbered:
                    numbered.append(key)
            place = trace.producer, trace.epoch, trace.seq, one.anchor
            beyond = replayed.get(place, ()) if replayed else ()
            found[key].append(_Noted(one, temperature, group, beyond))
    numbers = {key: at for at, key in enumerate(sorted(numbered))}
    keys = sorted(found, key=lambda key: numbers.get(key, -1))
    return [_step_of(found[key]) for key in keys]


class _Noted(NamedTuple):
    """A round, and what is known of its request."""

    round: Round
    temperature: float
    group: int
    replayed: tuple[float, ...]


def _tenants(traces: Iterable[Trace]) -> dict[tuple[str, str], int]:
    """Numbers of the tenants and domains with most traces, as an engine gives them; 0 is of the
    others, and of those that say neither."""
    counts = Counter((trace.tenant, trace.domain) for trace in traces)
    del counts["default", ""]
    return {label: number for number, (label, _) in enumerate(counts.most_common(_TENANTS), 1)}


def _step_of(rounds: Sequence[_Noted]) -> LoggedStep:
    drafting = [r for r, *_ in rounds if r.draft_ids or r.considered is not None]
    drafters = sorted({r.drafter for r in drafting} - {"none"})
    one = drafting[0] if drafting else rounds[0].round
    return LoggedStep(
        drafter="+".join(drafters) or "none",
        draft_k=one.draft_k,
        batch=one.batch,
        propensity=one.propensity,
        policy=one.policy,
        version=one.version,
        step_s=one.step_s,
        rows=tuple(
            LoggedRow(len(r.draft_ids), r.num_accepted, group=group, replayed=beyond)
            if r.considered is None
            else LoggedRow(
                len(r.draft_ids), r.num_accepted, r.considered, temperature, group, beyond
            )
            for r, temperature, group, beyond in rounds
        ),
        may_cut=any(r.considered is not None and r.considered.may_cut for r, *_ in rounds),
        is_timed=all(r.is_timed for r, *_ in rounds),
        context=sum(r.anchor + 1 for r, *_ in rounds) // len(rounds),
        notes=one.notes,
        is_mixed=len(drafters) > 1 or (one.batch > 1 and one.reason in PICK_REASONS),
    )


def drafters_of(steps: Iterable[LoggedStep]) -> list[str]:
    """Kinds of drafters that drafted whole steps, the one with the most of them first."""
    counts: dict[str, int] = {}
    for step in steps:
        if step.drafter != "none" and not step.is_mixed:
            counts[step.drafter] = counts.get(step.drafter, 0) + 1
    return sorted(counts, key=lambda kind: (-counts[kind], kind))


def of_drafter(steps: Iterable[LoggedStep], drafter: str) -> list[LoggedStep]:
    """Steps that say something about one drafter: its own, and those that did without any. Steps
    of several drafters do not: in them, each drafted for the requests that suited it."""
    return [
        step for step in steps
        if not step.is_mixed
        and (step.drafter == drafter or (step.drafter == "none" and step.draft_k == 0))
    ]  # fmt: skip


def of_newest_versions(
    steps: Sequence[LoggedStep], drafter: str, least: int
) -> tuple[list[LoggedStep], tuple[int, int]]:
    """What the newest versions of a drafter did: as few of them as have drafted ``least`` steps, or
    all; and plain steps from the first of theirs on.

    Returns:
        These steps in order, and the oldest and the newest of the versions.

    Raises:
        ValueError: it drafted nothing.
    """
    counts = Counter(step.version for step in of_drafter(steps, drafter) if step.draft_k)
    if not counts:
        raise ValueError(f"no step was drafted by {drafter!r}")
    oldest = newest = max(counts)
    num = counts[newest]
    for version in sorted(counts, reverse=True)[1:]:
        if num >= least:
            break
        oldest, num = version, num + counts[version]

    def is_own(step: LoggedStep) -> bool:
        return step.drafter == drafter and not step.is_mixed

    first = next(at for at, step in enumerate(steps) if is_own(step) and step.version >= oldest)
    kept = [step for step in steps[first:] if not is_own(step) or step.version >= oldest]
    return kept, (oldest, newest)


def hazards_of(steps: Iterable[LoggedStep], max_draft: int) -> tuple[Floats, NDArray[np.int64]]:
    """Kaplan-Meier: P(position j is kept | all before it were) for j = 1, 2, ... max_draft.

    Returns:
        [max_draft] hazards, and [max_draft] the rounds that reached each position. A position that
        none reached is a little less likely than the one before it.

    Raises:
        ValueError: no round drafted anything.
    """
    reached, kept = np.zeros(max_draft, np.int64), np.zeros(max_draft, np.int64)
    steps = list(steps)
    whole = [step for step in steps if not step.may_cut]
    if sum(row.num_verified > 0 for step in whole for row in step.rows) >= _LEAST_WHOLE:
        steps = whole
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
class Continuations:
    """Probabilities that positions which were not verified are kept if all before them are.

    By the hazards of the log, if nothing is known of the draft. What lies beyond the point at which
    the device cut a draft by its confidence is harder than the average; there a position is kept as
    often as positions with a like probability of the likeliest token were. That can be counted in
    cut drafts as well, because a cut looks at the figures and at nothing else.
    """

    hazards: Floats
    """[K] of drafts without figures."""
    edges: Floats
    """[N - 1] bounds of the bins of the top probability; none without figures."""
    rates: Floats
    """[N] how often positions of each bin are kept."""

    @classmethod
    def of(cls, steps: Iterable[LoggedStep], hazards: Floats) -> Continuations:
        """Count the positions of a log that have figures."""
        tops: list[float] = []
        kept: list[bool] = []
        for step in steps:
            for row in step.rows:
                num = min(row.num_accepted + 1, row.num_verified)
                if row.considered is not None and num:
                    tops += row.considered.confidence[: FIGURES * num : FIGURES]
                    kept += [j < row.num_accepted for j in range(num)]
        if len(kept) < _LEAST_POSITIONS:
            return cls(hazards, np.zeros(0), np.zeros(0))
        edges = np.unique(np.quantile(tops, np.arange(1, _BINS) / _BINS))
        bins = np.searchsorted(edges, tops)
        counts = np.bincount(bins, minlength=len(edges) + 1)
        sums = np.bincount(bins, np.array(kept, np.float64), minlength=len(edges) + 1)
        return cls(hazards, edges, (sums + _PRIOR * np.mean(kept)) / (counts + _PRIOR))

    def probabilities(self, row: LoggedRow) -> Floats:
        """[K] of one draft. Where the drafter was replayed along the text, that tells."""
        found = self.hazards
        if row.considered is not None and len(self.rates):
            tops = row.considered.confidence[::FIGURES][: len(self.hazards)]
            found = self.hazards.copy()
            found[: len(tops)] = self.rates[np.searchsorted(self.edges, tops)]
        if row.replayed:
            own = row.replayed[: len(found)]
            found = np.concatenate((own, found[len(own) :]))
        return found

    def of_row(self, row: LoggedRow) -> tuple[Floats, Floats]:
        """[K + 1] expected tokens of a draft of k tokens beyond those that were verified, had all
        of these been kept, 0 up to there; and [K + 1] those of them that nobody has replayed."""
        size = len(self.hazards) + 1
        verified = min(row.num_verified, size - 1)
        each = np.zeros(size)
        each[verified + 1 :] = np.cumprod(self.probabilities(row)[verified:])
        guessed = np.where(np.arange(size) > len(row.replayed), each, 0.0)
        return each.cumsum(), guessed.cumsum()


@dataclass(frozen=True, slots=True)
class Scores:
    """What every K would have brought in every step."""

    tokens: Floats
    """[S, K + 1] tokens of the whole batch; expected ones where ``extrapolated`` is not 0."""
    extrapolated: Floats
    """[S, K + 1] of these, the ones that rest on hazards instead of on what was verified."""


def scores_of(
    steps: Sequence[LoggedStep], hazards: Floats, beyond: Continuations | None = None
) -> Scores:
    """Score every K from 0 to ``len(hazards)`` in every step.

    Args:
        beyond: what would have been kept of positions that were not verified; ``None``: as the
            hazards say, whatever is known of a draft.
    """
    at, verified, accepted, longest = _columns(steps, len(hazards))
    ks = np.arange(len(hazards) + 1)
    exact = 1 + np.minimum(accepted[:, None], np.minimum(verified[:, None], ks))
    usable = np.minimum(ks, longest[:, None])
    censored = (accepted == verified)[:, None] & (usable > verified[:, None])
    unseen = np.where(censored, _by_hazards(hazards)[verified[:, None], usable], 0.0)
    guessed = unseen.copy()
    if beyond is not None:
        rows = (row for step in steps for row in step.rows)
        for r, row in enumerate(rows):
            if (row.considered is not None or row.replayed) and censored[r].any():
                unseen[r], guessed[r] = (one[usable[r]] for one in beyond.of_row(row))
    tokens, extrapolated = np.zeros((2, len(steps), len(ks)))
    np.add.at(tokens, at, exact + unseen)
    np.add.at(extrapolated, at, guessed)
    scale = np.array([step.batch / len(step.rows) for step in steps])[:, None]
    return Scores(tokens * scale, extrapolated * scale)


def cut_score(
    step: LoggedStep, lengths: Sequence[int], beyond: Continuations
) -> tuple[float, float]:
    """Tokens of the whole batch had the drafts of a step been cut to these lengths, and how many of
    them rest on hazards.

    Args:
        lengths: [rows of the step] at most K and what the request could use.
    """
    tokens = extrapolated = 0.0
    for row, length in zip(step.rows, lengths, strict=True):
        tokens += 1 + min(row.num_accepted, row.num_verified, length)
        if row.num_accepted == row.num_verified < length:
            unseen, guessed = (float(one[length]) for one in beyond.of_row(row))
            tokens += unseen
            extrapolated += guessed
    scale = step.batch / len(step.rows)
    return scale * tokens, scale * extrapolated


def _columns(
    steps: Sequence[LoggedStep], max_draft: int
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
    """[R] each: the round's step, its verified and kept tokens, and the longest draft that it could
    use."""
    rows = []
    for at, step in enumerate(steps):
        for row in step.rows:
            longest = row.longest(step.draft_k)
            rows.append(
                (
                    at, min(row.num_verified, max_draft), min(row.num_accepted, max_draft),
                    max_draft if longest is None else min(longest, max_draft),
                )
            )  # fmt: skip
    table = np.array(rows, np.int64).reshape(-1, 4)
    return table[:, 0], table[:, 1], table[:, 2], table[:, 3]


def _by_hazards(hazards: Floats) -> Floats:
    """[K + 1, K + 1] expected tokens between position v and position k, where all v were kept."""
    size = len(hazards) + 1
    found = np.zeros((size, size))
    for v in range(size):
        found[v, v + 1 :] = np.cumprod(hazards[v:]).cumsum()
    return found
