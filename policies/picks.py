"""Who drafts for which request of a step that several drafters draft in.

Such a *mix* is one more drafter to a policy that compares arms: what its steps keep and what they
take is measured like any other's, so whether mixing pays is known and not assumed. This module
decides within the mix. Each request gets the drafter that is expected to keep the most tokens of
its next draft: what the drafter keeps of all requests, corrected by what it has kept of this one.
All neural members compute their rows of every request, so a request changes drafters at any round
without a catch-up, and a pick costs no time: only tokens.

A member that needs a match, such as an index, is picked only for requests that have one, and judged
by the length of that match alone: what it has kept of a request with other matches says little.

The correction needs rounds of the drafter that looks worse, too. They are paid from an account that
grows by a hundredth of the tokens that are expected: however bad a drafter is, trying it costs no
more than that, and what cannot be paid for now is tried later.

Estimates rest on earlier rounds only, so a pick never depends on the tokens it is made for.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, NamedTuple, Self

from policies.acceptance import AcceptanceModel
from policies.drafter_acceptance import Floats
from policies.interface import DrafterTraits, DraftRecord, Pick, StepObs

_BUDGET = 0.01
"""Share of the tokens that trying may lose."""
_START_TOKENS, _MOST_TOKENS = 2.0, 20.0
"""Balance of the account at first and at most."""
_PRIOR_ROUNDS = 4.0
"""Rounds that what a drafter keeps of all requests counts for."""
_FEW_ROUNDS, _EAGER = 2.0, 4.0
"""A drafter with fewer rounds of a request is tried so many times as often."""
_LEAST_KEPT = 0.01
"""Tokens that a drafter is assumed to keep at least, so that a ratio exists."""


@dataclass(frozen=True, slots=True)
class MixTraits:
    """A mix, as policies see a drafter."""

    prior_acceptance: tuple[float, ...]
    prior_draft_cost: float
    on_device: bool = True
    needs_match: bool = False
    picks_itself: bool = False
    former_of: str | None = None


def picked_mixes(
    drafters: Mapping[str, DrafterTraits], mixes: Mapping[str, tuple[str, ...]]
) -> dict[str, tuple[str, ...]]:
    """Mixes in which who drafts for whom is planned. To the policy, any other is one drafter."""
    alone = {kind for kind, traits in drafters.items() if traits.picks_itself}
    return {mix: members for mix, members in mixes.items() if alone.isdisjoint(members)}


def with_mixes(
    drafters: Mapping[str, DrafterTraits], mixes: Mapping[str, tuple[str, ...]]
) -> dict[str, DrafterTraits]:
    """Traits by kind of all drafters and mixes. A mix takes the time of all its members, and keeps
    as much as the best of those on the device until it is measured."""
    found = dict(drafters)
    for name, members in mixes.items():
        traits = [drafters[kind] for kind in members]
        on_device = (one for one in traits if one.on_device)
        best = max(on_device, key=lambda one: max(one.prior_acceptance))
        found[name] = MixTraits(best.prior_acceptance, sum(one.prior_draft_cost for one in traits))
    return found


def needing_match(
    drafters: Mapping[str, DrafterTraits], mixes: Mapping[str, tuple[str, ...]]
) -> frozenset[str]:
    """Drafters that propose only where text was found elsewhere, and mixes with such a one, which
    gain nothing over their other members without it."""
    found = {kind for kind, traits in drafters.items() if traits.needs_match}
    return frozenset(found | {mix for mix, kinds in mixes.items() if not found.isdisjoint(kinds)})


class Kinds(NamedTuple):
    """Drafters and mixes by what they need."""

    on_device: frozenset[str]
    """Drafters that must catch up on rows committed without them, and all mixes."""
    needing: frozenset[str]
    """Those that are of use only where a request has a match."""
    matching: tuple[str, ...]
    """Drafters among these, no mixes."""
    blind: frozenset[str]
    """Those that must catch up and need no match."""
    mixed: frozenset[str]
    """Mixes among those that are of use only where a request has a match."""
    members: Mapping[str, tuple[str, ...]]
    """Of every mix."""

    @classmethod
    def of(
        cls, drafters: Mapping[str, DrafterTraits], mixes: Mapping[str, tuple[str, ...]]
    ) -> Self:
        """Those of a server."""
        on_device = frozenset({kind for kind, one in drafters.items() if one.on_device} | {*mixes})
        needing = needing_match(drafters, mixes)
        matching = tuple(kind for kind, one in drafters.items() if one.needs_match)
        mixed = needing & mixes.keys()
        return cls(on_device, needing, matching, on_device - needing, mixed, mixes)


def rows_of(
    drafters: Mapping[str, DrafterTraits], mixes: Mapping[str, tuple[str, ...]]
) -> dict[str, frozenset[str]]:
    """Drafters on the device whose rows a step by each such drafter or mix computes."""
    on_device = {kind for kind, traits in drafters.items() if traits.on_device}
    kinds = {kind: frozenset({kind}) for kind in on_device}
    return kinds | {mix: frozenset(on_device & {*members}) for mix, members in mixes.items()}


class Picker:
    """Picks drafters for requests. Deterministic for one seed and one sequence of calls."""

    def __init__(
        self,
        mixes: Mapping[str, tuple[str, ...]],
        acceptance: AcceptanceModel,
        explore: float,
        seed: int,
        matching: Collection[str] = (),
    ) -> None:
        """
        Args:
            acceptance: knows each member.
            explore: probability with which a request tries another drafter, as far as the account
                allows.
            matching: drafters that propose only where text was found elsewhere.
        """
        self.mixes = mixes
        self.matching = matching
        self.account = _START_TOKENS
        """Tokens that trying may still lose."""
        self._acceptance = acceptance
        self._chances = min(explore, 0.5), min(explore * _EAGER, 0.5)
        """With which a drafter that is known for a request, and one that is hardly known, is
        tried."""
        self._rng = random.Random(seed)
        self._counts: Counter[tuple[str, str]] = Counter()
        self._tables: dict[str, tuple[Floats, list[list[float]]]] = {}
        """Expected tokens, and what ``_kept`` made of them, by drafter."""

    def pick(self, obs: StepObs, mix: str, k: int) -> tuple[Pick, ...]:
        """Who drafts for each request of a step.

        Args:
            mix: the members are its drafters.
            k: draft length of the step.
        """
        kept = [(kind, kind in self.matching, self._kept(kind)) for kind in self.mixes[mix]]
        nothing: Mapping[str, DraftRecord] = {}
        picks = []
        for match, record in zip(
            (0,) * obs.batch if obs.matches is None else obs.matches,
            obs.records or (nothing,) * obs.batch,
            strict=True,
        ):
            # One frame for the whole batch: a call for each member takes as long as its sums.
            names: list[str] = []
            values: list[float] = []
            for kind, needs_match, by_match in kept:
                usual = by_match[match]
                if needs_match:
                    if not match:
                        continue
                    value = usual[k]
                elif (own := record.get(kind)) is None:
                    value = usual[k]
                else:
                    value = expected_kept(usual, k, own)
                names.append(kind)
                values.append(value)
            picks.append(self._pick(names, values, record))
        for one, count in Counter(picks).items():
            self._counts[one.drafter, one.reason] += count
        return tuple(picks)

    def _kept(self, kind: str) -> list[list[float]]:
        """[B][K + 1] draft tokens that a drafter keeps of any request, by kind of match."""
        expected = self._acceptance.expected_tokens(kind)
        known = self._tables.get(kind)
        if known is None or known[0] is not expected:
            table: list[list[float]] = (expected - 1).tolist()
            known = self._tables[kind] = expected, table
        return known[1]

    def _pick(
        self, names: list[str], values: list[float], record: Mapping[str, DraftRecord]
    ) -> Pick:
        luck = self._rng.random()
        if len(values) == 1:
            self._save(values[0])
            return _certain(names[0])
        most = max(values)
        best = values.index(most)
        self._save(most)
        total = 0.0
        for number, value in enumerate(values):
            if number == best or most - value > self.account:
                continue
            own = record.get(names[number])
            is_new = own is None or own.num_rounds < _FEW_ROUNDS
            chance = self._chances[is_new] / (len(values) - 1)
            if luck < chance:
                self.account -= most - value
                return Pick(names[number], chance, "try")
            luck -= chance
            total += chance
        return Pick(names[best], 1 - total, "best")

    def _save(self, kept: float) -> None:
        """Save a share of the tokens that a request is expected to keep."""
        self.account += _BUDGET * (1 + kept)
        if self.account > _MOST_TOKENS:
            self.account = _MOST_TOKENS

    def figures(self) -> dict[str, Any]:
        """JSON-ready."""
        return {f"{kind}/{reason}": num for (kind, reason), num in sorted(self._counts.items())}


@cache
def _certain(kind: str) -> Pick:
    """The pick of the only one that can draft."""
    return Pick(kind, 1.0, "best")


def expected_kept(usual: Sequence[float], k: int, record: DraftRecord | None) -> float:
    """Draft tokens of the next draft that a request is expected to keep.

    Args:
        usual: [K + 1] draft tokens that the drafter keeps of any request, by K.
        record: of this request; ``None``: it has not drafted for it.
    """
    if record is None or record.num_rounds == 0:
        return usual[k]
    num_rounds, num_verified, num_accepted = record
    drafted = round(num_verified / num_rounds)
    typical = usual[drafted] if drafted < len(usual) else usual[-1]
    if typical < _LEAST_KEPT:
        typical = _LEAST_KEPT
    prior = _PRIOR_ROUNDS * typical
    return usual[k] * ((prior + num_accepted) / (prior + num_rounds * typical))
