"""From a finished request to the trace that the buffer keeps."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import count

import numpy as np

from buffer.records import Sampling, Trace
from serving.capture import CaptureRing, feature_rows
from serving.sequence import Sequence


@dataclass(frozen=True, slots=True)
class Producer:
    """Who writes: unique with ``epoch`` over restarts."""

    name: str
    epoch: int
    target_fingerprint: str


class TraceMaker:
    """Numbers finished requests; their rows are copied and packed on the recorder's thread."""

    def __init__(
        self,
        producer: Producer,
        ring: CaptureRing,
        layer_ids: tuple[int, ...],
        count_lost: Callable[[int], None],
    ) -> None:
        self._producer = producer
        self._ring = ring
        self._layer_ids = layer_ids
        self._count_lost = count_lost
        self._numbers = count()

    def finished(self, sequence: Sequence) -> Callable[[], Trace]:
        """Returns what builds the trace. Rows that the ring has overwritten until it is called are
        lost and counted."""
        seq = next(self._numbers)
        finished_ms = int(time.time() * 1000)

        def make() -> Trace:
            held, lost = self._ring.read(sequence.capture_rows)
            self._count_lost(lost)
            request, shape = sequence.request, sequence.request.sampling
            return Trace(
                producer=self._producer.name,
                epoch=self._producer.epoch,
                seq=seq,
                request_id=request.id,
                tenant=request.tenant,
                target_fingerprint=self._producer.target_fingerprint,
                sampling=Sampling(
                    shape.temperature, shape.top_p, shape.top_k, shape.min_p, shape.seed
                ),
                prompt_length=sequence.num_prompt,
                token_ids=np.asarray(sequence.tokens, dtype=np.int32),
                rounds=tuple(sequence.rounds),
                features=feature_rows(held, self._layer_ids),
                finished_unix_ms=finished_ms,
            )

        return make
