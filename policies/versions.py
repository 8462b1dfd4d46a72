"""What is known of a drafter's acceptance the moment its weights change.

In order of preference: what the same version has shown live before; what its parent has shown live,
moved by the difference between both on the same held-out traces; the same from the versions' own
published figures; those figures alone; a weak memory of the former weights.

Live and published figures are never compared directly. Live rounds begin where the round before
ended, held-out chains at every token, and traffic moves on; a difference in log-odds between two
versions measured alike carries over, and hard text stays hard.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np

from policies.acceptance import AcceptanceModel
from policies.calibration import Calibration
from policies.drafter_acceptance import Floats
from policies.interface import DrafterTraits
from policies.log_odds import log_odds
from policies.regimes import Evidence

T = TypeVar("T")

_log_odds = np.vectorize(log_odds, otypes=[np.float64])  # for a swap, not for a step
_KEPT_VERSIONS = 32
"""Versions remembered for each drafter."""
_KNOWN_WEIGHT = 64.0
"""Rounds that live evidence of the same version counts for; moved by a difference in log-odds, it
counts the less the larger that is."""
_PUBLISHED_WEIGHT = 16.0
"""Rounds that a published calibration counts for without any: a dozen live rounds outvote it."""
_FORMER_WEIGHT = 2.0
"""Rounds that the evidence of the former weights counts for after a swap without calibration."""

_MIX_WEIGHT = 16.0
"""Rounds that the evidence of several drafters together counts for after one of them changed."""


@dataclass(frozen=True, slots=True)
class _Known:
    """One version's live evidence when it last left, and what was published with it."""

    evidence: Evidence
    hazards: Floats
    published: list[float]


class VersionMemory:
    """Re-seeds an ``AcceptanceModel`` at every swap."""

    def __init__(self, model: AcceptanceModel, drafters: Mapping[str, DrafterTraits]) -> None:
        self._model = model
        self._drafters = drafters
        self._line = {kind: traits.former_of or kind for kind, traits in drafters.items()}
        """Whose versions each drafter has: those of a former version are the drafter's own."""
        self._known: dict[str, dict[int, _Known]] = {line: {} for line in self._line.values()}
        self._current: dict[str, tuple[int, list[float]]] = {}
        """Version in force and what was published with it, by drafter."""

    def on_swap(self, drafter: str, version: int, calibration: Mapping[str, Any]) -> None:
        """Remember the version that leaves, and start the one that comes from what is known of it.

        Args:
            calibration: see ``DraftPolicy.on_swap``; figures that are malformed are ignored.
        """
        line, read = self._line[drafter], Calibration.of(calibration)
        for other in self._current.keys() - {drafter}:
            if self._line[other] == line:
                self._leaves(other)  # its version may be the one that comes
        leaving = self._leaves(drafter)
        self._current[drafter] = (version, read.acceptance)
        own = self._known[line].get(version)
        if own is not None:
            evidence = own.evidence.limited(_KNOWN_WEIGHT)
        else:
            evidence = self._first_evidence(drafter, leaving, read)
        self._model.replace(drafter, evidence)

    def on_change(self, mix: str) -> None:
        """Keep a weak memory of what a mix has shown: a member of it gets other weights."""
        evidence, _ = self._model.usual(mix)
        self._model.replace(mix, evidence.limited(_MIX_WEIGHT))

    def _leaves(self, drafter: str) -> _Known:
        """Keep what the version in force has shown."""
        version, published = self._current.get(drafter, (None, []))
        evidence, hazards = self._model.usual(drafter)
        leaving = _Known(evidence, hazards, published)
        known = self._known[self._line[drafter]]
        if version is not None:
            remember(known, version, leaving)
        return leaving

    def _first_evidence(self, drafter: str, leaving: _Known, read: Calibration) -> Evidence:
        known, published = self._known[self._line[drafter]], read.acceptance
        parent = None if read.parent is None else known.get(read.parent)
        if published and parent is not None and read.parent_acceptance:
            evidence = _moved(parent, read.parent_acceptance, published)
        elif published and leaving.published:
            evidence = _moved(leaving, leaving.published, published)
        elif published and self._has_pool(drafter):
            evidence = Evidence.none(leaving.hazards.shape)
        else:
            return leaving.evidence.limited(_FORMER_WEIGHT)
        return _filled_up(evidence, published) if self._has_pool(drafter) else evidence

    def _has_pool(self, drafter: str) -> bool:
        return len(self._drafters[drafter].prior_acceptance) == 1

    def figures(self) -> dict[str, Any]:
        """JSON-ready: versions whose live evidence is kept, by drafter."""
        return {kind: sorted(known) for kind, known in self._known.items() if known}


def _moved(known: _Known, old: Sequence[float], new: Sequence[float]) -> Evidence:
    """A version's evidence, moved by the difference in log-odds between two published figures; the
    last known difference also holds for all positions beyond."""
    max_draft = known.hazards.shape[1]
    num = min(len(old), len(new), max_draft)
    differences = _log_odds(np.array(new[:num])) - _log_odds(np.array(old[:num]))
    shifts = np.concatenate((differences, np.full(max_draft - num, differences[-1])))
    hazards = 1 / (1 + np.exp(-_log_odds(known.hazards) - shifts))
    reached = np.minimum(known.evidence.reached, _KNOWN_WEIGHT / (1 + shifts**2))
    return Evidence(reached, reached * hazards)


def _filled_up(evidence: Evidence, published: Sequence[float]) -> Evidence:
    """Evidence with the published figures where the pool of all buckets has little."""
    reached, accepted = evidence.reached.copy(), evidence.accepted.copy()
    num = min(len(published), reached.shape[1])
    pool = reached[-1, :num]
    weights = _PUBLISHED_WEIGHT * (1 - pool / _KNOWN_WEIGHT)
    accepted[-1, :num] += weights * published[:num]
    pool += weights
    return Evidence(reached, accepted)


def remember(known: dict[int, T], version: int, value: T) -> None:
    """Keep what is known of a version that leaves, and forget the one that left the longest ago if
    they become too many."""
    known.pop(version, None)
    known[version] = value
    while len(known) > _KEPT_VERSIONS:
        del known[next(iter(known))]
