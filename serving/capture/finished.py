"""A finished request as the recorder needs it: plain values, which another process can be sent."""

from __future__ import annotations

from typing import Any

import msgspec

from serving.engine.noted_rounds import NotedRounds, NotedStep


class Finished(msgspec.Struct, array_like=True, frozen=True, tag=True):
    """What becomes a trace, together with the rows that the ring holds."""

    producer: str
    epoch: int
    target_fingerprint: str
    """As it was when the request finished."""
    seq: int
    finished_unix_ms: int
    request_id: str
    tenant: str
    sampling: dict[str, Any]
    num_prompt: int
    tokens: list[int]
    capture_rows: list[int]
    """See ``captured_rows.Pieces``."""
    has_all: bool
    """The ring held all of its rows when it finished. If not, it was longer than the ring."""
    rounds: list[Any]
    """This and what follows: see ``NotedRounds``."""
    draft_ids: list[int]
    q_logp: list[float]
    p_logp: list[float]
    considered: list[int]
    confidence: list[float]

    def noted(self) -> NotedRounds:
        """Its rounds as the engine noted them."""
        noted = NotedRounds()
        if self.rounds and isinstance(self.rounds[0], list):  # as they arrive from another process
            for at in range(0, len(self.rounds), NotedRounds.WIDTH):
                step = NotedStep(*self.rounds[at])
                self.rounds[at] = step._replace(note_names=tuple(step.note_names)).kept()
        noted.rounds, noted.draft_ids = self.rounds, self.draft_ids
        noted.q_logp, noted.p_logp = self.q_logp, self.p_logp
        noted.considered, noted.confidence = self.considered, self.confidence
        return noted
