"""How traces lie in Redis: keys, ids and the entries from which their size and age are known.

    <run>:ends                hash: writer -> number of records that it has ever stored
    <run>:t:<writer>          stream: the records of one writer; record n has the id ``<n + 1>-0``
    <run>:i:<writer>          stream: one small entry for each batch of records, with the id of its
                              last one. Nobody needs to read records to know how old and large they
                              are.
    <run>:committed           hash: <group>/<writer> -> number of records committed
    <run>:d:<writer>          sorted set: numbers of the records that were deleted with their tenant
    <run>:deleted             hash: <group>/<writer> -> number of records deleted before the
                              group had committed them
    <run>:claims:<group>      hash: trace -> the record that the group learns it from, until that is
                              committed; see ``redis_claims.py``
    <run>:claimed:<group>     hash: record -> its trace, the inverse
    <run>:learnt:<group>      hash: <producer>/<epoch>/<part> -> bits of the traces whose record the
                              group has committed, of 2,048 numbers each
    <run>:deletions           hash: digest of a tenant -> unix ms until which it was deleted
    <run>:alive:<member>      exists while a member of a group lives
    <run>:unreadable          stream: records that could not be decoded

A batch is stored in one transaction. Ids make it safe to store it again when an answer was lost:
the server refuses an id that it has had.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from buffer.interface import Payload
from buffer.redis_url import RedisOptions

Fields = dict[bytes, bytes]
Entry = tuple[bytes, Fields]
"""Id and fields."""


def ends_key(options: RedisOptions) -> str:
    return options.key("ends")


def records_key(options: RedisOptions, writer: str) -> str:
    return options.key("t", writer)


def batches_key(options: RedisOptions, writer: str) -> str:
    return options.key("i", writer)


def committed_key(options: RedisOptions) -> str:
    return options.key("committed")


def removed_key(options: RedisOptions, writer: str) -> str:
    return options.key("d", writer)


def deleted_key(options: RedisOptions) -> str:
    return options.key("deleted")


def claims_key(options: RedisOptions, group: str) -> str:
    return options.key("claims", group)


def claimed_key(options: RedisOptions, group: str) -> str:
    return options.key("claimed", group)


def learnt_key(options: RedisOptions, group: str) -> str:
    return options.key("learnt", group)


def deletions_key(options: RedisOptions) -> str:
    return options.key("deletions")


def committed_field(group: str, writer: str) -> str:
    return f"{group}/{writer}"


def numbers_of(found: Mapping[bytes, bytes], key: str) -> dict[str, int]:
    """Numbers by name, from a hash.

    Raises:
        ValueError: somebody else has stored something there.
    """
    try:
        return {name.decode(): int(number) for name, number in found.items()}
    except ValueError:
        raise ValueError(f"the key {key} holds something that none of our writers makes") from None


def id_of(number: int) -> str:
    """Id of record ``number``."""
    return f"{number + 1}-0"


def number_of(entry_id: bytes) -> int:
    """Inverse of ``id_of``."""
    return int(entry_id.partition(b"-")[0]) - 1


def record_fields(payload: Payload, piece_bytes: int) -> list[Any]:
    """Fields and values of a record's entry: the record in pieces of at most ``piece_bytes``."""
    if len(payload) <= piece_bytes:
        return [0, payload if isinstance(payload, bytes) else memoryview(payload)]
    whole = memoryview(payload)
    pieces = range(0, len(whole), piece_bytes)
    return [part for i, at in enumerate(pieces) for part in (i, whole[at : at + piece_bytes])]


def payload_of(fields: Fields) -> bytes:
    """The record of an entry."""
    return b"".join(fields.values()) if len(fields) > 1 else next(iter(fields.values()))


@dataclass(frozen=True, slots=True)
class Batch:
    """What is known of a batch without its records."""

    first: int
    """Number of its first record."""
    end: int
    """One past the number of its last record."""
    num_bytes: int
    """Payload of its records."""
    bytes_before: int
    """Payload of all earlier records of the writer."""
    unix_ms: int
    """When it was stored."""

    def fields(self) -> list[Any]:
        return [
            *("first", self.first, "bytes", self.num_bytes),
            *("before", self.bytes_before, "ms", self.unix_ms),
        ]

    @classmethod
    def of(cls, entry: Entry) -> Batch:
        """Inverse of ``fields``, stored with the id of its last record."""
        entry_id, values = entry
        return cls(
            first=int(values[b"first"]),
            end=number_of(entry_id) + 1,
            num_bytes=int(values[b"bytes"]),
            bytes_before=int(values[b"before"]),
            unix_ms=int(values[b"ms"]),
        )
