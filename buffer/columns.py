"""Named columns of numbers behind a small header: the layout of a stored trace.

Little endian:

    schema 16 | version 2 | number of columns 2 | bytes of text 4
    for each column: name 16 | dtype 8 | bytes 8
    text | first column | second column | ...

Text and columns begin at multiples of 8, so that a reader can look at them in place. A reader takes
the columns it knows and passes over others; a dtype is a tag of the safetensors format.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from buffer.blocks import Blocks

HEAD = struct.Struct("<16sHHI")
ENTRY = struct.Struct("<16s8sQ")
MAX_COLUMNS = 256

_NUMPY: dict[str, np.dtype[Any]] = {
    "U8": np.dtype("<u1"), "F8_E4M3": np.dtype("<u1"),
    "U16": np.dtype("<u2"), "BF16": np.dtype("<u2"),
    "I32": np.dtype("<i4"), "F32": np.dtype("<f4"),
    "I64": np.dtype("<i8"), "F64": np.dtype("<f8"),
}  # fmt: skip
_DTYPE_OF = {tag.encode().ljust(8, b"\0"): (tag, dtype) for tag, dtype in _NUMPY.items()}
_ALIGNMENT = 8


class ColumnsError(ValueError):
    """Bytes that are no columns."""


@dataclass(frozen=True, slots=True)
class Head:
    """The beginning of a record."""

    schema: bytes
    """Without the zeros that pad it."""
    version: int
    num_columns: int
    num_text_bytes: int


@dataclass(frozen=True, slots=True)
class Blank:
    """A record whose header and text are written and whose columns are not."""

    record: NDArray[np.uint8]
    """All of its bytes."""
    columns: dict[str, NDArray[Any]]
    """Name -> one-dimensional view of the place in ``record``, uninitialised."""


def new_record(
    schema: bytes,
    version: int,
    text: bytes,
    columns: Mapping[str, tuple[str, int]],
    blocks: Blocks | None = None,
) -> Blank:
    """Allocate a record and write everything but its columns' values.

    Args:
        schema: at most 16 bytes.
        version: of the schema.
        text: what is not a column.
        columns: name of at most 16 ASCII characters -> (dtype tag, number of values).
        blocks: where memory comes from.
    """
    at = HEAD.size + len(columns) * ENTRY.size
    starts = [_aligned(at + len(text))]
    entries = []
    for name, (tag, count) in columns.items():
        num_bytes = count * _NUMPY[tag].itemsize
        entries.append(ENTRY.pack(name.encode(), tag.encode(), num_bytes))
        starts.append(_aligned(starts[-1] + num_bytes))
    head = HEAD.pack(schema, version, len(columns), len(text)) + b"".join(entries) + text
    num_bytes = starts[-1]
    record = np.empty(num_bytes, np.uint8) if blocks is None else blocks.take(num_bytes)
    record[: starts[0]] = np.frombuffer(head.ljust(starts[0], b"\0"), np.uint8)
    places = {}
    for (name, (tag, count)), start, stop in zip(
        columns.items(), starts[:-1], starts[1:], strict=True
    ):
        end = start + count * _NUMPY[tag].itemsize
        record[end:stop] = 0
        places[name] = record[start:end].view(_NUMPY[tag])
    return Blank(record, places)


def parse_head(record: memoryview) -> Head:
    """Read the beginning of a record.

    Raises:
        ColumnsError: it is too short.
    """
    if len(record) < HEAD.size:
        raise ColumnsError(f"{len(record)} bytes are too few, a header alone has {HEAD.size}")
    schema, version, num_columns, num_text_bytes = HEAD.unpack_from(record)
    return Head(schema.rstrip(b"\0"), version, num_columns, num_text_bytes)


def parse_columns(
    record: memoryview, head: Head
) -> tuple[memoryview, dict[str, tuple[str, NDArray[Any]]]]:
    """Find text and columns in a record, without copying any.

    Args:
        record: all of its bytes. The columns are views of it, writable if it is.
        head: what ``parse_head`` found in it.

    Returns:
        The text, and name -> (dtype tag, one-dimensional column). Columns of an unknown dtype are
        left out.

    Raises:
        ColumnsError: names the column and says what is wrong.
    """
    if head.num_columns > MAX_COLUMNS:
        raise ColumnsError(
            f"the header names {head.num_columns} columns, at most {MAX_COLUMNS} are read"
        )
    table_end = HEAD.size + head.num_columns * ENTRY.size
    text_end = table_end + head.num_text_bytes
    if text_end > len(record):
        raise ColumnsError(f"the header claims {text_end} bytes, the record has {len(record)}")
    found: dict[str, tuple[str, NDArray[Any]]] = {}
    at, seen = _aligned(text_end), set[bytes]()
    for name, tag, num_bytes in ENTRY.iter_unpack(record[HEAD.size : table_end]):
        if name in seen:
            raise ColumnsError(f"column {_readable(name)} appears twice")
        if num_bytes > len(record) - at:
            raise ColumnsError(
                f"column {_readable(name)} claims {num_bytes} bytes from byte {at} on, but the "
                f"record has {len(record)}"
            )
        seen.add(name)
        if (known := _DTYPE_OF.get(tag)) is not None:
            dtype = known[1]
            count, rest = divmod(num_bytes, dtype.itemsize)
            if rest:
                raise ColumnsError(
                    f"column {_readable(name)} of {known[0]} has {num_bytes} bytes, which is no "
                    f"multiple of {dtype.itemsize}"
                )
            found[_readable(name)] = known[0], np.frombuffer(record, dtype, count, at)
        at = _aligned(at + num_bytes)
    if at != len(record):
        raise ColumnsError(f"the columns end at byte {at}, but the record has {len(record)}")
    return record[table_end:text_end], found


def _readable(name: bytes) -> str:
    return name.rstrip(b"\0").decode("ascii", "backslashreplace")


def _aligned(at: int) -> int:
    return -(-at // _ALIGNMENT) * _ALIGNMENT
