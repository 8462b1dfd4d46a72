"""Reads traces from the buffer and refuses those that do not fit.

Consumes: records of the trace log. Once started, a thread of its own reads and checks, so that the
trainer finds samples ready.
Waits for: the trainer to take what is ready; new records.
"""

from __future__ import annotations

import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

from buffer.deletions import Deletions, Owner
from buffer.interface import Location, ServiceAwayError
from buffer.records import Trace
from buffer.run_target import RunTarget
from buffer.seen import Identity, SeenTraces
from buffer.traces import TraceCounts, TraceReader
from configs.logs import Outage
from drafters.samples import Sample
from trainer.dataset import Expected, Refusal, key_of, sample_of
from trainer.journal import Journal
from trainer.recent import RecentTrace, RecentTraces
from trainer.target import TargetWatch

TRACES_AT_ONCE = 64
BATCHES_AHEAD = 2
"""Batches that wait for the trainer, of at most ``TRACES_AT_ONCE`` traces or 64 MiB each."""
POLL_S = 0.05
"""Seconds between two looks for new records once all were read. What arrives meanwhile is taken in
at once, which costs the trainer less than a few traces at a time."""


@dataclass(frozen=True, slots=True)
class _Batch:
    """What one read of the log gave."""

    samples: list[Sample]
    refused: list[tuple[str, Refusal]]
    """Key and reason of each refused trace."""
    places: dict[str, Any]
    """The reader's after it."""
    counts: TraceCounts
    """Likewise."""
    is_empty: bool
    """All records had been read before."""
    problem: str | None = None
    """Why the buffer could not be read at present."""
    seen: tuple[Identity, ...] = ()
    """Of all its traces."""
    target: str = ""
    """Fingerprint of the target that its samples are of."""
    locations: Mapping[str, Location] = field(default_factory=dict)
    """Of its samples in the buffer, by key."""
    recent: tuple[RecentTrace, ...] = ()
    """What draft policies are fitted to."""


class _Reached(NamedTuple):
    """How far the trainer's traces go."""

    places: dict[str, Any]
    """The reader's."""
    counts: TraceCounts


class Intake:
    """The trainer's end of the trace log."""

    def __init__(
        self,
        reader: TraceReader,
        expected: Expected,
        max_sequence: int,
        journal: Journal,
        watch: TargetWatch,
        recent: RecentTraces | None = None,
    ) -> None:
        """
        Args:
            reader: read by nobody else.
            expected: what traces must fit.
            max_sequence: most positions of a piece.
            journal: told of refused traces.
            watch: knows which weights the run's target has.
            recent: also keeps the traces of late, for draft policies; ``None``: nobody fits any.
        """
        self.recent = recent
        self.expected = expected
        self.watch = watch
        self.num_refused: Counter[str] = Counter()
        """Refused traces by reason, since this process started."""
        self.last_trace_s = time.monotonic()
        """Monotonic time at which the last trace arrived."""
        self.num_deleted = 0
        """Samples that waited for the trainer when their tenant was deleted."""
        self._deletions = Deletions()
        """Those that ``new_deletions`` has returned."""
        self._max_sequence = max_sequence
        self._journal = journal
        self._ahead: _Ahead | None = None
        self._outage = Outage("read traces")
        self._locations = dict[str, Location]()
        """Of the samples that were handed over, until ``locations`` is asked for others."""
        self._reader = reader
        self.continue_with(reader)

    def continue_with(self, reader: TraceReader) -> None:
        """Read from this reader from now on; not once started."""
        assert self._ahead is None, "the intake has started"
        if reader is not self._reader:
            self._reader.close()
        self._reader = reader
        offsets = reader.offsets()
        self._reached = _Reached(offsets["places"], reader.counts)
        # The reader is ahead of the trainer, and its memory too large to copy for each batch.
        self._seen = SeenTraces.from_json(offsets["seen"])

    def start(self) -> None:
        """Read ahead, on a thread of its own, until ``stop``."""
        if self._ahead is None:
            self._ahead = _Ahead(self._next_batch)

    def stop(self) -> None:
        """Stop reading ahead. What was read and not handed over is read again after a restart."""
        if self._ahead is not None:
            self._ahead.stop()

    def commit(self, offsets: dict[str, Any]) -> None:
        """Nobody of the trainer's group gets the samples before these offsets again.

        Raises:
            OSError: the buffer failed; a later commit includes this one.
        """
        self._reader.commit(offsets)

    def close(self) -> None:
        """Stop reading, and leave what was not committed to the group's other trainers."""
        self.stop()
        self._reader.close()

    def read(self, *, wait: bool = True) -> list[Sample]:
        """Samples of the next traces, at most ``TRACES_AT_ONCE``.

        Never waits for traces to be written. While a buffer's service is away there are none, and
        the journal says so.

        Args:
            wait: while earlier traces are still being read, wait for the next of them.

        Raises:
            OSError: the log cannot be read.
        """
        batch = self._next_batch() if self._ahead is None else self._ahead.take(wait)
        if batch is None:
            return []
        self._reached = _Reached(batch.places, batch.counts)
        self._locations |= batch.locations
        for identity in batch.seen:
            self._seen.add(*identity)
        self._note(batch.problem)
        if batch.samples and batch.target != self.expected.target_fingerprint:
            batch = _of_former(batch)
        if batch.samples or batch.refused:
            self.last_trace_s = time.monotonic()
        for key, refusal in batch.refused:
            self.num_refused[refusal.reason] += 1
            self._journal.event("refused", trace=key, reason=refusal.reason, text=refusal.text)
        self._remember(batch)
        kept = [one for one in batch.samples if not _is_covered(one.owner, self._reader.deletions)]
        self.num_deleted += len(batch.samples) - len(kept)
        return kept

    def _remember(self, batch: _Batch) -> None:
        """For draft policies."""
        if self.recent is None or batch.target != self.expected.target_fingerprint:
            return
        for trace in batch.recent:
            if not _is_covered(trace.owner, self._reader.deletions):
                self.recent.add(trace)

    def moved_target(self) -> RunTarget | None:
        """The target of the run, if its weights are no longer those that samples are of.

        Until ``follow`` or ``TargetWatch.give_up`` no more traces are read: those of the new
        weights would be refused."""
        return self.watch.moved(self.expected.target_fingerprint)

    def follow(self, fingerprint: str) -> None:
        """Refuse traces of the former weights of the target from now on, also those that were read
        ahead."""
        self.expected = replace(self.expected, target_fingerprint=fingerprint)
        if self.recent is not None:
            self.recent.clear()

    def new_deletions(self) -> Deletions | None:
        """Tenants that were deleted, if any was since the last call."""
        found = self._reader.deletions
        if found == self._deletions:
            return None
        self._deletions = found
        if self.recent is not None:
            self.recent.forget(found.covers_owner)
        return found

    def offsets(self) -> dict[str, Any]:
        """Offsets behind the samples that ``read`` has returned, for a checkpoint."""
        return {"places": self._reached.places, "seen": self._seen.to_json()}

    def locations(self, keys: Collection[str]) -> dict[str, Location]:
        """Where in the buffer the samples with these keys are, as far as they were handed over or
        found; those of all others are forgotten."""
        self._locations = {key: self._locations[key] for key in keys if key in self._locations}
        return dict(self._locations)

    @property
    def counts(self) -> TraceCounts:
        """Records by outcome, up to the samples that ``read`` has returned."""
        return self._reached.counts

    def find(
        self, wanted: set[str], reader: TraceReader, locations: Mapping[str, Location]
    ) -> dict[str, Sample]:
        """Samples named ``wanted`` that ``reader`` still finds in the log, by their names.

        The whole log, which may have an hour of traffic, is read only for those without a location,
        or if not one of them is where it was: then it is a copy, or its backend cannot do better.

        Args:
            locations: of samples in the log, by key, as far as they are known.
        """
        known = {key: at for key, at in locations.items() if key in wanted}
        found = self._fetched(known, reader)
        missing = wanted - (known.keys() if found else found.keys())
        while missing - found.keys():
            num_seen = _num_seen(reader)
            for location, trace in reader.read_located(TRACES_AT_ONCE):
                if key_of(trace) in missing:
                    found |= self._found(trace, location)
            if _num_seen(reader) == num_seen:
                break  # end of the log
        return found

    def _fetched(self, known: Mapping[str, Location], reader: TraceReader) -> dict[str, Sample]:
        """The samples that are at their location."""
        stored = reader.fetch(known.values()) or {}
        found = dict[str, Sample]()
        for key, location in known.items():
            trace = stored.get(location)
            if trace is not None and key_of(trace) == key:
                found |= self._found(trace, location)
        return found

    def _found(self, trace: Trace, location: Location) -> dict[str, Sample]:
        sample = sample_of(trace, self.expected, self._max_sequence)
        if not isinstance(sample, Sample):
            return {}
        if (found := self._recent_of(trace)) is not None and self.recent is not None:
            self.recent.add(found)
        self._locations[sample.key] = location
        return {sample.key: sample}

    def _recent_of(self, trace: Trace) -> RecentTrace | None:
        """For draft policies, if somebody fits one and the trace is of the target."""
        kind, fingerprint = self.expected.counted, self.expected.target_fingerprint
        if self.recent is None or kind is None or trace.target_fingerprint != fingerprint:
            return None
        return RecentTrace.of(trace, kind)

    def _note(self, problem: str | None) -> None:
        if problem is not None:
            if line := self._outage.failed(problem):
                self._journal.event("buffer_away", text=f"{line}; trying again")
        elif line := self._outage.ended():
            self._journal.event("buffer_back", text=line)

    def _next_batch(self) -> _Batch:
        before, expected = _num_seen(self._reader), self.expected
        samples, refused = list[Sample](), list[tuple[str, Refusal]]()
        if self.watch.moved(expected.target_fingerprint) is not None:
            return _Batch([], [], self._reader.places(), self._reader.counts, True)
        try:
            located = self._reader.read_located(TRACES_AT_ONCE)
        except ServiceAwayError as error:
            return _Batch([], [], self._reader.places(), self._reader.counts, True, str(error))
        locations = dict[str, Location]()
        for location, trace in located:
            sample = sample_of(trace, expected, self._max_sequence)
            if isinstance(sample, Sample):
                samples.append(sample)
                locations[sample.key] = location
            else:
                refused.append((key_of(trace), sample))
        is_empty = _num_seen(self._reader) == before
        places, counts = self._reader.places(), self._reader.counts
        seen = tuple((trace.producer, trace.epoch, trace.seq) for _, trace in located)
        target = expected.target_fingerprint
        recent = (self._recent_of(trace) for _, trace in located)
        return _Batch(
            samples,
            refused,
            places,
            counts,
            is_empty,
            seen=seen,
            target=target,
            locations=locations,
            recent=tuple(one for one in recent if one is not None),
        )


class _Ahead:
    """Reads batches ahead, on a thread."""

    def __init__(self, next_batch: Callable[[], _Batch]) -> None:
        self._next_batch = next_batch
        self._ready: deque[_Batch] = deque()
        self._has_all = False
        """The last read found nothing new."""
        self._stopping = False
        self._error: BaseException | None = None
        self._changed = threading.Condition()
        """Guards all of the above; notified whenever it changes."""
        self._thread = threading.Thread(target=self._run, name="intake", daemon=True)
        self._thread.start()

    def take(self, wait: bool) -> _Batch | None:
        """The next batch; ``None`` if all records were read, or none is ready and nobody waits.

        Raises:
            BaseException: what ended the thread.
        """
        with self._changed:
            if wait:
                self._changed.wait_for(
                    lambda: self._ready or self._has_all or self._stopping or self._error
                )
            if self._ready:
                batch = self._ready.popleft()
                self._changed.notify_all()
                return batch
            if self._error is not None:
                raise self._error
            return None

    def stop(self) -> None:
        """End the thread, and wait for that."""
        with self._changed:
            self._stopping = True
            self._changed.notify_all()
        self._thread.join()

    def _run(self) -> None:
        try:
            while self._wait_for_room():
                batch = self._next_batch()
                with self._changed:
                    self._has_all = batch.is_empty
                    if self._ready and self._ready[-1].is_empty:
                        self._ready.pop()  # it says nothing that the next one does not
                    self._ready.append(batch)
                    self._changed.notify_all()
        except BaseException as error:  # the thread's outermost loop: whoever takes must know
            with self._changed:
                self._error = error
                self._changed.notify_all()

    def _wait_for_room(self) -> bool:
        """Wait until a batch is wanted, for ``POLL_S`` at least if there was nothing to read;
        returns False once told to stop."""
        with self._changed:
            if self._has_all:
                self._changed.wait_for(lambda: self._stopping, POLL_S)
            self._changed.wait_for(lambda: self._stopping or self._has_room())
            return not self._stopping

    def _has_room(self) -> bool:
        return sum(not batch.is_empty for batch in self._ready) < BATCHES_AHEAD


def _of_former(batch: _Batch) -> _Batch:
    """The batch with all its samples refused: the target's weights were replaced meanwhile."""
    why = Refusal("target", "it is of weights that the target had when it was read ahead")
    refused = [*batch.refused, *((one.key, why) for one in batch.samples)]
    return replace(batch, samples=[], refused=refused)


def _is_covered(owner: Owner | None, deletions: Deletions) -> bool:
    return owner is not None and deletions.covers_owner(owner)


def _num_seen(reader: TraceReader) -> int:
    counts = reader.counts
    return counts.read + counts.duplicate + counts.quarantined + counts.deleted
