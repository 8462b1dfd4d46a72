"""Deletion of everything that a buffer holds of one tenant.

Every backend keeps a list of deletions: for each tenant that was deleted, until when. Most remove
stored records at once. The list is for what they cannot reach: records on their way from a server,
copies that a trainer holds, and stores that remove no single record. Whoever meets such a record
drops it and counts it.

The list holds digests of names, not names: a tenant is often somebody's mail address.

Until when a deletion holds is told by the records, not by the clock of whoever deletes: at least
until the tenant's newest stored record ended, and at most an hour longer than anybody's did. Under
a clock that is wrong by a year, what the tenant sends next would be dropped for a year otherwise.
"""

from __future__ import annotations

import hashlib
import re
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from buffer.columns import ENTRY, HEAD, ColumnsError, parse_head
from buffer.small_json import is_whole
from buffer.tensors import TensorFileError, parse_json

Payload = bytes | bytearray | memoryview

SCHEMA = b"slipstream.trace"
_DIGEST_LETTERS = 32
_LOOK_S = 1.0
SKEW_MS = 3_600_000
"""A deletion holds for so much longer than the newest stored record at most: records that ended
later may be on their way, and clocks differ."""


@dataclass(frozen=True, slots=True)
class Owner:
    """Whose a trace is, and when its request ended."""

    tenant: str
    finished_unix_ms: int


@dataclass(frozen=True, slots=True)
class Deleted:
    """What one deletion removed."""

    records: int = 0
    """Stored traces of the tenant, read or not."""
    num_bytes: int = 0
    """Their payload."""
    quarantined: int = 0
    """Records put aside as undecodable that were the tenant's, or whose tenant cannot be read."""
    remains: str | None = None
    """What the store cannot remove at once, in words; ``None``: nothing."""
    until_ms: int | None = None
    """Traces that ended until then are dropped when they arrive, unix ms; ``None``: there is no
    buffer whose list could say so."""


@dataclass(slots=True)
class Ends:
    """When the newest of the records that a deletion has looked at ended, unix ms."""

    of_tenant: int | None = None
    of_anybody: int | None = None

    def see(self, owner: Owner, tenant: str) -> bool:
        """Take note of one record that is not deleted yet; whether it is the tenant's."""
        at = owner.finished_unix_ms
        self.of_anybody = at if self.of_anybody is None else max(self.of_anybody, at)
        if owner.tenant != tenant:
            return False
        self.of_tenant = at if self.of_tenant is None else max(self.of_tenant, at)
        return True

    def until_ms(self, asked_ms: int | None) -> int:
        """Until when a deletion that is made now holds, unix ms.

        Args:
            asked_ms: what somebody has asked for instead of now, which a clock may have wrong.
        """
        if asked_ms is None:
            now = now_ms()
            asked_ms = now if self.of_anybody is None else min(now, self.of_anybody + SKEW_MS)
        return asked_ms if self.of_tenant is None else max(asked_ms, self.of_tenant)


@dataclass(frozen=True, slots=True)
class Deletions:
    """Tenants that were deleted, each until some time; what they send later is kept."""

    until_ms: Mapping[str, int] = field(default_factory=dict)
    """Digest of a tenant's name -> unix ms."""

    def __bool__(self) -> bool:
        return bool(self.until_ms)

    def covers(self, tenant: str, finished_unix_ms: int) -> bool:
        """Whether a trace of this tenant that ended then was deleted."""
        if not self.until_ms:
            return False
        until_ms = self.until_ms.get(digest_of(tenant))
        return until_ms is not None and finished_unix_ms <= until_ms

    def covers_owner(self, owner: Owner) -> bool:
        """``covers`` of its fields."""
        return self.covers(owner.tenant, owner.finished_unix_ms)

    def covers_record(self, payload: Payload) -> bool:
        """The same of a stored record; False if it is no trace whose tenant can be read."""
        if not self.until_ms:
            return False
        owner = owner_of(payload)
        return owner is not None and self.covers_owner(owner)

    def since(self, unix_ms: int) -> Deletions:
        """Those that hold until later than this."""
        return Deletions({digest: ms for digest, ms in self.until_ms.items() if ms > unix_ms})

    def with_tenant(self, digest: str, until_ms: int) -> Deletions:
        """The list with one more deletion; an earlier one of the same tenant is prolonged."""
        until_ms = max(until_ms, self.until_ms.get(digest, until_ms))
        return Deletions({**self.until_ms, digest: until_ms})

    def without(self, digest: str) -> Deletions:
        """The list after a deletion was taken back."""
        return Deletions({one: ms for one, ms in self.until_ms.items() if one != digest})

    @classmethod
    def from_json(cls, stored: Any) -> Deletions:
        """Inverse of ``dict(until_ms)``.

        Raises:
            ValueError: it is no such list.
        """
        if not isinstance(stored, dict) or not all(map(is_whole, stored.values())):
            raise ValueError("a list of deletions must map digests to unix milliseconds")
        return cls({str(digest): ms for digest, ms in stored.items()})


def digest_of(tenant: str) -> str:
    """The name under which a tenant's deletion is listed."""
    return hashlib.sha256(tenant.encode("utf-8", "surrogatepass")).hexdigest()[:_DIGEST_LETTERS]


def is_digest(text: str) -> bool:
    """Whether a text can be one of ``digest_of``."""
    return re.fullmatch(rf"[0-9a-f]{{{_DIGEST_LETTERS}}}", text) is not None


def now_ms() -> int:
    """Until when a deletion that is made now holds."""
    return int(time.time() * 1000)


def owner_of(payload: Payload) -> Owner | None:
    """Whose a record is, by its header alone; ``None`` if that cannot be read."""
    view = memoryview(payload)
    try:
        head = parse_head(view)
        begin = HEAD.size + head.num_columns * ENTRY.size
        if head.schema != SCHEMA or begin + head.num_text_bytes > len(view):
            return None
        text = parse_json(bytes(view[begin : begin + head.num_text_bytes]))
        tenant, finished_ms = text["tenant"], text["finished_unix_ms"]
    except (ColumnsError, TensorFileError, KeyError, TypeError):
        return None
    if not isinstance(tenant, str) or type(finished_ms) is not int:
        return None
    return Owner(tenant, finished_ms)


def may_be_of(tenant: str, payload: Payload) -> bool:
    """Whether a record that was put aside has to go with a tenant: it is the tenant's, or nobody
    can tell."""
    owner = owner_of(payload)
    return owner is None or owner.tenant == tenant


class DeletionWatch:
    """Looks at a buffer's list of deletions now and then, and keeps the last one it could read."""

    def __init__(self, read: Callable[[], Deletions], every_s: float = _LOOK_S) -> None:
        """
        Args:
            read: reads the list; may raise OSError or ValueError.
            every_s: seconds between two looks.
        """
        self._read = read
        self._every_s = every_s
        self._next_s = 0.0
        self.latest = Deletions()
        self.read_s: float | None = None
        """Monotonic time at which it was read last; ``None``: it never could be."""

    def look(self) -> Deletions:
        """The list, at most ``every_s`` old unless it cannot be read at present."""
        now_s = time.monotonic()
        if now_s >= self._next_s:
            self._next_s = now_s + self._every_s
            try:
                self.latest = self._read()
                self.read_s = time.monotonic()
            except (OSError, ValueError):  # whatever reads records says so
                return self.latest
        return self.latest
