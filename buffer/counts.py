"""Records of a buffer by outcome: as a writer, a reader and a group of readers count them."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class WriterCounts:
    """Records of one writer by outcome: appended = durable + pending + doubtful + dropped +
    deleted + left."""

    appended: int
    durable: int
    """Acknowledged: stored for good, until evicted."""
    pending: int
    """Written, or waiting to be sent, but not acknowledged yet."""
    doubtful: int
    """Never acknowledged because the disk failed to sync, or a service did not answer until the
    writer was closed; they may be readable or lost."""
    evicted_records: int
    """Evicted by this writer to keep the limits, whoever wrote them."""
    evicted_bytes: int
    dropped: int = 0
    """Never sent: a service was away or slow until there was no more room for waiting records, of
    which the oldest are dropped first, or until the writer was closed."""
    deleted: int = 0
    """Removed with their tenant before they were sent."""
    missing: int = 0
    """Of the durable ones: somebody deleted or moved their file before they were evicted, as by
    ``rm -rf`` of the run's folder. Whether they had been read is unknown here."""
    left: int = 0
    """On the disk's spool when the writer was closed: the next process sends them."""
    recovered: int = 0
    """Records that ended processes had left in the spool, stored since; not among the others."""
    unrecovered: int = 0
    """Likewise, but damaged, torn, deleted or dropped before they could be sent."""


@dataclass(frozen=True, slots=True)
class ReaderCounts:
    """Records by outcome: written = read + damaged + evicted_unread + deleted + not read yet.

    Where readers of a group share the records, this holds for all members together, and a record
    that is handed out again counts again.
    """

    read: int = 0
    damaged: int = 0
    """Records that were written whole but cannot be read any more."""
    torn: int = 0
    """Writers that died within their last record, which therefore was never acknowledged."""
    evicted_unread: int = 0
    """Records evicted before this reader reached them."""
    deleted: int = 0
    """Records deleted with their tenant before this reader reached them."""


@dataclass(frozen=True, slots=True)
class GroupCounts:
    """Records of the buffer as one group has dealt with them.

    appended = committed + pending + lost + deleted, exactly, whenever they are counted.
    """

    group: str
    committed: int
    pending: int
    """Not read by any member yet, or read and not committed yet."""
    lost: int
    """Evicted or damaged before the group had committed them."""
    deleted: int = 0
    """Deleted with their tenant before the group had got them. One that is evicted before the group
    passes it may count as lost instead."""


@dataclass(frozen=True, slots=True)
class BufferStats:
    """What the buffer holds, for ``buffer stats``. Counts of writers that no longer exist may be
    missing, from the groups' counts too."""

    num_writers: int
    appended: int
    """Records that were ever stored."""
    held: int
    """Records that can still be read."""
    held_bytes: int
    """Bytes that they take, as the backend counts them towards ``max_bytes``; deleted records count
    until the backend reuses their room."""
    groups: tuple[GroupCounts, ...]
    deleted: int = 0
    """Records deleted with their tenant whose place is still known; they are not held."""
    forgotten: int = 0
    """Of the records ever stored: some group has committed them or later ones, and the store does
    not know them any more, because it was started without its data or somebody has overwritten its
    files. Groups that had not got them count them as lost."""
    deleted_bytes: int = 0
    """Of ``held_bytes``: those of deleted records."""
