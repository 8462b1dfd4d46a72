"""Turns finished requests into what the recorder makes traces of."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import count

from serving.capture.encoding import TraceEncoder
from serving.capture.finished import Finished
from serving.engine.captured_rows import CapturedRows
from serving.engine.sequence import Sequence
from serving.sampling import trace_values


@dataclass(frozen=True, slots=True)
class Producer:
    """The server process that makes traces; ``name`` and ``epoch`` together are unique."""

    name: str
    epoch: int
    target_fingerprint: str


class TraceMaker:
    """Numbers finished requests; their rows are copied and packed by the recorder."""

    def __init__(
        self,
        producer: Producer,
        ring: CapturedRows,
        layer_ids: tuple[int, ...],
    ) -> None:
        self._producer = producer
        self._ring = ring
        self._encoder = TraceEncoder(ring, layer_ids)
        self._numbers = count()

    @property
    def num_lost_rows(self) -> int:
        """Captured rows that the ring overwrote before this process read them."""
        return self._encoder.num_lost_rows

    def target_changed(self, fingerprint: str) -> None:
        """Requests that finish from now on were answered by other weights of the target. Called on
        the engine's thread, like all but ``num_lost_rows``."""
        self._producer = replace(self._producer, target_fingerprint=fingerprint)

    def finished(self, sequence: Sequence) -> Callable[[], memoryview | None]:
        """A function that encodes the trace, for the recorder's thread; see ``TraceEncoder.of``."""
        return self._encoder.of(self.noted(sequence))

    def noted(self, sequence: Sequence) -> Finished:
        """What a recorder in another process makes the trace of."""
        request, producer, rounds = sequence.request, self._producer, sequence.rounds
        return Finished(
            producer=producer.name,
            epoch=producer.epoch,
            target_fingerprint=producer.target_fingerprint,
            seq=next(self._numbers),
            finished_unix_ms=int(time.time() * 1000),
            request_id=request.id,
            tenant=request.tenant,
            sampling=dict(trace_values(request.sampling)),
            num_prompt=sequence.num_prompt,
            tokens=sequence.tokens,
            capture_rows=sequence.capture_rows,
            has_all=self._ring.has_all(sequence.capture_rows),
            rounds=rounds.rounds,
            draft_ids=rounds.draft_ids,
            q_logp=rounds.q_logp,
            p_logp=rounds.p_logp,
            considered=rounds.considered,
            confidence=rounds.confidence,
        )
