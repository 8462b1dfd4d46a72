"""What a draft policy sees and says. Host-side, torch-free, no I/O, microseconds.

Lossless by construction: ``plan`` runs before the step's tokens are drawn, on figures of earlier
steps and on prefix-only facts (how long a suffix matches), never on a drawn draft token.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol


@dataclass(frozen=True, slots=True)
class StepObs:
    """The batch about to be decoded."""

    step: int
    """Running number of the engine's steps."""
    batch: int
    """Requests to decode, >= 1."""
    caps: tuple[int, ...]
    """[batch] largest K each request may have now (its own cap, and tokens it has left)."""
    suffix_matches: tuple[int, ...] | None
    """[batch] tokens of suffix that the index matched for each request, 0 for none; ``None`` when
    there is no suffix drafter."""
    drafters: tuple[str, ...]
    """Kinds ready to propose, e.g. ``("eagle3", "suffix")``."""
    max_draft: int
    """Largest K the engine can run."""
    version: int
    """Neural drafter version now in force."""
    pending_rows: int = 0
    """Committed rows, over the batch, that the neural drafter must catch up on before it drafts."""


@dataclass(frozen=True, slots=True)
class Decision:
    """What to do in this step."""

    drafter: str
    """``none`` iff draft_k is 0."""
    draft_k: int
    propensity: float
    """Probability that the policy took exactly this (drafter, draft_k) here, in (0, 1]."""
    explore: bool
    reason: str
    """A few words for logs: ``goodput``, ``probe``, ``fixed``, ``plain``."""


@dataclass(frozen=True, slots=True)
class RowOutcome:
    """What one request of the step made of it."""

    num_verified: int
    """Draft tokens verified, 0..K."""
    num_accepted: int
    suffix_match: int
    """Its entry of ``StepObs.suffix_matches``; 0 without a suffix drafter."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a step made of a decision."""

    decision: Decision
    batch: int
    rows: tuple[RowOutcome, ...]
    step_s: float
    """Wall time of the whole step, seconds, prefill excluded (``None``-free: steps that mixed
    prefill are reported with ``has_prefill``)."""
    draft_s: float
    """Part of it spent drafting, looking at the batch and planning: plain decoding needs none."""
    has_prefill: bool
    """The step also computed prompt chunks, or log probabilities that a request asked for, so its
    time says nothing about the arms."""
    version: int
    plan_s: float = 0.0
    """Part of ``draft_s`` spent on looking at the batch and planning."""


class DraftPolicy(Protocol):
    """Decides before each step, learns after it."""

    def rest(self) -> Decision | None:
        """A decision for the next step that needs no look at the batch; ``None``: look."""
        ...

    def plan(self, obs: StepObs) -> Decision:
        """Choose a drafter and K for the next step."""
        ...

    def observe(self, outcome: Outcome) -> None:
        """Take in what the step did."""
        ...

    def on_swap(self, version: int, calibration: dict[str, Any]) -> None:
        """The neural drafter changed: forget or re-seed its acceptance figures.

        ``calibration`` is ``Manifest.policy``, e.g. ``{"acceptance": [0.8, 0.7, ...]}``: the
        conditional acceptance of draft position 1, 2, ... on held-out traces.
        """
        ...

    def figures(self) -> dict[str, Any]:
        """JSON-ready state for /admin and the dashboard."""
        ...
