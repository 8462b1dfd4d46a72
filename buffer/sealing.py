"""Encryption of stored records: AES-256 in GCM, with a random nonce for each record.

    mark 8 | nonce 12 | ciphertext and tag

A record without the mark is taken as it is, so what was stored before encryption began stays
readable. A file in the log's folder tells a wrong key before anything is read or written.
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from buffer.counts import ReaderCounts, WriterCounts
from buffer.files import OWNER_FILE, OWNER_FOLDER, read_regular, write_atomically
from buffer.interface import MAX_READ_BYTES, Offsets, Payload, Record, RecordReader, TraceWriter
from buffer.seen import Identity
from configs.urls import shown_option

MARK = b"SLPSEAL1"
_NONCE_BYTES = 12
_CHECK = "KEYCHECK"
_KNOWN = b"slipstream"
_MAX_KEY_BYTES = 4096
_KEY = re.compile(rb"[0-9a-fA-F]{64}")


class Sealer:
    """Seals and opens records with one key."""

    def __init__(self, key: bytes) -> None:
        """
        Args:
            key: 32 bytes.

        Raises:
            ValueError: the package ``cryptography`` is missing.
        """
        try:
            from cryptography.exceptions import InvalidTag
            from cryptography.hazmat.primitives.ciphers.aead import AESGCM
        except ModuleNotFoundError:
            raise ValueError(
                "buffer.url names a key, which needs the package cryptography: pip install "
                "'slipstream-serving[encryption]'"
            ) from None
        self._cipher = AESGCM(key)
        self._invalid = InvalidTag

    def seal(self, payload: Payload) -> bytes:
        nonce = os.urandom(_NONCE_BYTES)
        return MARK + nonce + self._cipher.encrypt(nonce, payload, MARK)

    def open(self, stored: Payload) -> Payload:
        """The record, whether it is sealed or not.

        Raises:
            ValueError: it was sealed with another key.
        """
        view = memoryview(stored)
        if view[: len(MARK)] != MARK:
            return stored
        begin = len(MARK) + _NONCE_BYTES
        try:
            return self._cipher.decrypt(view[len(MARK) : begin], view[begin:], MARK)
        except self._invalid:
            raise ValueError("a record is sealed with another key than buffer.url names") from None


def read_key(option: str, value: str) -> bytes:
    """The key that an option of ``buffer.url`` names: 64 hex digits.

    Args:
        option: ``key_file`` or ``key_env``.
        value: the file, or the environment variable.

    Raises:
        ValueError: says what is wrong, and never shows the key.
    """
    if option == "key_env":
        if value not in os.environ:
            raise ValueError(
                f"buffer.url: key_env names {shown_option(option, value)}, which is not set"
            )
        text = os.environb[value.encode()]
    else:
        try:
            text = read_regular(Path(value), _MAX_KEY_BYTES, follow=True)
        except OSError as error:
            raise ValueError(
                f"buffer.url: key_file {shown_option(option, value)} cannot be read: "
                f"{error.strerror}"
            ) from None
    if not _KEY.fullmatch(text.strip()):
        raise ValueError(
            f"buffer.url: {option} {shown_option(option, value)} must hold 64 hex digits, as "
            f"'openssl rand -hex 32' makes"
        )
    return bytes.fromhex(text.strip().decode())


def check_key(root: Path, sealer: Sealer | None) -> None:
    """Whether this key, or no key, fits a log.

    Raises:
        ValueError: it does not.
    """
    try:
        known = read_regular(root / _CHECK)
    except (FileNotFoundError, NotADirectoryError):
        return
    if sealer is None:
        raise ValueError(
            f"the log in {root} is encrypted: name its key in buffer.url, as in "
            f"'log:?key_file=/path' or 'log:?key_env=NAME'"
        )
    try:
        sealer.open(known)
    except ValueError:
        raise ValueError(
            f"the key that buffer.url names is not that of the log in {root}; nothing was read or "
            f"written. Use the key that it was begun with, or another folder"
        ) from None


def note_key(root: Path, sealer: Sealer) -> None:
    """Let ``check_key`` know this key, unless it knows one. A full disk is tried again later."""
    if not (root / _CHECK).exists():
        with contextlib.suppress(OSError):
            root.mkdir(mode=OWNER_FOLDER, parents=True, exist_ok=True)
            write_atomically(root / _CHECK, sealer.seal(_KNOWN), OWNER_FILE)


class SealingWriter(TraceWriter):
    """Seals what it appends."""

    def __init__(self, below: TraceWriter, sealer: Sealer) -> None:
        self._below = below
        self._sealer = sealer

    @property
    def name(self) -> str:
        return self._below.name

    @property
    def counts(self) -> WriterCounts:
        return self._below.counts

    def append(self, payload: Payload) -> int:
        return self._below.append(self._sealer.seal(payload))

    def append_all(self, payloads: Sequence[Payload]) -> list[OSError]:
        return self._below.append_all([self._sealer.seal(payload) for payload in payloads])

    def sync(self) -> range:
        return self._below.sync()

    def tend(self) -> range:
        return self._below.tend()

    def remove(self, is_unwanted: Callable[[Payload], bool]) -> int:
        return self._below.remove(lambda stored: is_unwanted(self._sealer.open(stored)))

    def close(self) -> None:
        self._below.close()


class OpeningReader(RecordReader):
    """Opens what it reads."""

    def __init__(self, below: RecordReader, sealer: Sealer) -> None:
        self._below = below
        self._sealer = sealer

    @property
    def counts(self) -> ReaderCounts:
        return self._below.counts

    def offsets(self) -> dict[str, Any]:
        return self._below.offsets()

    def read(self, max_records: int, max_bytes: int = MAX_READ_BYTES) -> list[Record]:
        records = self._below.read(max_records, max_bytes)
        return [replace(one, payload=self._sealer.open(one.payload)) for one in records]

    def commit(self, offsets: Offsets) -> None:
        self._below.commit(offsets)

    def claim(self, found: Sequence[tuple[Record, Identity]]) -> list[bool]:
        return self._below.claim(found)

    def close(self) -> None:
        self._below.close()
