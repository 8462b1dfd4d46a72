"""What a round proposed and what was kept of it, on the host.

Shapes: R requests, K draft tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import compress
from typing import Any

from policies.interface import Pick
from serving.engine.allocating import Considered
from serving.requests import TokenLogprob


@dataclass(frozen=True, slots=True)
class Judged:
    """What a member of a mix alone would have kept, as far as the round's tokens decide it."""

    drafter: str
    """Its kind."""
    num_decided: list[int]
    """[R] places of its draft that they decide."""
    num_kept: list[int]
    """[R]."""

    def of(self, lives: list[bool]) -> Judged:
        """That of some requests."""
        decided, kept = compress(self.num_decided, lives), compress(self.num_kept, lives)
        return Judged(self.drafter, list(decided), list(kept))


@dataclass(frozen=True, slots=True)
class Proposed:
    """The drafts of a round, on the host."""

    drafter: str
    """Kind of the drafter, or name of a mix."""
    tokens: list[list[int]]
    """[R][its number of draft tokens]."""
    q_logp: list[list[float]] | None
    """Log q of each of them; ``None`` if tokens are not sampled."""
    p_logp: list[list[float]]
    """[R][K] the target's log probability of each draft token, after temperature and truncation."""
    picks: list[Pick] | None = None
    """[R] who drafted for each request; ``None``: ``drafter`` for all."""
    considered: Considered | None = None
    """The drafts before the device cut them to ``tokens``; ``None`` if they were not to be cut."""
    most: int | None = None
    """Where the drafter itself ends some drafts early: how long they could have been."""
    judged: Judged | None = None
    """Of a mix of text and a neural drafter, what text alone would have kept."""

    def of(self, lives: list[bool]) -> Proposed:
        """Those of some requests."""
        return Proposed(
            self.drafter,
            list(compress(self.tokens, lives)),
            None if self.q_logp is None else list(compress(self.q_logp, lives)),
            list(compress(self.p_logp, lives)),
            None if self.picks is None else list(compress(self.picks, lives)),
            self.considered and self.considered.of(lives),
            self.most,
            self.judged and self.judged.of(lives),
        )

    def kinds(self) -> list[str]:
        """[R] kind of the drafter of each request."""
        if self.picks is None:
            return [self.drafter] * len(self.tokens)
        return [pick.drafter for pick in self.picks]


@dataclass(frozen=True, slots=True)
class Verified:
    """The verdicts of a round, on the host."""

    num_accepted: list[int]
    """[R]."""
    next_ids: list[int | None]
    """[R] the target's own token after the accepted ones; ``None``: its row of logits is NaN or
    infinite, so nothing can follow."""

    def of(self, lives: list[bool]) -> Verified:
        """Those of some requests."""
        return Verified(
            list(compress(self.num_accepted, lives)), list(compress(self.next_ids, lives))
        )


@dataclass(frozen=True, slots=True)
class Decoded:
    """The outcome of one round, on the host."""

    proposed: Proposed | None
    verified: Verified
    numbers: list[int] | None
    """[R] running number of each request's first captured row; ``None`` without a ring."""
    scores: list[list[list[float]]]
    """[R][Q], see ``rounds.Launched``; empty if no request asked."""

    def of(self, lives: list[bool]) -> Decoded:
        """The outcome for some requests."""
        if all(lives):
            return self
        return Decoded(
            self.proposed and self.proposed.of(lives),
            self.verified.of(lives),
            self.numbers and list(compress(self.numbers, lives)),
            list(compress(self.scores, lives)),
        )

    def scored(self, r: int, tokens: list[int], num_top: int) -> list[TokenLogprob]:
        """Log probabilities of the tokens that request r emitted, with the best alternatives."""
        rows = self.scores[r][: len(tokens)]
        return [_scored(token, row, num_top) for token, row in zip(tokens, rows, strict=True)]


def _scored(token: int, row: list[float], num_top: int) -> TokenLogprob:
    """Convert a row of ``rounds.Launched.scores``."""
    own, *rest = row
    best, ids = rest[: len(rest) // 2], rest[len(rest) // 2 :]
    return TokenLogprob(token, own, tuple(zip(map(int, ids[:num_top]), best, strict=False)))


def cut_to(rows: list[list[Any]], lens: list[int]) -> list[list[Any]]:
    """The first entries of each row."""
    return [row[:num] for row, num in zip(rows, lens, strict=True)]
