"""How far what policies predicted for their steps is from what came, by the notes in traces.

A policy that notes ``tokens`` (of a request, the target's own included) and ``seconds`` of a step
(``policies.interface.Note``) is judged; whichever it is.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from policies.logged import LoggedStep

_LEAST_STEPS = 30
"""With a prediction from which on anything is said."""


@dataclass(frozen=True, slots=True)
class Predictions:
    """Those of one policy against the outcomes of the same steps."""

    policy: str
    num_steps: int
    tokens: float
    """Predicted tokens of a request over those that came; 1 is exact."""
    seconds: float | None
    """Predicted seconds over those that the steps took; ``None`` if none was timed."""

    def to_line(self) -> str:
        """For a terminal."""
        line = (
            f"{self.policy} predicted {self.num_steps} steps: {100 * (self.tokens - 1):+.1f} % "
            f"tokens"
        )
        return line if self.seconds is None else f"{line}, {100 * (self.seconds - 1):+.1f} % time"


def predictions_of(steps: Iterable[LoggedStep]) -> list[Predictions]:
    """One for each policy that noted enough."""
    by_policy: dict[str, list[tuple[float, float, LoggedStep]]] = {}
    for step in steps:
        notes = dict(step.notes)
        tokens, seconds = (notes.get(f"{step.policy}.{name}") for name in ("tokens", "seconds"))
        if tokens is not None and seconds is not None:
            by_policy.setdefault(step.policy, []).append((tokens, seconds, step))
    return [
        _judged(policy, found)
        for policy, found in sorted(by_policy.items())
        if len(found) >= _LEAST_STEPS
    ]


def _judged(policy: str, found: list[tuple[float, float, LoggedStep]]) -> Predictions:
    timed = [(seconds, step.step_s) for _, seconds, step in found if step.is_timed]
    rows = sum(len(step.rows) for _, _, step in found)
    came = rows + sum(row.num_accepted for _, _, step in found for row in step.rows)
    return Predictions(
        policy,
        len(found),
        sum(tokens * len(step.rows) for tokens, _, step in found) / came,
        sum(one for one, _ in timed) / sum(took for _, took in timed) if timed else None,
    )
