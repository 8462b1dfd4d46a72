"""Verification budgets as shares of a batch's draft tokens, and what each of them would have
brought in every step of a log.

A learned size chooses among the shares 1 / J, 2 / J, ... 1 of ``batch * K`` draft tokens. The last
one is a whole round; the others keep the positions with the highest products of the likeliest
token's probability, as ``policies.allocation`` says, and verification computes packed rows. Four
shares are those that a GPU has programs for; on a CPU rows are exact.

A logged draft that noted its figures is cut exactly: they tell which positions would have stayed
under any budget, and the outcome what these would have kept. A cut of a draft that is longer than
the logged one is not known. Times are of the cost table, and so are those of packed rows: as much
as verification of a shorter K takes less.

Shapes: S steps, R requests, K the largest draft length, J shares.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from policies.allocation import Allocation, Cut
from policies.costs import CostTable
from policies.interface import CostSample, Decision
from policies.logged import Continuations, Floats, LoggedRow, LoggedStep
from policies.replayed_log import ReplayedLog

Shares = NDArray[np.int64]

CUT = Cut("top", cumulative=True)
NOTED = "budget_each"
"""What a decision notes of its budget: draft tokens to verify, as a mean for each request."""
_MOST_SAVED = 8.0
"""Plain steps beyond which it does not matter how much a budget saves."""


def budget_of(at: int, num_shares: int, batch: int, draft_k: int) -> int:
    """Draft tokens that are verified over a batch: the share number ``at`` + 1 of ``num_shares``,
    rounded up."""
    return -(-(at + 1) * batch * draft_k // num_shares)


def allocation_of(at: int, num_shares: int, batch: int, draft_k: int) -> Allocation:
    """The cut to a share; the last one cuts nothing, and the drafter's figures are noted all the
    same."""
    budget = budget_of(at, num_shares, batch, draft_k)
    return Allocation(CUT, 0.0, None if budget >= batch * draft_k else budget / batch)


class SavedTimes:
    """What verifying half of a draft saves, in plain steps, by batch and K."""

    def __init__(self, table: CostTable | None) -> None:
        """
        Args:
            table: ``None``: nothing is known of times, and nothing is saved.
        """
        self._table = table
        self._known: dict[tuple[int, int], float] = {}

    @classmethod
    def of_samples(cls, samples: Sequence[CostSample], drafter: str, max_draft: int) -> SavedTimes:
        """By a profile; nothing is saved where it does not tell."""
        try:
            return cls(CostTable(samples, drafter, max_draft))
        except ValueError:
            return cls(None)

    def half(self, batch: int, draft_k: int) -> float:
        """The input ``saved_half`` of a size."""
        if self._table is None:
            return 0.0
        found = self._known.get((batch, draft_k))
        if found is None:
            saved = self._table.saved(batch, draft_k, draft_k / 2)
            plain = float(self._table.seconds(batch)[0])
            found = self._known[batch, draft_k] = min(saved / plain, _MOST_SAVED)
        return found


def size_inputs(
    features: Sequence[float], batch: int, draft_k: int, max_draft: int, saved: SavedTimes
) -> list[float]:
    """[N] ``policies.network.SIZE_NAMES``, for server and trainer alike."""
    return [*features, draft_k / max_draft, saved.half(batch, draft_k)]


@dataclass(frozen=True, slots=True, eq=False)
class BudgetScores:
    """What every K would have brought under every share, in every step of a log."""

    tokens: Floats
    """[S, K + 1, J] of the whole batch,"""
    extrapolated: Floats
    """[S, K + 1, J] of these, by hazards, and by the figures of what the log has cut."""
    seconds: Floats
    """[S, K + 1, J]."""
    saved: Floats
    """[S, K + 1, J] seconds that a share saves, also where it is not known what it keeps."""
    is_known: NDArray[np.bool_]
    """[S, K + 1] all requests noted the figures of so many positions, or could not use as many.
    Elsewhere every share is as the last one."""

    @classmethod
    def of(cls, log: ReplayedLog, num_shares: int) -> BudgetScores:
        """Score them.

        Raises:
            ValueError: no step noted figures, or the times do not tell drafting and verification
                apart, so that no budget would save anything.
        """
        if not any(step.has_figures for step in log.steps):
            raise ValueError(
                "no step noted the drafter's figures, so no budget can be scored; let the run "
                "serve with policy.kind=ltd and policy.ltd.size=note, or with a policy that cuts "
                "drafts"
            )
        most = max(step.batch for step in log.steps)
        if not log.table.saved(most, log.max_draft, 0.0):
            raise ValueError(
                "these step times do not tell drafting and verification apart, so no budget would "
                "save anything; use the profile of a server (--times profile)"
            )
        shape = len(log.steps), log.max_draft + 1, num_shares
        tokens, guessed = np.zeros((2, *shape))
        is_known = np.zeros(shape[:2], np.bool_)
        for at, step in enumerate(log.steps):
            most = min(_noted(step, log.max_draft), log.max_draft)
            is_known[at, 1 : most + 1] = True
            if most:
                found = _step_scores(step, most, num_shares, log.beyond)
                tokens[at, 1 : most + 1], guessed[at, 1 : most + 1] = found
        unknown = ~is_known
        tokens[unknown], guessed[unknown] = (
            one[unknown][:, None] for one in (log.tokens, log.extrapolated)
        )
        tokens[..., -1], guessed[..., -1] = log.tokens, log.extrapolated
        saved = _saved(log, num_shares)
        seconds = log.seconds[..., None] - np.where(is_known[..., None], saved, 0)
        return cls(tokens, guessed, seconds, saved, is_known)

    @property
    def num_shares(self) -> int:
        return int(self.tokens.shape[2])

    def rows(self, kept: NDArray[np.bool_]) -> BudgetScores:
        """Those of some of the steps.

        Args:
            kept: [S].
        """
        return BudgetScores(
            self.tokens[kept], self.extrapolated[kept], self.seconds[kept], self.saved[kept],
            self.is_known[kept],
        )  # fmt: skip


def cut_rows(
    log: ReplayedLog, at: int, draft_k: int, share: int, num_shares: int
) -> list[int] | None:
    """Lengths of the drafts of a step's logged requests under a share, which must not be changed;
    ``None``: nothing is cut, or nothing is known of a cut."""
    key = at, draft_k, share, num_shares
    if key not in log.known_cuts:
        log.known_cuts[key] = _cut_rows(log, *key)
    return log.known_cuts[key]


def _cut_rows(
    log: ReplayedLog, at: int, draft_k: int, share: int, num_shares: int
) -> list[int] | None:
    step = log.steps[at]
    allocation = allocation_of(share, num_shares, step.batch, draft_k) if draft_k else None
    if allocation is None or not allocation.may_cut or _noted(step, log.max_draft) < draft_k:
        return None
    decision = Decision(log.drafter, draft_k, 1.0, explore=False, reason="", allocation=allocation)
    return log.lengths(at, decision)


def _noted(step: LoggedStep, most: int) -> int:
    """The largest K of which all figures are there; 0 where some request noted none."""
    if any(row.considered is None for row in step.rows):
        return 0
    return min(
        most if row.longest(step.draft_k) is not None else row.considered.length
        for row in step.rows
        if row.considered is not None
    )


def _step_scores(
    step: LoggedStep, most: int, num_shares: int, beyond: Continuations
) -> tuple[Floats, Floats]:
    """[most, J] tokens of the batch at K = 1 .. ``most``, and extrapolated ones."""
    num = len(step.rows)
    tops = np.zeros((num, most))
    lens = np.zeros(num, np.int64)
    for r, row in enumerate(step.rows):
        assert row.considered is not None
        own = row.considered.confidence[::3][:most]
        tops[r, : len(own)] = own
        lens[r] = len(own)
    by_length = [_by_length(row, most, beyond) for row in step.rows]
    values_RL, guesses_RL = (np.array(one) for one in zip(*by_length, strict=True))
    places = np.arange(most)
    survival = np.cumprod(np.clip(tops, 0, 1), axis=1)
    ranked = np.where(places < lens[:, None], survival, -1.0).T.reshape(-1)
    order = np.argsort(-ranked, kind="stable")[: int(lens.sum())]
    place, request = np.divmod(order, num)
    found = np.zeros((2, most, num_shares))
    for k in range(1, most + 1):
        ordered = request[place < k]
        for j in range(num_shares):
            budget = budget_of(j, num_shares, step.batch, k) * num / step.batch
            kept = np.bincount(ordered[: int(np.ceil(budget))], minlength=num)
            at = np.arange(num), kept
            found[:, k - 1, j] = values_RL[at].sum(), guesses_RL[at].sum()
    scale = step.batch / num
    return scale * found[0], scale * found[1]


def _by_length(row: LoggedRow, most: int, beyond: Continuations) -> tuple[Floats, Floats]:
    """[most + 1] tokens of a request whose draft is cut to each length, and extrapolated ones."""
    lengths = np.arange(most + 1)
    exact = 1.0 + np.minimum(min(row.num_accepted, row.num_verified), lengths)
    if row.num_accepted < row.num_verified or row.num_verified >= most:
        return exact, np.zeros(most + 1)
    unseen, guessed = (one[: most + 1] for one in beyond.of_row(row))
    return exact + unseen, guessed


def _saved(log: ReplayedLog, num_shares: int) -> Floats:
    """[S, K + 1, J] seconds that packed rows save."""
    known: dict[int, Floats] = {}
    for batch in {step.batch for step in log.steps}:
        found = known[batch] = np.zeros((log.max_draft + 1, num_shares))
        for k in range(1, log.max_draft + 1):
            for j in range(num_shares - 1):
                each = budget_of(j, num_shares, batch, k) / batch
                found[k, j] = log.table.saved(batch, k, each)
    return np.stack([known[step.batch] for step in log.steps])
