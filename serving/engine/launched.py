"""What determines a round's program, and a round between its launch and its reading."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

from policies.interface import Pick
from serving.engine.allocating import Considered, Cutting, Seen
from serving.engine.cuda_graphs import Landing
from serving.engine.round_buffers import Integers
from serving.engine.sequence import Sequence

Picks = tuple[Pick, ...] | None
"""Of a mix, who drafts for each request; ``None``: the first of it for all, or no mix drafts."""


class RoundKey(NamedTuple):
    """Properties of a round that determine its program."""

    size: int
    """Number of requests, including padding."""
    num_draft: int
    neural: str | None
    """Kind of the neural drafter, or name of a mix; ``None``: tokens are uploaded, or K is 0."""
    is_greedy: bool
    """All requests are greedy and use the logits as they are, so no distribution is computed."""
    is_scored: bool = False
    """A request asks for log probabilities, so K is at most ``RoundBuffers.most_scored``. Never
    greedy."""
    cutting: Cutting | None = None
    """How drafts are cut on the device; ``None``: not at all."""
    ends: bool = False
    """Drafts may be ended while they are made."""


@dataclass(frozen=True, slots=True)
class Launched:
    """A round that was launched but not yet read."""

    batch: list[Sequence]
    key: RoundKey
    drafter: str
    """Kind of the drafter, or name of a mix; meaningless if K is 0."""
    picks: Picks
    """See ``Decision.picks``."""
    outputs: Integers
    """[size, columns] on the host, valid once ``landed`` and until the round after the next one is
    launched."""
    scores: Tensor | None
    """[size * Q, 1 + 2 n] float64, valid once ``landed``: log p of each emitted token and of the n
    best ones, and the ids of the latter; ``None`` if no request asked."""
    landed: Landing
    draft_share: float
    """Share of its time that is spent on drafting."""
    seen: Seen | None = None
    """What the cut was decided by; ``None`` if drafts were not cut."""
    considered: Considered | None = None
    """What their end was decided by; ``None`` if they could not be ended."""

    @property
    def most_tokens(self) -> int:
        """Largest number of tokens that one request can commit."""
        return self.key.num_draft + 1
