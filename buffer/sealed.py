"""Large files of a bundle in one pass: each byte is looked at while it is in the processor's cache,
and the digest, which takes longest, is computed meanwhile on a thread of its own.

A file above 64 MiB is digested in pieces, on several threads: one computes 2 GB/s, which is less
than everything else that a bundle meets on its way through the memory of a host.
"""

from __future__ import annotations

import hashlib
import os
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from queue import SimpleQueue
from typing import Any

from numpy.typing import NDArray

from buffer.records import FileDigest
from buffer.tensors import FiniteScan, TensorLayout, TensorParts, placed_parts, tensor_parts

CHUNK_BYTES = 4 << 20
"""Bytes read, digested and looked at at a time. Each costs the interpreter lock four times, for
which a thread that serves may let us wait, so they are large, but smaller than a last-level cache.
"""


PIECE_BYTES = 8 << 20
"""Bytes of a piece of a file that is digested in pieces: a small part of the smallest such file, so
that threads end together."""
_WHOLE_BYTES = 64 << 20
"""Largest file that is digested as a whole, which any tool does."""
_MOST_THREADS = 4
"""Digesting one file. More would be waiting for its bytes."""


Content = bytes | memoryview
"""Bytes of one file."""
Make = Callable[[str, int, int], None]
"""Fills the bytes of a tensor from one offset to another."""


class Sealed:
    """A safetensors file whose maker finds out its digest and soundness while laying it out. Its
    digest is computed on threads of its own, so that it can be written meanwhile.

    A reader finds both by itself.
    """

    def __init__(
        self,
        laid_out: TensorParts,
        make: Make | None = None,
        *,
        place: memoryview | None = None,
    ) -> None:
        """
        Args:
            laid_out: tensors lie where their owner has them, who must not change them until they
                are published: a copy would cost memory for them.
            make: see ``seal``.
            place: see ``seal_in``.
        """
        self.place = place
        """Memory that holds all of it, if it was lent for that."""
        self.parts = tuple(laid_out.parts)
        """Its bytes, in order."""
        self._num_bytes = laid_out.num_bytes
        self._digesting = Digesting(self._num_bytes, piece_bytes_of(self._num_bytes))
        broken = list[str]()
        try:
            self._digesting.update(self.parts[0])
            for name, part in zip(laid_out.tensors, self.parts[1:], strict=True):
                info = replace(laid_out.tensors[name], start=0, end=len(part))
                scan = FiniteScan(part, {name: info})
                for start in range(0, len(part), CHUNK_BYTES):
                    end = min(start + CHUNK_BYTES, len(part))
                    if make is not None:
                        make(name, start, end)
                    self._digesting.update(part[start:end])
                    scan.advance(end)
                broken += scan.broken
        finally:
            self._digesting.end()
        self.non_finite = tuple(broken)
        """Tensors that hold a NaN or an infinity."""

    def __len__(self) -> int:
        return self._num_bytes

    @property
    def digest(self) -> FileDigest:
        """Digest and size; waits until it is known."""
        num_bytes = self._num_bytes
        return FileDigest(self._digesting.sha256, num_bytes, piece_bytes_of(num_bytes))

    def joined(self) -> Content:
        """All bytes behind each other."""
        return b"".join(self.parts)


def seal(tensors: Mapping[str, tuple[str, NDArray[Any]]], make: Make | None = None) -> Sealed:
    """Lay tensors out as ``safetensors.torch.save`` does, but for the order of dtypes of one size.

    Args:
        tensors: name -> (dtype tag, array that holds its bits). Contiguous arrays are not copied.
        make: fills the bytes of a tensor between two offsets, before anything else looks at them;
            arrays are contiguous then. ``None``: all are filled.
    """
    return Sealed(tensor_parts(tensors), make)


def seal_in(place: memoryview, layout: TensorLayout, make: Make) -> Sealed:
    """A file in memory that a weights store lends for it, see ``WeightsStore.lend``.

    Args:
        place: as many bytes as the file has.
        make: see ``seal``; fills this memory.
    """
    return Sealed(placed_parts(layout, place), make, place=place)


def piece_bytes_of(num_bytes: int) -> int | None:
    """How a file of this size is digested, see ``FileDigest``."""
    return PIECE_BYTES if num_bytes > _WHOLE_BYTES else None


def digest_of(content: Content | Sealed) -> FileDigest:
    """Digest and size of a file, as they are published."""
    if isinstance(content, Sealed):
        return content.digest
    piece_bytes = piece_bytes_of(len(content))
    return FileDigest(sha256_of(content, piece_bytes), len(content), piece_bytes)


def sha256_of(content: Content, piece_bytes: int | None) -> str:
    """The digest of a file.

    Args:
        piece_bytes: see ``FileDigest``.
    """
    digesting = Digesting(len(content), piece_bytes)
    digesting.update(memoryview(content))
    digesting.end()
    return digesting.sha256


def plain(content: Content | Sealed) -> Content:
    """The bytes of a file, behind each other."""
    return content.joined() if isinstance(content, Sealed) else content


def parts_of(content: Content | Sealed) -> Sequence[Content]:
    """The bytes of a file, in pieces."""
    return content.parts if isinstance(content, Sealed) else [content]


class Digesting:
    """Computes a digest of chunks on threads of its own, so that their producer goes on meanwhile.
    A file of one chunk is digested where it is: a thread would take longer to start."""

    def __init__(self, num_bytes: int, piece_bytes: int | None) -> None:
        """
        Args:
            num_bytes: size of the file.
            piece_bytes: see ``FileDigest``.
        """
        self._piece_bytes = num_bytes if piece_bytes is None else piece_bytes
        self._is_pieced = piece_bytes is not None
        self._pieces: list[Any] = []
        """A hash of each piece that has begun."""
        self._left = 0
        """Bytes that the last of them lacks."""
        self._queues = [
            SimpleQueue[tuple[Any, memoryview] | None]()
            for _ in range(self._num_threads(num_bytes))
        ]
        self._threads = [
            threading.Thread(target=_digest_all, args=(queue,), name="digest", daemon=True)
            for queue in self._queues
        ]
        for thread in self._threads:
            thread.start()

    def _num_threads(self, num_bytes: int) -> int:
        if num_bytes <= CHUNK_BYTES:
            return 0
        return min(_MOST_THREADS, num_cores()) if self._is_pieced else 1

    def update(self, chunk: memoryview) -> None:
        """Append a chunk, which must not change until it is digested."""
        chunk = chunk.cast("B")
        while len(chunk):
            if not self._left:
                self._pieces.append(hashlib.sha256())
                self._left = self._piece_bytes
            part, chunk = chunk[: self._left], chunk[self._left :]
            self._left -= len(part)
            if self._queues:
                number = len(self._pieces) % len(self._queues)
                self._queues[number].put((self._pieces[-1], part))
            else:
                self._pieces[-1].update(part)

    def end(self) -> None:
        """There are no more chunks."""
        for queue in self._queues:
            queue.put(None)

    @property
    def sha256(self) -> str:
        """Of all chunks, in hex, once there are no more; waits until it is known."""
        for thread in self._threads:
            thread.join()
        digests = [piece.digest() for piece in self._pieces]
        if not self._is_pieced:
            return digests[0].hex() if digests else hashlib.sha256().hexdigest()
        return hashlib.sha256(b"".join(digests)).hexdigest()


def _digest_all(queue: SimpleQueue[tuple[Any, memoryview] | None]) -> None:
    while (found := queue.get()) is not None:
        piece, part = found
        piece.update(part)


def num_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0))
