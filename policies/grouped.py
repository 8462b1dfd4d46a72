"""Acceptance for the requests at hand: that of all, moved by the shifts of their groups.

What the next step's batch is made of is told by ``follow``; from then on expected tokens are those
of such a batch. A server whose requests are all of one group expects what ``AcceptanceModel`` does.

Shapes: B kinds of match, K draft tokens.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from policies.acceptance import NO_MIXES, AcceptanceModel
from policies.drafter_acceptance import Floats
from policies.groups import Mix, Shifts
from policies.interface import DrafterTraits
from policies.log_odds import shifted
from policies.round_counts import NOTHING_BEYOND, Counted, Rounds

_NOTHING = 1e-12
_FEW = 16
"""Requests up to which a batch can be another one from one step to the next."""
_OTHERS = 0.05
"""Share of the requests that are of other groups, up to which nothing is computed again."""


class _Tables(NamedTuple):
    """What follows from one state of acceptance and shifts."""

    common: Floats
    """[B, K + 1] expected tokens without shifts."""
    number: int
    """``Shifts.number``."""
    hazards: Floats
    """[B, K]."""
    by_group: dict[int, Floats]
    """[B, K + 1] expected tokens of a group."""
    by_mix: dict[Mix, Floats]


class GroupedAcceptance(AcceptanceModel):
    """``AcceptanceModel`` with a shift for each group of requests."""

    def __init__(
        self,
        half_life_rounds: float,
        drafters: Mapping[str, DrafterTraits],
        max_draft: int,
        mixes: Mapping[str, Sequence[str]] = NO_MIXES,
    ) -> None:
        """See ``AcceptanceModel``."""
        super().__init__(half_life_rounds, drafters, max_draft, mixes)
        self.mix: Mix | None = None
        """Groups of the batch at hand; ``None``: nobody tells."""
        self._groups: bytes | None = None
        self._shifts = {kind: Shifts() for kind in drafters}
        self._tables: dict[str, _Tables] = {}
        self._versions: dict[str, int] = {}

    def follow(self, groups: bytes | None) -> None:
        """Expect what is to be expected of a batch of these groups, unless it is much like the one
        before.

        Args:
            groups: [batch] see ``StepObs``; ``None`` and empty leave what was told last.
        """
        if not groups or groups is self._groups:
            return
        self._groups = groups
        mix = Mix.of(groups)
        if self.mix is None or mix.distance(self.mix) > _OTHERS:
            self.mix = mix

    def glance(self, groups: bytes | None) -> None:
        """``follow`` in a plan: a large batch is what the last outcome was of."""
        if groups and (len(groups) <= _FEW or self.mix is None):
            self.follow(groups)

    def learn(self, drafter: str, counted: Counted, batch: int) -> None:
        """Take in the rounds of some steps.

        Args:
            batch: requests of a step.
        """
        shifts = self._shifts[drafter]
        steps = [rows for rows in counted.steps if rows.groups and shifts.is_news(rows.groups)]
        if not steps:
            self.observe(drafter, counted.rounds, batch)
            return
        seen = shifts.weigh(Rounds.of(steps), self.all_hazards(drafter))
        self.observe(
            drafter, counted.rounds, batch, seen.beyond() if shifts.is_used else NOTHING_BEYOND
        )
        shifts.learn(seen)

    def expected_tokens(self, drafter: str) -> Floats:
        """[B, K + 1]; see ``AcceptanceModel``: of a row of the batch at hand."""
        common = super().expected_tokens(drafter)
        shifts, mix = self._shifts[drafter], self.mix
        if mix is None or not shifts.is_used:
            return common
        tables = self._tables.get(drafter)
        if tables is None or tables.common is not common or tables.number != shifts.number:
            terms = np.diff(common, axis=1)
            before = np.maximum(np.column_stack((np.ones(len(terms)), terms[:, :-1])), _NOTHING)
            hazards = np.clip(terms / before, 0.0, 1.0)
            tables = self._tables[drafter] = _Tables(common, shifts.number, hazards, {}, {})
        found = tables.by_mix.get(mix)
        if found is None:
            self._add_groups(tables, shifts, [group for group, _ in mix.shares])
            by_group = np.array([tables.by_group[group] for group, _ in mix.shares])
            shares = np.array([share for _, share in mix.shares])
            found = tables.by_mix[mix] = (shares[:, None, None] * by_group).sum(axis=0)
        return found

    @staticmethod
    def _add_groups(tables: _Tables, shifts: Shifts, groups: list[int]) -> None:
        """Compute the expected tokens of the groups that are not known yet, all at once: a batch of
        256 has as many as eight."""
        new = [group for group in groups if group not in tables.by_group]
        if not new:
            return
        moves = np.array([shifts.of(group) for group in new])[:, None, None]
        terms = np.ones((len(new), *tables.common.shape))
        np.cumprod(shifted(tables.hazards, moves), axis=2, out=terms[..., 1:])
        tables.by_group.update(zip(new, terms.cumsum(axis=2), strict=True))

    def on_swap(self, drafter: str, version: int, calibration: Mapping[str, Any]) -> None:
        """Other weights draft from now on; their common acceptance is for ``VersionMemory``."""
        self._shifts[drafter].on_swap(self._versions.get(drafter), version, calibration)
        self._versions[drafter] = version

    def figures(self) -> dict[str, Any]:
        """As ``AcceptanceModel``, with the shifts of each drafter's groups under ``groups``."""
        shifts = {kind: own.figures() for kind, own in sorted(self._shifts.items())}
        found = {kind: own for kind, own in shifts.items() if own}
        return super().figures() | ({"groups": found} if found else {})
