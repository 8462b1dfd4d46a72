"""What the engine notes of a request's rounds, for its trace."""

from __future__ import annotations

from collections.abc import Sequence as Several
from typing import Any, NamedTuple

from buffer.records import FIGURES


class NotedStep(NamedTuple):
    """What the rounds of one step have in common; see ``buffer.records.Round``."""

    drafter: str
    version: int
    draft_k: int
    propensity: float
    batch: int
    step_s: float
    policy: str = ""
    step: int | None = None
    reason: str = ""
    is_timed: bool = True
    note_names: tuple[str, ...] = ()
    """Figures that the policy noted, as ``kind.name``,"""
    notes: tuple[float, ...] = ()
    """and their values."""

    def kept(self) -> KeptStep:
        """As it is kept: the collector leaves plain tuples of numbers alone once it has seen them,
        and visits those of a class of their own for ever."""
        return tuple(self)


KeptStep = tuple[Any, ...]
"""Fields of a ``NotedStep`` in order."""


class NotedRounds:
    """The rounds of one request, noted as they are committed.

    Flat lists, of which the recorder makes columns. There is no object for a round: the engine
    notes 40,000 a second, and the garbage collector would visit each of them again and again.
    ``NotedStep.kept`` is shared by all rounds of a step.
    """

    __slots__ = ("confidence", "considered", "draft_ids", "p_logp", "q_logp", "rounds")

    WIDTH = 6
    """Entries of a round in ``rounds``."""

    def __init__(self) -> None:
        self.rounds: list[Any] = []
        """Of each round its step, anchor, number of draft tokens and of values of q, number of
        accepted tokens, and next token."""
        self.draft_ids: list[int] = []
        self.q_logp: list[float] = []
        """One for each draft token that was drawn from a distribution."""
        self.p_logp: list[float] = []
        """One for each accepted token and the first rejected one: nothing behind it counts."""
        self.considered: list[int] = []
        """Of each round that the device could cut: its number among the rounds, 1 if its step's
        allocation could shorten drafts, else 0, and the length of its draft before that."""
        self.confidence: list[float] = []
        """Three figures of each position of these drafts."""

    def add(
        self,
        step: KeptStep,
        anchor: int,
        draft_ids: Several[int],
        q_logp: Several[float],
        p_logp: Several[float],
        num_accepted: int,
        next_id: int,
    ) -> None:
        """Note a round with draft tokens.

        Args:
            q_logp: empty if the tokens were not drawn.
            p_logp: of at least the tokens that count.
        """
        num = len(draft_ids)
        self.rounds += (step, anchor, num, len(q_logp), num_accepted, next_id)
        self.draft_ids += draft_ids
        self.q_logp += q_logp
        self.p_logp += p_logp[: min(num_accepted + 1, num)]

    def add_considered(self, may_cut: bool, figures: Several[float]) -> None:
        """Note what the cut of the round that is added next was decided by."""
        number = len(self.rounds) // self.WIDTH
        self.considered += (number, int(may_cut), len(figures) // FIGURES)
        self.confidence += figures

    def add_plain(self, step: KeptStep, anchor: int, next_id: int) -> None:
        """Note a round without draft tokens."""
        self.rounds += (step, anchor, 0, 0, 0, next_id)
