"""Turns finished requests into traces for the buffer."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import count

import numpy as np

from buffer.records import Sampling, Trace
from serving.engine.capture_ring import CaptureRing, Held, Piece, feature_rows
from serving.engine.sequence import Sequence
from serving.sampling import trace_values


@dataclass(frozen=True, slots=True)
class Producer:
    """The server process that makes traces; ``name`` and ``epoch`` together are unique."""

    name: str
    epoch: int
    target_fingerprint: str


_SKIP = 0.125
"""Share of the ring that the recorder skips after it was too late for a trace."""


class TraceMaker:
    """Numbers finished requests; their rows are copied and packed on the recorder's thread."""

    def __init__(
        self,
        producer: Producer,
        ring: CaptureRing,
        layer_ids: tuple[int, ...],
    ) -> None:
        self._producer = producer
        self._ring = ring
        self._layer_ids = layer_ids
        self.num_lost_rows = 0
        """Captured rows that the ring overwrote before they were read."""
        self._numbers = count()
        self._is_behind = False

    def finished(self, sequence: Sequence) -> Callable[[], Trace | None]:
        """A function that builds the trace, for the recorder's thread.

        It returns ``None`` if the ring has begun to overwrite the request's rows by then. A
        recorder that far behind would find holes in every trace, so it skips some to catch up.
        For a request longer than the ring, the remaining rows are used.
        """
        pieces = sequence.capture_rows
        has_all = not self._ring.num_lost(pieces)
        seq = next(self._numbers)
        finished_ms = int(time.time() * 1000)

        def make() -> Trace | None:
            held = self._held(pieces, has_all)
            if held is None:
                return None
            request = sequence.request
            return Trace(
                producer=self._producer.name,
                epoch=self._producer.epoch,
                seq=seq,
                request_id=request.id,
                tenant=request.tenant,
                target_fingerprint=self._producer.target_fingerprint,
                sampling=Sampling(trace_values(request.sampling)),
                prompt_length=sequence.num_prompt,
                token_ids=np.asarray(sequence.tokens, dtype=np.int32),
                rounds=tuple(sequence.rounds),
                features=feature_rows(held, self._layer_ids),
                finished_unix_ms=finished_ms,
            )

        return make

    def _held(self, pieces: list[Piece], has_all: bool) -> Held | None:
        """Rows of a finished request; ``None`` if it finished with all rows and lost some since."""
        ahead = _SKIP if self._is_behind else 0.0
        self._is_behind = has_all and self._ring.num_lost(pieces, ahead) > 0
        if not self._is_behind:
            held, lost = self._ring.read(pieces)
            self._is_behind = has_all and lost > 0
            if not self._is_behind:
                self.num_lost_rows += lost
                return held
        self.num_lost_rows += sum(count for _, _, count in pieces)
        return None
