"""The traces of late, without hidden rows, to which draft policies are fitted.

They are kept encoded, in memory alone, and given to the process that fits as they are.
"""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

from buffer.codec import encode_trace
from buffer.deletions import Owner
from buffer.records import Count, Trace

MOST_BYTES = 64 << 20
"""Of all records; a trace of 200 rounds has some 20 KB."""
_NOTHING = 1e-6
"""Steps that rounding leaves of a version whose traces are gone."""


@dataclass(frozen=True, slots=True)
class RecentTrace:
    """One trace."""

    record: bytes
    owner: Owner
    num_steps: float
    """Steps that are this trace's, if those of a batch are shared by its requests."""
    drafted: dict[int, float]
    """Those of them in which the drafter drafted, by its version."""

    @classmethod
    def of(cls, trace: Trace, drafter: str) -> RecentTrace:
        """
        Args:
            drafter: kind of the drafter whose K is to be fitted.
        """
        rounds, counts = trace.rounds, trace.rounds.counts
        shares = 1 / np.maximum(counts[Count.BATCH], 1)
        kinds = rounds.drafters
        index = kinds.index(drafter) if drafter in kinds else -1
        own = (counts[Count.DRAFTER] == index) & (counts[Count.DRAFT_K] > 0)
        versions, which = np.unique(counts[Count.VERSION][own], return_inverse=True)
        sums = np.bincount(which, shares[own], len(versions)).tolist()
        return cls(
            bytes(encode_trace(replace(trace, features=None))),
            Owner(trace.tenant, trace.finished_unix_ms),
            float(shares.sum()),
            dict(zip(versions.tolist(), sums, strict=True)),
        )


class RecentTraces:
    """The newest of them, bounded by steps and bytes."""

    def __init__(self, most_steps: int, most_bytes: int = MOST_BYTES) -> None:
        self._most_steps, self._most_bytes = most_steps, most_bytes
        self._traces = deque[RecentTrace]()
        self._num_steps, self._num_bytes = 0.0, 0
        self._drafted = defaultdict[int, float](float)
        self.total = 0.0
        """Steps of all traces that were ever kept."""

    def add(self, trace: RecentTrace) -> None:
        """Keep one more, and drop the oldest if they are too many."""
        self.total += trace.num_steps
        self._keep(trace)
        self._cut()

    def _keep(self, trace: RecentTrace) -> None:
        self._traces.append(trace)
        self._count(trace, 1)

    def _cut(self) -> None:
        while len(self._traces) > 1 and (
            self._num_steps > self._most_steps or self._num_bytes > self._most_bytes
        ):
            self._count(self._traces.popleft(), -1)

    def forget(self, is_deleted: Callable[[Owner], bool]) -> None:
        """Drop those of deleted tenants."""
        kept = [one for one in self._traces if not is_deleted(one.owner)]
        self.clear()
        for one in kept:
            self._keep(one)

    def clear(self) -> None:
        """Drop all: the target has other weights."""
        self._traces.clear()
        self._num_steps, self._num_bytes = 0.0, 0
        self._drafted.clear()

    def records(self) -> list[bytes]:
        """Encoded traces, the oldest first."""
        return [one.record for one in self._traces]

    @property
    def num_drafted(self) -> int:
        """Steps in which the drafter drafted."""
        return round(sum(self._drafted.values()))

    def _count(self, trace: RecentTrace, sign: int) -> None:
        self._num_steps += sign * trace.num_steps
        self._num_bytes += sign * len(trace.record)
        for version, num in trace.drafted.items():
            self._drafted[version] += sign * num
            if self._drafted[version] < _NOTHING:
                del self._drafted[version]
