"""Turns finished requests into traces for the buffer."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import count

import numpy as np

from buffer.blocks import Blocks
from buffer.codec import encode_trace, encode_without_rows
from buffer.records import FeatureRows, Sampling, Trace
from serving.capture.rounds import round_columns
from serving.engine.capture_ring import CaptureRing, Held
from serving.engine.sequence import Sequence
from serving.sampling import trace_values


@dataclass(frozen=True, slots=True)
class Producer:
    """The server process that makes traces; ``name`` and ``epoch`` together are unique."""

    name: str
    epoch: int
    target_fingerprint: str


@dataclass(frozen=True, slots=True)
class _Stamp:
    """What tells one trace from the others."""

    producer: Producer
    """As it was when the request finished."""
    seq: int
    finished_unix_ms: int


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
        self._blocks = Blocks()
        self._is_behind = False

    def target_changed(self, fingerprint: str) -> None:
        """Requests that finish from now on were answered by other weights of the target. Called on
        the engine's thread, like ``finished``."""
        self._producer = replace(self._producer, target_fingerprint=fingerprint)

    def finished(self, sequence: Sequence) -> Callable[[], memoryview | None]:
        """A function that encodes the trace, for the recorder's thread.

        It returns ``None`` if the ring has begun to overwrite the request's rows by then. A
        recorder that far behind would find holes in every trace, so it skips some to catch up.
        For a request longer than the ring, the remaining rows are used.
        """
        pieces = sequence.capture_rows
        has_all = self._ring.has_all(pieces)
        stamp = _Stamp(self._producer, next(self._numbers), int(time.time() * 1000))

        def encode() -> memoryview | None:
            if not has_all:
                held, lost = self._ring.read(pieces)
                self._is_behind = False
                self.num_lost_rows += lost
                features = self._ring.features(held, self._layer_ids)
                return encode_trace(self._trace(sequence, stamp, features))
            if self._ring.has_all(pieces, _SKIP if self._is_behind else 0.0):
                record = self._copied(sequence, stamp)
                if record is not None:
                    self._is_behind = False
                    return record
            self._is_behind = True
            self.num_lost_rows += sum(pieces[2::3])
            return None

        return encode

    def _copied(self, sequence: Sequence, stamp: _Stamp) -> memoryview | None:
        """The trace, its rows copied from the ring to their place in the record; ``None`` if any
        of them was overwritten meanwhile."""
        ring = self._ring
        places = ring.places(sequence.capture_rows)
        held = Held(places.positions, ring.blank_rows(places), ring.scales(places))
        features = ring.features(held, self._layer_ids)
        trace = self._trace(sequence, stamp, features)
        record, rows = encode_without_rows(trace, self._blocks)
        ring.copy_rows(places, rows)
        return None if ring.num_lost(places) else record

    def _trace(self, sequence: Sequence, stamp: _Stamp, features: FeatureRows) -> Trace:
        request, producer = sequence.request, stamp.producer
        return Trace(
            producer=producer.name,
            epoch=producer.epoch,
            seq=stamp.seq,
            request_id=request.id,
            tenant=request.tenant,
            target_fingerprint=producer.target_fingerprint,
            sampling=Sampling(trace_values(request.sampling)),
            prompt_length=sequence.num_prompt,
            token_ids=np.asarray(sequence.tokens, dtype=np.int32),
            rounds=round_columns(sequence.rounds),
            features=features,
            finished_unix_ms=stamp.finished_unix_ms,
        )
