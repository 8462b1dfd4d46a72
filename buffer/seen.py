"""Remembers which traces were seen, exactly, whatever their order, gaps and number of epochs.

Nothing is ever forgotten or guessed, so a trace that was seen is never new again, and one that was
not is never called a duplicate. The numbers of an epoch are runs while there are few; beyond that
they are cut into chunks, each of which is runs or, once these would take more room, a bitmap
(as in Roaring bitmaps, Lemire et al. 2016, arXiv:1603.06549). So 65,536 consecutive numbers take at
most 8 KiB, and a few hundred bytes where none of them is missing.
"""

from __future__ import annotations

import base64
import binascii
import itertools
from array import array
from bisect import bisect_right
from collections.abc import Iterable, Iterator
from typing import Any

from buffer.plain_values import is_count

Identity = tuple[str, int, int]
"""(producer, epoch, seq) of a trace."""

END = 1 << 63
"""Numbers and epochs are below it, see ``plain_values.is_count``; a run of them may end there."""

_CHUNK = 1 << 16
_MAX_RUNS = 1024  # 8 KiB of a chunk's runs, as much as its bitmap

_Runs = array  # bounds of runs, ascending: first, one past the last, first, ...


class SeenTraces:
    """The (producer, epoch, seq) triples seen so far."""

    __slots__ = ("_epochs",)

    def __init__(self) -> None:
        self._epochs: dict[tuple[str, int], _Runs[int] | dict[int, _Runs[int] | _Bits]] = {}
        """Runs of numbers or, by the index of their chunk, those of each chunk."""

    def add(self, producer: str, epoch: int, seq: int) -> bool:
        """Remember a triple; False if it was seen before.

        Args:
            epoch: in 0..2**63 - 1, like ``seq``.
        """
        key = producer, epoch
        numbers = self._epochs.get(key)
        if numbers is None:
            self._epochs[key] = array("Q", (seq, seq + 1))
            return True
        if isinstance(numbers, dict):
            return _add_to_chunks(numbers, seq)
        if not _add_to_runs(numbers, seq):
            return False
        if len(numbers) > 2 * _MAX_RUNS:
            self._epochs[key] = _chunks_of(numbers)
        return True

    def __contains__(self, triple: Identity) -> bool:
        producer, epoch, seq = triple
        return _holds(self._epochs.get((producer, epoch)), seq)

    def beyond(self, older: SeenTraces) -> Iterator[Identity]:
        """Triples that ``older`` has not seen."""
        for key, numbers in self._epochs.items():
            before = older._epochs.get(key)
            if numbers != before:
                for seq in _numbers_in(numbers):
                    if not _holds(before, seq):
                        yield *key, seq

    def to_json(self) -> list[list[Any]]:
        """For ``from_json``: ``[producer, epoch, numbers]``, each at most some 64 KiB long. Numbers
        are runs ``[first, one past the last]`` or, by the index of their chunk, its runs or its
        bitmap in base64; an epoch of several chunks has an entry for each."""
        return [[*key, one] for key, numbers in self._epochs.items() for one in _to_json(numbers)]

    @classmethod
    def from_json(cls, stored: Any) -> SeenTraces:
        """Inverse of ``to_json``; also reads what was stored before there were chunks.

        Raises:
            ValueError: it is something else.
        """
        seen = cls()
        seen.add_json(stored)
        return seen

    def add_json(self, stored: Any) -> None:
        """Remember what another memory has stored, of epochs or chunks that this one has not.

        Raises:
            ValueError: it is something else; some of it may be remembered.
        """
        try:
            for producer, epoch, numbers in stored:
                if not isinstance(producer, str) or not is_count(epoch):
                    raise ValueError(f"no producer and epoch: {producer!r}, {epoch!r}")
                if numbers:
                    self._merge((producer, epoch), _from_json(numbers))
        except (TypeError, ValueError, AttributeError, binascii.Error) as error:
            raise ValueError(f"these are not traces seen: {error}") from None

    def _merge(
        self, key: tuple[str, int], numbers: _Runs[int] | dict[int, _Runs[int] | _Bits]
    ) -> None:
        known = self._epochs.get(key)
        if isinstance(known, dict) and isinstance(numbers, dict):
            known.update(numbers)
        else:
            self._epochs[key] = numbers


class _Bits:
    """Numbers of one chunk, a bit each."""

    __slots__ = ("bits", "num")

    def __init__(self, bits: bytearray) -> None:
        self.bits = bits
        self.num = int.from_bytes(bits, "little").bit_count()

    def add(self, number: int) -> bool:
        """False if it was there."""
        if self.has(number):
            return False
        self.bits[number >> 3] |= 1 << (number & 7)
        self.num += 1
        return True

    def has(self, number: int) -> bool:
        return bool(self.bits[number >> 3] >> (number & 7) & 1)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Bits) and self.bits == other.bits


def _add_to_runs(bounds: _Runs[int], number: int) -> bool:
    """Add a number to runs, joining those it touches; False if it was there."""
    at = bisect_right(bounds, number)
    if at % 2:
        return False
    touches_left = at > 0 and bounds[at - 1] == number
    touches_right = at < len(bounds) and bounds[at] == number + 1
    if touches_left and touches_right:
        del bounds[at - 1 : at + 1]
    elif touches_left:
        bounds[at - 1] = number + 1
    elif touches_right:
        bounds[at] = number
    else:
        bounds[at:at] = array(bounds.typecode, (number, number + 1))
    return True


def _add_to_chunks(chunks: dict[int, _Runs[int] | _Bits], seq: int) -> bool:
    index, number = divmod(seq, _CHUNK)
    chunk = chunks.get(index)
    if chunk is None:
        chunks[index] = array("I", (number, number + 1))
        return True
    if isinstance(chunk, _Bits):
        is_new = chunk.add(number)
        if chunk.num == _CHUNK:
            chunks[index] = array("I", (0, _CHUNK))
        return is_new
    is_new = _add_to_runs(chunk, number)
    if len(chunk) > 2 * _MAX_RUNS:
        chunks[index] = _bits_of(chunk)
    return is_new


def _chunks_of(bounds: _Runs[int]) -> dict[int, _Runs[int] | _Bits]:
    """The same numbers in chunks."""
    chunks: dict[int, _Runs[int] | _Bits] = {}
    for first, end in _pairs(bounds):
        while first < end:
            index = first // _CHUNK
            start = index * _CHUNK
            runs = chunks.setdefault(index, array("I"))
            assert isinstance(runs, array)
            runs.extend((first - start, min(end - start, _CHUNK)))
            first = start + _CHUNK
    return {
        index: _bits_of(runs) if isinstance(runs, array) and len(runs) > 2 * _MAX_RUNS else runs
        for index, runs in chunks.items()
    }


def _bits_of(bounds: _Runs[int]) -> _Bits:
    whole = 0
    for first, end in _pairs(bounds):
        whole |= (1 << end) - (1 << first)
    return _Bits(bytearray(whole.to_bytes(_CHUNK // 8, "little")))


def _pairs(bounds: _Runs[int]) -> Iterable[tuple[int, int]]:
    return zip(bounds[::2], bounds[1::2], strict=True)


def _holds(numbers: _Runs[int] | dict[int, _Runs[int] | _Bits] | None, seq: int) -> bool:
    if isinstance(numbers, dict):
        index, seq = divmod(seq, _CHUNK)
        chunk = numbers.get(index)
        if isinstance(chunk, _Bits):
            return chunk.has(seq)
        numbers = chunk
    return numbers is not None and bisect_right(numbers, seq) % 2 == 1


def _numbers_in(numbers: _Runs[int] | dict[int, _Runs[int] | _Bits]) -> Iterator[int]:
    if not isinstance(numbers, dict):
        for first, end in _pairs(numbers):
            yield from range(first, end)
        return
    for index, chunk in numbers.items():
        start = index * _CHUNK
        if isinstance(chunk, _Bits):
            yield from (start + number for number in range(_CHUNK) if chunk.has(number))
        else:
            yield from (start + number for number in _numbers_in(chunk))


def _to_json(numbers: _Runs[int] | dict[int, _Runs[int] | _Bits]) -> Iterator[Any]:
    if isinstance(numbers, dict):
        for index, chunk in numbers.items():
            stored: Any = (
                base64.b64encode(chunk.bits).decode()
                if isinstance(chunk, _Bits)
                else _runs_to_json(chunk)
            )
            yield {str(index): stored}
    else:
        yield _runs_to_json(numbers)


def _runs_to_json(bounds: _Runs[int]) -> list[list[int]]:
    return [[first, end] for first, end in _pairs(bounds)]


def _from_json(stored: Any) -> _Runs[int] | dict[int, _Runs[int] | _Bits]:
    if isinstance(stored, dict):
        chunks: dict[int, _Runs[int] | _Bits] = {}
        for name, chunk in stored.items():
            index = int(name)
            if not 0 <= index < END // _CHUNK:
                raise ValueError(f"chunk {name!r}")
            chunks[index] = (
                _bits_from(chunk) if isinstance(chunk, str) else _runs_from(chunk, "I", _CHUNK)
            )
        return chunks
    runs = _runs_from(stored, "Q", END)
    return _chunks_of(runs) if len(runs) > 2 * _MAX_RUNS else runs


def _bits_from(stored: str) -> _Bits:
    bits = bytearray(base64.b64decode(stored, validate=True))
    if len(bits) != _CHUNK // 8:
        raise ValueError(f"a bitmap of {len(bits)} bytes")
    return _Bits(bits)


def _runs_from(stored: Any, typecode: str, most: int) -> _Runs[int]:
    bounds = [bound for first, end in stored for bound in (first, end)]
    if not all(type(bound) is int for bound in bounds):
        raise ValueError("a bound that is no integer")
    ascends = all(left < right for left, right in itertools.pairwise(bounds))
    if not ascends or not 0 <= bounds[0] < bounds[-1] <= most:
        raise ValueError(f"runs that do not ascend in 0..{most}")
    return array(typecode, bounds)
