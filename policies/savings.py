"""What drafting saves: the time that plain decoding would have taken for the same tokens, less the
time that the steps took.

``tokens * (1 / plain rate - 1 / actual rate)``, step by step: the rates are those of the batch that
the step had, so that neither load nor traffic can be mistaken for a saving.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from policies.interface import Outcome


@runtime_checkable
class TimesPlainSteps(Protocol):
    """A policy that knows how long plain steps take."""

    def plain_s(self, batch: int) -> float | None:
        """Predicted seconds of a plain step; ``None`` while it is only a guess."""
        ...


@dataclass(slots=True)
class Savings:
    """Sums since the start. The engine's thread adds, any thread reads."""

    plain_s_of: Callable[[int], float | None]
    """Seconds of a plain step by batch."""
    decode_s: float = 0.0
    """Time of the steps that count: those whose time says something, see ``Outcome.has_prefill``,
    and for which that of a plain step is known."""
    plain_s: float = 0.0
    """Time that plain decoding would have taken for their tokens."""

    def observe(self, outcome: Outcome) -> None:
        """Count one step."""
        num_rows = len(outcome.rows)
        if outcome.has_prefill or not num_rows or outcome.step_s <= outcome.plan_s:
            return
        if outcome.decision.draft_k == 0:
            plain_s: float | None = outcome.step_s - outcome.plan_s  # measured: no need to predict
        else:
            plain_s = self.plain_s_of(outcome.batch)
        if plain_s is None:
            return
        self.decode_s += outcome.step_s
        self.plain_s += plain_s * outcome.rows.tokens_each

    @property
    def saved_s(self) -> float:
        """Negative if drafting has cost time."""
        return self.plain_s - self.decode_s
