"""What a buffer in memory holds."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass, field

from buffer.bundles import Bundle
from buffer.claims import Claims
from buffer.deletions import Deletions


@dataclass(frozen=True, slots=True)
class Appended:
    payload: bytes | None
    """``None``: it was deleted."""
    appended_s: float
    """Unix time, seconds."""


@dataclass(slots=True)
class Stream:
    """Records of one writer by number; evicted ones are removed from the front."""

    records: dict[int, Appended] = field(default_factory=dict)
    first: int = 0
    """Number of the oldest record kept."""
    end: int = 0
    """One past the number of the newest."""


@dataclass(slots=True)
class Share:
    """What one group has done with the records of one writer."""

    next: int = 0
    """Number of the next record to be handed out."""
    committed: int = 0
    lost: int = 0
    """Evicted before they were handed out, or after a member had left them."""
    deleted: int = 0
    """Deleted likewise."""
    in_hand: dict[int, tuple[str, int]] = field(default_factory=dict)
    """Number -> the member that has it, and how many records that member had got before."""
    left: dict[int, tuple[str, int]] = field(default_factory=dict)
    """The same of records that members left, ascending: a checkpoint may still commit them."""


@dataclass(slots=True)
class Held:
    """Content of one named buffer. ``lock`` guards all of it."""

    lock: threading.RLock = field(default_factory=threading.RLock)
    streams: dict[str, Stream] = field(default_factory=dict)
    unreadable: dict[str, Appended] = field(default_factory=dict)
    num_bytes: int = 0
    """Payload bytes of all records kept."""
    bundles: dict[int, Bundle] = field(default_factory=dict)
    highest: int = -1
    denied: set[int] = field(default_factory=set)
    marks: dict[str, set[int]] = field(default_factory=dict)
    epoch: int = 0
    watchers: list[Callable[[], None]] = field(default_factory=list)
    deletions: Deletions = field(default_factory=Deletions)
    groups: dict[str, dict[str, Share]] = field(default_factory=dict)
    """Group -> writer -> what it has done with its records."""
    claims: dict[str, Claims] = field(default_factory=dict)
    """By group."""
    lines: dict[str, Held] = field(default_factory=dict)
    """Versions of further drafters, by the name of their line; only these are held there."""
