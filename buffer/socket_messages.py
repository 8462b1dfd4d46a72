"""What a message over the socket may say: requests to the holder of a buffer, and its answers.

Everything is checked before it is used, and before memory for what follows it is taken: a process
that sends something else loses its connection, and nothing else happens.
"""

from __future__ import annotations

import errno
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import Any

from buffer.counts import BufferStats, GroupCounts, ReaderCounts
from buffer.deletions import Deleted, Deletions
from buffer.interface import MAX_UNREADABLE_BYTES, TraceLimits, Unreadable
from buffer.memory import DEFAULT_BYTES
from buffer.plain_values import is_count, is_short_text
from buffer.small_json import is_whole

BATCH_BYTES = 8 << 20
"""Payload that a writer sends at once, unless a single record has more."""
MAX_RECORDS = 4096
"""Records of one message to the holder."""
MAX_READ_RECORDS = 1 << 16
"""Records of one answer; a reader that asks for more gets them with its next question."""
MAX_CLAIMS = 64
"""Claims of one message: with the longest names of producers, they fit into a request's header."""
_MAX_NAME = 512
_NAME = re.compile(r"[A-Za-z0-9_.-]{1,200}")
_LOCATION = re.compile(r"0|[1-9][0-9]{0,18}")

Check = Callable[[Any], bool]


class BadMessageError(ConnectionAbortedError):
    """The other end sent what none of ours sends."""

    def __init__(self, problem: str) -> None:
        super().__init__(errno.EBADMSG, problem)


@dataclass(frozen=True, slots=True)
class Caps:
    """What a holder takes at most, by the settings."""

    max_bytes: int = DEFAULT_BYTES
    """What the buffer may hold."""

    @property
    def record_bytes(self) -> int:
        """Of the largest record, see ``check_record``."""
        return self.max_bytes // 2

    @property
    def body_bytes(self) -> int:
        """Of all records of a message."""
        return max(BATCH_BYTES, self.record_bytes)


def check_request(header: Mapping[str, Any], num_body: int, caps: Caps) -> None:
    """Whether this is a question that a holder answers, and may have a body of this size.

    Raises:
        BadMessageError: it is not.
    """
    op = header.get("op")
    known = _REQUESTS.get(op) if isinstance(op, str) else None
    if known is None:
        raise BadMessageError("the holder of the buffer does not know this request")
    _check_fields(header, {"op": _is_text, **known})
    if op == "append":
        sizes = header["sizes"]
        is_small = num_body <= caps.body_bytes and all(n <= caps.record_bytes for n in sizes)
        if sum(sizes) != num_body or not is_small:
            raise BadMessageError("a body has other records than announced, or too large ones")
    elif num_body > (MAX_UNREADABLE_BYTES if op == "keep" else 0):
        raise BadMessageError(f"a request to {op} has a body of {num_body} bytes")


def _check_fields(found: Mapping[str, Any], known: Mapping[str, Check]) -> None:
    if found.keys() != known.keys():
        raise BadMessageError("a message has other fields than it should")
    for name, is_sound in known.items():
        if not is_sound(found[name]):
            raise BadMessageError(f"{name} in a message is not what it should be")


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _is_optional_text(value: Any) -> bool:
    return value is None or isinstance(value, str)


def _is_name(value: Any) -> bool:
    return isinstance(value, str) and _NAME.fullmatch(value) is not None


def _is_label(value: Any) -> bool:
    return isinstance(value, str) and len(value) <= _MAX_NAME


def _are_claims(value: Any) -> bool:
    return isinstance(value, list) and len(value) <= MAX_CLAIMS and all(map(_is_claim, value))


def _is_claim(value: Any) -> bool:
    """Writer and location of a record in memory, and producer, epoch and seq of its trace."""
    match value:
        case [writer, str(location), producer, epoch, seq] if _is_name(writer):
            is_trace = is_short_text(producer) and is_count(epoch) and is_count(seq)
            return is_trace and _LOCATION.fullmatch(location) is not None
    return False


def _is_seconds(value: Any) -> bool:
    return type(value) in (int, float) and 0 <= value < 1e12 and math.isfinite(value)


def _are_sizes(value: Any) -> bool:
    return isinstance(value, list) and len(value) <= MAX_RECORDS and all(map(is_whole, value))


def _are_offsets(value: Any) -> bool:
    """As both kinds of readers in memory store them."""
    if not isinstance(value, dict):
        return False
    return all(is_whole(one) or isinstance(one, str) for one in value.values())


def _are_optional_offsets(value: Any) -> bool:
    return value is None or _are_offsets(value)


def _are_limits(value: Any) -> bool:
    names = {one.name for one in fields(TraceLimits)}
    if not isinstance(value, dict) or value.keys() != names:
        return False
    if not is_whole(value["segment_bytes"], least=1):
        return False
    if value["max_bytes"] is not None and not is_whole(value["max_bytes"], least=1):
        return False
    if not _is_seconds(value["ttl_s"]) or not _is_seconds(value["sync_interval_s"]):
        return False
    try:
        TraceLimits(**value)
    except ValueError:
        return False
    return True


def _is_optional_whole(value: Any) -> bool:
    return value is None or is_whole(value)


def _is_some(value: Any) -> bool:
    return is_whole(value, least=1)


_REQUESTS: dict[str, dict[str, Check]] = {
    "write": {"name": _is_name, "limits": _are_limits},
    "append": {"first": is_whole, "sizes": _are_sizes},
    "tend": {},
    "open": {"group": _is_optional_text, "offsets": _are_optional_offsets},
    "read": {"max_records": _is_some, "max_bytes": _is_some},
    "commit": {"offsets": _are_offsets},
    "claim": {"traces": _are_claims},
    "stats": {},
    "delete": {"tenant": _is_text, "until_ms": _is_optional_whole},
    "undelete": {"digest": _is_label},
    "expire": {"limits": _are_limits},
    "deletions": {},
    "kept": {},
    "keep": {"name": _is_label},
    "refused": {},
}
"""What may be asked, and with which fields."""


# --- answers ---------------------------------------------------------------------------------


def written_of(answer: Mapping[str, Any]) -> tuple[int, tuple[int, int]]:
    """Records that the holder has of a writer, and what it has evicted: records and bytes.

    Raises:
        BadMessageError: the answer says something else.
    """
    match answer:
        case {"have": have, "evicted": [records, num_bytes]} if all(
            map(is_whole, (have, records, num_bytes))
        ):
            return have, (records, num_bytes)
    raise BadMessageError("the answer about a writer is none")


def read_so_far(answer: Mapping[str, Any]) -> tuple[dict[str, Any], ReaderCounts]:
    """Offsets and counts of a reader.

    Raises:
        BadMessageError: the answer says something else.
    """
    offsets: Any = answer.get("offsets")
    if not _are_offsets(offsets):
        raise BadMessageError("the answer has no offsets")
    return dict(offsets), ReaderCounts(**_whole_fields(answer.get("counts"), ReaderCounts))


def records_of(answer: Mapping[str, Any], num_body: int) -> list[tuple[str, str, int]]:
    """Writer, location and size of each record of a body.

    Raises:
        BadMessageError: the answer says something else.
    """
    found = answer.get("records")
    if not isinstance(found, list):
        raise BadMessageError("the answer has no records")
    records: list[tuple[str, str, int]] = []
    for one in found:
        match one:
            case [str(writer), str(location), size] if is_whole(size):
                records.append((writer, location, size))
            case _:
                raise BadMessageError("the answer has something else than a record")
    if sum(size for _, _, size in records) != num_body:
        raise BadMessageError("a body has other records than announced")
    return records


def claimed_of(answer: Mapping[str, Any], num_claims: int) -> list[bool]:
    """
    Raises:
        BadMessageError: the answer says something else.
    """
    found = answer.get("is_first")
    if not isinstance(found, list) or len(found) != num_claims:
        raise BadMessageError("the answer about claims is none")
    if not all(isinstance(one, bool) for one in found):
        raise BadMessageError("the answer about a claim is neither yes nor no")
    return found


def stats_of(answer: Mapping[str, Any]) -> BufferStats:
    """
    Raises:
        BadMessageError: the answer says something else.
    """
    stats = answer.get("stats")
    if not isinstance(stats, dict) or not isinstance(stats.get("groups"), list):
        raise BadMessageError("the answer has no counts")
    groups = []
    for one in stats["groups"]:
        name = one.get("group") if isinstance(one, dict) else None
        if not isinstance(name, str):
            raise BadMessageError("the answer has a group without a name")
        groups.append(GroupCounts(name, **_whole_fields(one, GroupCounts, "group")))
    return BufferStats(**_whole_fields(stats, BufferStats, "groups"), groups=tuple(groups))


def deleted_of(answer: Mapping[str, Any]) -> Deleted:
    """
    Raises:
        BadMessageError: the answer says something else.
    """
    found = answer.get("deleted")
    remains, until_ms = (
        found.get(name) if isinstance(found, dict) else None for name in ("remains", "until_ms")
    )
    if not _is_optional_text(remains) or not _is_optional_whole(until_ms):
        raise BadMessageError("the answer about a deletion is none")
    counts = _whole_fields(found, Deleted, "remains", "until_ms")
    return Deleted(**counts, remains=remains, until_ms=until_ms)


def undeleted_of(answer: Mapping[str, Any]) -> bool:
    """
    Raises:
        BadMessageError: the answer says something else.
    """
    found = answer.get("was_listed")
    if not isinstance(found, bool):
        raise BadMessageError("the answer about a deletion that is taken back is none")
    return found


def deletions_of(answer: Mapping[str, Any]) -> Deletions:
    """
    Raises:
        BadMessageError: the answer says something else.
    """
    try:
        return Deletions.from_json(answer.get("deletions"))
    except ValueError as error:
        problem = str(error)
    raise BadMessageError(problem)


def kept_of(answer: Mapping[str, Any]) -> list[Unreadable]:
    """
    Raises:
        BadMessageError: the answer says something else.
    """
    kept, found = answer.get("kept"), []
    for one in kept if isinstance(kept, list) else [None]:
        match one:
            case [str(name), size] if is_whole(size):
                found.append(Unreadable(name, size))
            case _:
                raise BadMessageError("the answer about what was put aside is none")
    return found


def refused_of(answer: Mapping[str, Any]) -> int:
    """
    Raises:
        BadMessageError: the answer says something else.
    """
    found = answer.get("refused")
    if not is_whole(found):
        raise BadMessageError("the answer about refused messages is none")
    return found


def error_of(answer: Mapping[str, Any]) -> Exception | None:
    """Why the holder refused a question; ``None`` if it did not."""
    if "error" not in answer:
        return None
    text, number = str(answer["error"])[:1000], answer.get("errno")
    return OSError(number, text) if is_whole(number, 1, 4096) else ValueError(text)


def _whole_fields(found: Any, record: type, *but: str) -> dict[str, int]:
    """The fields of a record of counts, all but some."""
    names = {one.name for one in fields(record)}
    if not isinstance(found, dict) or found.keys() != names:
        raise BadMessageError("the answer has other counts than it should")
    values = {name: value for name, value in found.items() if name not in but}
    if not all(map(is_whole, values.values())):
        raise BadMessageError("a count in an answer is no whole number")
    return values
