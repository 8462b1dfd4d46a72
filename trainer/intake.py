"""Reads traces from the buffer and refuses those that do not fit."""

from __future__ import annotations

import time
from collections import Counter
from dataclasses import dataclass, field

from buffer.records import Trace
from buffer.traces import TraceReader
from drafters.samples import Sample
from trainer.dataset import Expected, Refusal, key_of, sample_of
from trainer.journal import Journal

TRACES_AT_ONCE = 64


@dataclass(slots=True)
class Intake:
    """The trainer's end of the trace log."""

    reader: TraceReader
    expected: Expected
    max_sequence: int
    """Maximum number of positions in a piece."""
    journal: Journal
    num_refused: Counter[str] = field(default_factory=Counter)
    """Refused traces by reason, since this process started."""
    last_trace_s: float = field(default_factory=time.monotonic)
    """Monotonic time at which the last trace arrived."""

    def read(self) -> list[Sample]:
        """Samples of the next traces, at most ``TRACES_AT_ONCE``; never waits for more."""
        traces = self.reader.read(TRACES_AT_ONCE)
        if traces:
            self.last_trace_s = time.monotonic()
        samples = [self._sample(trace) for trace in traces]
        return [sample for sample in samples if sample is not None]

    def find(self, wanted: set[str], reader: TraceReader) -> dict[str, Sample]:
        """Samples named ``wanted`` that ``reader`` still finds in the log, by their names."""
        found = dict[str, Sample]()
        while wanted - found.keys():
            num_seen = _num_seen(reader)
            for trace in reader.read(TRACES_AT_ONCE):
                if key_of(trace) in wanted:
                    sample = sample_of(trace, self.expected, self.max_sequence)
                    if not isinstance(sample, Refusal):
                        found[sample.key] = sample
            if _num_seen(reader) == num_seen:
                break  # end of the log
        return found

    def _sample(self, trace: Trace) -> Sample | None:
        sample = sample_of(trace, self.expected, self.max_sequence)
        if isinstance(sample, Sample):
            return sample
        self.num_refused[sample.reason] += 1
        self.journal.event("refused", trace=key_of(trace), reason=sample.reason, text=sample.text)
        return None


def _num_seen(reader: TraceReader) -> int:
    return reader.counts.read + reader.counts.duplicate + reader.counts.quarantined
