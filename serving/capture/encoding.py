"""Makes records of finished requests, on the recorder's thread."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from buffer.blocks import Blocks
from buffer.codec import encode_trace, encode_without_rows
from buffer.records import FeatureRows, Sampling, Trace
from serving.capture.finished import Finished
from serving.capture.rounds import round_columns
from serving.engine.captured_rows import CapturedRows, Held

_SKIP = 0.125
"""Share of the ring that the recorder skips after it was too late for a trace."""


class TraceEncoder:
    """Copies the rows of finished requests out of the ring and packs them."""

    def __init__(self, rows: CapturedRows, layer_ids: tuple[int, ...]) -> None:
        self._rows = rows
        self._layer_ids = layer_ids
        self.num_lost_rows = 0
        """Captured rows that the ring overwrote before they were read."""
        self._blocks = Blocks()
        self._is_behind = False

    def of(self, finished: Finished) -> Callable[[], memoryview | None]:
        """A function that encodes the trace, for the recorder's thread.

        It returns ``None`` if the ring has begun to overwrite the request's rows by then. A
        recorder that far behind would find holes in every trace, so it skips some to catch up.
        For a request longer than the ring, the remaining rows are used.
        """
        pieces = finished.capture_rows

        def encode() -> memoryview | None:
            if not finished.has_all:
                held, lost = self._rows.read(pieces)
                self._is_behind = False
                self.num_lost_rows += lost
                features = self._rows.features(held, self._layer_ids)
                return encode_trace(_trace(finished, features))
            if self._rows.has_all(pieces, _SKIP if self._is_behind else 0.0):
                record = self._copied(finished)
                if record is not None:
                    self._is_behind = False
                    return record
            self._is_behind = True
            self.num_lost_rows += sum(pieces[2::3])
            return None

        return encode

    def _copied(self, finished: Finished) -> memoryview | None:
        """The trace, its rows copied from the ring to their place in the record; ``None`` if any
        of them was overwritten meanwhile."""
        ring = self._rows
        places = ring.places(finished.capture_rows)
        held = Held(places.positions, ring.blank_rows(places), ring.scales(places))
        trace = _trace(finished, ring.features(held, self._layer_ids))
        record, rows = encode_without_rows(trace, self._blocks)
        ring.copy_rows(places, rows)
        return None if ring.num_lost(places) else record


def _trace(finished: Finished, features: FeatureRows) -> Trace:
    return Trace(
        producer=finished.producer,
        epoch=finished.epoch,
        seq=finished.seq,
        request_id=finished.request_id,
        tenant=finished.tenant,
        target_fingerprint=finished.target_fingerprint,
        sampling=Sampling(finished.sampling),
        prompt_length=finished.num_prompt,
        token_ids=np.asarray(finished.tokens, dtype=np.int32),
        rounds=round_columns(finished.noted()),
        features=features,
        finished_unix_ms=finished.finished_unix_ms,
    )
