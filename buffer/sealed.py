"""Large files of a bundle in one pass: each byte is looked at while it is in the processor's cache,
and the digest, which takes longest, is computed meanwhile on a thread of its own.

Digests are SHA-256 of the whole file, so they cannot be divided over threads.
"""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Mapping, Sequence
from dataclasses import replace
from queue import SimpleQueue
from typing import Any

from numpy.typing import NDArray

from buffer.records import FileDigest
from buffer.tensors import non_finite_tensors, tensor_parts

CHUNK_BYTES = 4 << 20
"""Bytes read, digested and looked at at a time. Each costs the interpreter lock four times, for
which a thread that serves may let us wait, so they are large, but smaller than a last-level cache.
"""


Content = bytes | memoryview
"""Bytes of one file."""


class Sealed:
    """A safetensors file whose maker finds out its digest and soundness while laying it out. Its
    digest is computed on a thread of its own, so that it can be written meanwhile.

    A reader finds both by itself.
    """

    def __init__(self, parts: Sequence[memoryview], non_finite: Sequence[str]) -> None:
        """
        Args:
            parts: its bytes, in order. Tensors lie where their owner has them, who must not change
                them until they are published: a copy would cost memory for them.
            non_finite: tensors that hold a NaN or an infinity.
        """
        self.parts = tuple(parts)
        self.non_finite = tuple(non_finite)
        self._num_bytes = sum(map(len, self.parts))
        self._digesting = Digesting(self._num_bytes)
        for part in self.parts:
            self._digesting.update(part)
        self._digesting.end()

    def __len__(self) -> int:
        return self._num_bytes

    @property
    def digest(self) -> FileDigest:
        """SHA-256 and size; waits until it is known."""
        return FileDigest(self._digesting.sha256, self._num_bytes)

    def joined(self) -> Content:
        """All bytes behind each other."""
        return b"".join(self.parts)


def seal(tensors: Mapping[str, tuple[str, NDArray[Any]]]) -> Sealed:
    """Lay tensors out as ``safetensors.torch.save`` does, but for the order of dtypes of one size.

    Args:
        tensors: name -> (dtype tag, array that holds its bits). Contiguous arrays are not copied.
    """
    laid_out = tensor_parts(tensors)
    arrays = zip(laid_out.tensors.items(), laid_out.parts[1:], strict=True)
    broken = list[str]()
    for (name, info), array in arrays:
        broken += non_finite_tensors(array, {name: replace(info, start=0, end=len(array))})
    return Sealed(laid_out.parts, broken)


def digest_of(content: Content | Sealed) -> FileDigest:
    """SHA-256 and size of a file."""
    if isinstance(content, Sealed):
        return content.digest
    return FileDigest(hashlib.sha256(content).hexdigest(), len(content))


def plain(content: Content | Sealed) -> Content:
    """The bytes of a file, behind each other."""
    return content.joined() if isinstance(content, Sealed) else content


def parts_of(content: Content | Sealed) -> Sequence[Content]:
    """The bytes of a file, in pieces."""
    return content.parts if isinstance(content, Sealed) else [content]


class Digesting:
    """Computes a digest of chunks on a thread of its own, so that their producer goes on
    meanwhile. A file of one chunk is digested where it is: a thread would take longer to start."""

    def __init__(self, num_bytes: int) -> None:
        """
        Args:
            num_bytes: size of the file.
        """
        self._hash = hashlib.sha256()
        self._chunks: SimpleQueue[memoryview | None] = SimpleQueue()
        self._thread: threading.Thread | None = None
        if num_bytes > CHUNK_BYTES:
            self._thread = threading.Thread(target=self._run, name="digest", daemon=True)
            self._thread.start()

    def update(self, chunk: memoryview) -> None:
        """Append a chunk, which must not change until it is digested."""
        if self._thread is None:
            self._hash.update(chunk)
        else:
            self._chunks.put(chunk)

    def end(self) -> None:
        """There are no more chunks."""
        if self._thread is not None:
            self._chunks.put(None)

    @property
    def sha256(self) -> str:
        """Of all chunks, in hex, once there are no more; waits until it is known."""
        if self._thread is not None:
            self._thread.join()
        return self._hash.hexdigest()

    def _run(self) -> None:
        while (chunk := self._chunks.get()) is not None:
            self._hash.update(chunk)
