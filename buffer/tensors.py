"""The safetensors format, written without torch and read without trusting the file.

A file holds the header length (8 bytes, little endian), a JSON header, and the tensors' bytes. The
header is checked against the size of the file before anything is allocated or passed to another
library.
"""

from __future__ import annotations

import json
import math
from collections import deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
from numpy.typing import NDArray

ITEM_BYTES = {
    "BOOL": 1, "U8": 1, "I8": 1, "F8_E4M3": 1, "F8_E5M2": 1,
    "U16": 2, "I16": 2, "F16": 2, "BF16": 2,
    "U32": 4, "I32": 4, "F32": 4,
    "U64": 8, "I64": 8, "F64": 8,
}  # fmt: skip
"""Known dtype tags and the bytes of one element."""

MAX_TENSORS = 4096
MAX_BUNDLE_HEADER_BYTES = 1 << 20

# A value is NaN or infinite when all bits of the mask are set (E4M3 has one NaN pattern, no inf).
_NON_FINITE_MASK: dict[str, np.unsignedinteger[Any]] = {
    "F8_E4M3": np.uint8(0x7F),
    "F8_E5M2": np.uint8(0x7C),
    "F16": np.uint16(0x7C00),
    "BF16": np.uint16(0x7F80),
    "F32": np.uint32(0x7F80_0000),
    "F64": np.uint64(0x7FF0_0000_0000_0000),
}
_SIGNED = {size: np.dtype(f"i{size}") for size in (1, 2, 4, 8)}
_CHUNK_BYTES = 4 << 20
"""Bytes looked at twice, so they should stay in the cache, and for each chunk the interpreter lock
is taken twice: on an EPYC, 22 GB/s by 4 MiB, 20 by 256 KiB, 18 by 16 MiB."""


class TensorFileError(ValueError):
    """Bytes that are not a sound safetensors file."""


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """Location of one tensor in its file."""

    dtype: str
    """Tag of the format, e.g. ``BF16``."""
    shape: tuple[int, ...]
    start: int
    """First byte, counted from the beginning of the file."""
    end: int
    """One past the last byte."""


@dataclass(frozen=True, slots=True)
class TensorHeader:
    """Everything that precedes the tensors."""

    tensors: dict[str, TensorInfo]
    metadata: dict[str, str]


@dataclass(frozen=True, slots=True)
class TensorParts:
    """A safetensors file that is not yet joined."""

    parts: list[memoryview]
    """Its bytes, in order: the header, then each tensor."""
    tensors: dict[str, TensorInfo]

    @property
    def num_bytes(self) -> int:
        """Of the whole file."""
        return sum(map(len, self.parts))


@dataclass(frozen=True, slots=True)
class TensorLayout:
    """A safetensors file without its values."""

    head: bytes
    """Length of the header, and the header."""
    tensors: dict[str, TensorInfo]
    """In the order of the file."""
    num_bytes: int
    """Of the whole file."""


def tensor_layout(
    shapes: Mapping[str, tuple[str, tuple[int, ...]]], metadata: Mapping[str, str] | None = None
) -> TensorLayout:
    """Lay out a safetensors file: name -> (dtype tag, shape).

    Not done with the safetensors package, because its low-level call takes bytes in one release and
    memory addresses in the next, its numpy call supports neither BF16 nor F8_E4M3, and its torch
    call copies every tensor three times.
    """
    ordered = sorted(shapes.items(), key=lambda item: (-ITEM_BYTES[item[1][0]], item[0]))
    header: dict[str, Any] = {} if metadata is None else {"__metadata__": dict(metadata)}
    spans, end = dict[str, tuple[int, int]](), 0
    for name, (dtype, shape) in ordered:
        start, end = end, end + math.prod(shape) * ITEM_BYTES[dtype]
        spans[name] = (start, end)
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # tensors begin on 8 bytes, as the format recommends
    head = len(text).to_bytes(8, "little") + text
    infos = {
        name: TensorInfo(dtype, tuple(shape), *(len(head) + at for at in spans[name]))
        for name, (dtype, shape) in ordered
    }
    return TensorLayout(head, infos, len(head) + end)


def tensor_parts(
    tensors: Mapping[str, tuple[str, NDArray[Any]]], metadata: Mapping[str, str] | None = None
) -> TensorParts:
    """A safetensors file as ``tensor_layout`` lays it out: name -> (dtype tag, array that holds its
    bits). Contiguous arrays are not copied."""
    shapes = {name: (dtype, tuple(array.shape)) for name, (dtype, array) in tensors.items()}
    layout = tensor_layout(shapes, metadata)
    arrays = (np.ascontiguousarray(tensors[name][1]) for name in layout.tensors)
    parts = [array.reshape(-1).view(np.uint8).data for array in arrays]
    return TensorParts([memoryview(layout.head), *parts], layout.tensors)


def placed_parts(layout: TensorLayout, place: memoryview) -> TensorParts:
    """A safetensors file in memory that was lent for it, which has room for all of it: the header
    is written, the values may still be missing."""
    place[: len(layout.head)] = layout.head
    parts = [place[info.start : info.end] for info in layout.tensors.values()]
    return TensorParts([place[: len(layout.head)], *parts], layout.tensors)


def join_tensors(
    tensors: Mapping[str, tuple[str, NDArray[Any]]], metadata: Mapping[str, str]
) -> bytes:
    """A safetensors file as ``tensor_parts`` lays it out."""
    return b"".join(tensor_parts(tensors, metadata).parts)


def parse_header(head: bytes | memoryview, num_bytes: int, max_header_bytes: int) -> TensorHeader:
    """Read and check a header.

    Args:
        head: the beginning of the file, including the whole header.
        num_bytes: size of the whole file.
        max_header_bytes: longest header accepted.

    Raises:
        TensorFileError: says what was found and what was expected.
    """
    length = _header_length(head, num_bytes, max_header_bytes)
    header = parse_json(bytes(head[8 : 8 + length]))
    if not isinstance(header, dict):
        raise TensorFileError(f"the header must be a JSON object, got {type(header).__name__}")
    metadata = _checked_metadata(header.pop("__metadata__", {}))
    if len(header) > MAX_TENSORS:
        raise TensorFileError(
            f"the header names {len(header)} tensors, at most {MAX_TENSORS} are read"
        )
    tensors = {name: _checked_info(name, entry, 8 + length) for name, entry in header.items()}
    _check_contiguous(tensors, first=8 + length, last=num_bytes)
    return TensorHeader(tensors, metadata)


def check_safetensors(
    source: bytes | memoryview | Path,
    expected: Mapping[str, tuple[str, tuple[int, ...]]] | None = None,
    *,
    max_header_bytes: int = MAX_BUNDLE_HEADER_BYTES,
    num_bytes: int | None = None,
) -> dict[str, TensorInfo]:
    """Check a safetensors file by its header alone, before any tensor is allocated.

    Args:
        source: the file's bytes, or its path; only the header is read from a path.
        expected: name -> (dtype tag, shape) of every tensor that must be there, and no other.
        max_header_bytes: longest header accepted.
        num_bytes: size of the file, if ``source`` is only its beginning with the header.

    Raises:
        TensorFileError: the header is too long or not JSON, the offsets leave a gap, overlap or
            pass the end of the file, or the tensors are not the expected ones.
    """
    head: bytes | memoryview
    if isinstance(source, Path):
        with source.open("rb") as file:
            head = file.read(8)
            num_bytes = source.stat().st_size
            head += file.read(_header_length(head, num_bytes, max_header_bytes))
    else:
        head, num_bytes = source, len(source) if num_bytes is None else num_bytes
    tensors = parse_header(head, num_bytes, max_header_bytes).tensors
    if expected is not None:
        _check_expected(tensors, expected)
    return tensors


def non_finite_tensors(blob: bytes | memoryview, tensors: Mapping[str, TensorInfo]) -> list[str]:
    """Names of the tensors that contain a NaN or an infinity; integer tensors never do."""
    scan = FiniteScan(blob, tensors)
    scan.advance(len(blob))
    return scan.broken


class FiniteScan:
    """Looks for NaN and infinity in a file while it arrives, so that each byte is looked at while
    it is still in the processor's cache."""

    def __init__(self, blob: bytes | memoryview, tensors: Mapping[str, TensorInfo]) -> None:
        """
        Args:
            blob: memory of the whole file, which may still be without content.
            tensors: where they lie in it.
        """
        self._blob = blob
        floating = [(n, t) for n, t in tensors.items() if t.dtype in _NON_FINITE_MASK]
        self._left = deque(sorted(floating, key=lambda item: item[1].start))
        """Tensors that have not arrived as a whole."""
        self._at = 0
        """First byte of the first of them that was not looked at."""
        self._broken: set[str] = set()
        self._order = list(tensors)

    @property
    def broken(self) -> list[str]:
        """Names of the tensors in which one was found so far."""
        return [name for name in self._order if name in self._broken]

    def advance(self, num_bytes: int) -> None:
        """Look at what has arrived since the last call: the file's first ``num_bytes`` are there.
        The rest of a value that is cut in two is awaited."""
        while self._left:
            name, info = self._left[0]
            item = ITEM_BYTES[info.dtype]
            start = max(self._at, info.start)
            count = (min(info.end, num_bytes) - start) // item
            if count > 0:
                bits = np.frombuffer(self._blob, _NON_FINITE_MASK[info.dtype].dtype, count, start)
                if name not in self._broken and not bits_are_finite(bits, info.dtype):
                    self._broken.add(name)
                self._at = start + count * item
            if num_bytes < info.end:
                return
            self._left.popleft()


def bits_are_finite(bits: NDArray[Any], dtype: str) -> bool:
    """True if an array of raw bits of ``dtype`` (a tag of the format) has no NaN or infinity."""
    return _largest_bits(bits, dtype) < int(_NON_FINITE_MASK[dtype])


def largest_magnitude(bits: NDArray[Any], dtype: str) -> float:
    """Largest absolute value in an array of raw bits of BF16, F32 or F8_E4M3; 0 if it is empty.

    Returns:
        Infinity if any value is infinite or NaN.
    """
    largest = _largest_bits(bits, dtype)
    if largest >= int(_NON_FINITE_MASK[dtype]):
        return math.inf
    if dtype == "F8_E4M3":
        exponent, mantissa = divmod(largest, 8)
        return math.ldexp(8 + mantissa, exponent - 10) if exponent else math.ldexp(mantissa, -9)
    wide = largest << (16 if dtype == "BF16" else 0)
    return float(np.uint32(wide).view(np.float32))


def _largest_bits(bits: NDArray[Any], dtype: str) -> int:
    """Largest value without its sign bit.

    Two maxima find it without a temporary array: of positive values as signed integers, and of
    negative ones, whose sign bit makes them the larger half, as unsigned integers.
    """
    unsigned = _NON_FINITE_MASK[dtype].dtype
    flat = bits.reshape(-1).view(unsigned)
    signed, sign = _SIGNED[unsigned.itemsize], 1 << (8 * unsigned.itemsize - 1)
    largest = 0
    for start in range(0, flat.size, _CHUNK_BYTES // unsigned.itemsize):
        chunk = flat[start : start + _CHUNK_BYTES // unsigned.itemsize]
        positive = int(chunk.view(signed).max())
        negative = int(chunk.max())
        largest = max(largest, positive, negative - sign)
    return largest


def parse_json(text: bytes) -> Any:
    """Parse untrusted JSON; duplicate keys, NaN, infinities and deep nesting are refused.

    Raises:
        TensorFileError: anything is wrong with the text.
    """
    try:
        return _DECODER.decode(text.decode("utf-8"))
    except RecursionError:
        raise TensorFileError("JSON is nested too deep") from None
    except ValueError as error:
        raise TensorFileError(f"not JSON: {error}") from None


def _header_length(head: bytes | memoryview, num_bytes: int, max_header_bytes: int) -> int:
    if len(head) < 8:
        raise TensorFileError(f"{len(head)} bytes are too few for a safetensors file")
    length = int.from_bytes(head[:8], "little")
    if length > min(max_header_bytes, num_bytes - 8):
        raise TensorFileError(
            f"the header claims {length} bytes, but the file has {num_bytes} "
            f"and at most {max_header_bytes} are read"
        )
    return length


def _checked_metadata(metadata: Any) -> dict[str, str]:
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise TensorFileError("__metadata__ must map names to strings")
    return metadata


def _checked_info(name: str, entry: Any, base: int) -> TensorInfo:
    match entry:
        case {"dtype": str(dtype), "shape": list(shape), "data_offsets": [start, end], **rest} if (
            not rest and all(_is_count(number) for number in (*shape, start, end))
        ):
            pass
        case _:
            raise TensorFileError(f"tensor {name!r} has an unreadable header entry")
    if dtype not in ITEM_BYTES:
        raise TensorFileError(f"tensor {name!r} has unknown dtype {dtype!r}")
    if end - start != math.prod(shape) * ITEM_BYTES[dtype]:
        raise TensorFileError(
            f"tensor {name!r} is {dtype} {shape}, which takes "
            f"{math.prod(shape) * ITEM_BYTES[dtype]} bytes, but its offsets span {end - start}"
        )
    return TensorInfo(dtype, tuple(shape), base + start, base + end)


def _is_count(number: Any) -> bool:
    return type(number) is int and 0 <= number < 1 << 62


def _check_contiguous(tensors: Mapping[str, TensorInfo], first: int, last: int) -> None:
    at = first
    for name, info in sorted(tensors.items(), key=lambda item: (item[1].start, item[1].end)):
        if info.start != at:
            raise TensorFileError(f"tensor {name!r} begins at byte {info.start}, expected {at}")
        at = info.end
    if at != last:
        raise TensorFileError(f"the tensors end at byte {at}, but the file has {last}")


def _check_expected(
    tensors: Mapping[str, TensorInfo], expected: Mapping[str, tuple[str, tuple[int, ...]]]
) -> None:
    missing, extra = sorted(expected.keys() - tensors), sorted(tensors.keys() - expected)
    if missing or extra:
        raise TensorFileError(f"tensors differ: missing {missing[:8]}, not expected {extra[:8]}")
    for name, (dtype, shape) in expected.items():
        found = tensors[name]
        if (found.dtype, found.shape) != (dtype, tuple(shape)):
            raise TensorFileError(
                f"tensor {name!r} is {found.dtype} {list(found.shape)}, "
                f"expected {dtype} {list(shape)}"
            )


def _unique_keys(pairs: Iterable[tuple[str, Any]]) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for key, value in pairs:
        if key in result:
            raise ValueError(f"key {key!r} appears twice")
        result[key] = value
    return result


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a JSON number")


_DECODER = json.JSONDecoder(object_pairs_hook=_unique_keys, parse_constant=_refuse_constant)
