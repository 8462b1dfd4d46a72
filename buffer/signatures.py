"""Ed25519 signatures of bundles: who has the private key, and nobody else, publishes versions that
a server with the public key takes.

What is signed is the digest of the manifest without its signature. The manifest has the digests of
all files, the version and the target, so nothing of a signed bundle can be changed, renumbered or
left out. Keys are PEM files, as OpenSSL and ``buffer keys`` write them.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import stat
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from buffer.files import OWNER_FILE, open_regular
from buffer.manifest import encode_manifest
from buffer.records import Manifest

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import (
        Ed25519PrivateKey,
        Ed25519PublicKey,
    )

_CONTEXT = b"slipstream.bundle ed25519 1\0"
"""Begins every signed message, so that a signature means nothing anywhere else."""
_PREFIX = "ed25519:"
_SIGNATURE = re.compile(_PREFIX + "[0-9a-f]{128}")
_PUBLIC_PEM = re.compile(rb"-----BEGIN PUBLIC KEY-----.+?-----END PUBLIC KEY-----\n?", re.DOTALL)
_MAX_KEY_BYTES = 64 << 10


class KeyFileError(ValueError):
    """A key file that cannot be used."""


@dataclass(frozen=True, slots=True)
class PublicKeys:
    """Keys of which any one's signature is enough: the old and the new one, while keys change."""

    keys: tuple[Ed25519PublicKey, ...]

    def problem(self, manifest: Manifest) -> str | None:
        """Why the manifest's signature is not one of these keys'; ``None`` if it is."""
        from cryptography.exceptions import InvalidSignature

        text = manifest.signature
        if text is None:
            return "it is not signed"
        if not _SIGNATURE.fullmatch(text):
            return "its signature is not one of Ed25519"
        signature, message = bytes.fromhex(text.removeprefix(_PREFIX)), _message(manifest)
        for key in self.keys:
            try:
                key.verify(signature, message)
            except InvalidSignature:
                continue
            return None
        return "its signature is of another key, or of another manifest"


@dataclass(frozen=True, slots=True)
class SigningKey:
    """A private key."""

    key: Ed25519PrivateKey

    def signed(self, manifest: Manifest) -> Manifest:
        """The manifest with a signature; its files must be filled in."""
        return replace(manifest, signature=_PREFIX + self.key.sign(_message(manifest)).hex())

    def check_accepted_by(self, public: PublicKeys, own: Path, theirs: Path) -> None:
        """Refuse a private key whose signatures nobody with these public keys would take.

        Args:
            own, theirs: the files they are from, for the message.

        Raises:
            KeyFileError: it is none of theirs.
        """
        raw = self.key.public_key().public_bytes_raw()
        if raw not in {key.public_bytes_raw() for key in public.keys}:
            raise KeyFileError(
                f"{theirs} does not hold the public key of {own}: servers would refuse what it "
                f"signs. Make a pair with `buffer keys`"
            )

    @property
    def public(self) -> PublicKeys:
        """The key that verifies what this one signs."""
        return PublicKeys((self.key.public_key(),))


def read_public_keys(path: Path) -> PublicKeys:
    """The Ed25519 keys in a PEM file.

    Raises:
        KeyFileError: it cannot be read, or holds none or something else.
    """
    serialization, ed25519 = _library()
    texts = _PUBLIC_PEM.findall(_read(path, is_private=False))
    try:
        keys = tuple(serialization.load_pem_public_key(text) for text in texts)
    except ValueError as error:
        raise KeyFileError(f"{path} holds a damaged key: {error}") from None
    if not keys or not all(isinstance(key, ed25519.Ed25519PublicKey) for key in keys):
        raise KeyFileError(f"{path} must hold one or more Ed25519 public keys in PEM")
    return PublicKeys(keys)


def read_signing_key(path: Path) -> SigningKey:
    """The Ed25519 key in a PEM file that only its owner may read.

    Raises:
        KeyFileError: it cannot be read, others may read it, or it holds something else.
    """
    serialization, ed25519 = _library()
    text = _read(path, is_private=True)
    try:
        key = serialization.load_pem_private_key(text, password=None)
    except (ValueError, TypeError):  # its text stays out of the message
        raise KeyFileError(f"{path} must hold an Ed25519 private key in PEM, unencrypted") from None
    if not isinstance(key, ed25519.Ed25519PrivateKey):
        raise KeyFileError(f"{path} holds a private key that is not of Ed25519")
    return SigningKey(key)


def write_key_pair(private: Path, public: Path) -> None:
    """Make a key pair.

    Args:
        private: new file, which only its owner may read (0600).
        public: new file.

    Raises:
        KeyFileError: a file exists already or cannot be written, or both are one; nothing is left
            behind.
    """
    if private.resolve() == public.resolve():
        raise KeyFileError(f"the private and the public key need a file each, got {private} twice")
    serialization, ed25519 = _library()
    key = ed25519.Ed25519PrivateKey.generate()
    own = key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption(),
    )
    shown = key.public_key().public_bytes(
        serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
    )
    if public.exists():
        raise KeyFileError(f"{public} exists already")
    _write_new(private, own, OWNER_FILE)
    try:
        _write_new(public, shown, 0o644)
    except KeyFileError:
        private.unlink(missing_ok=True)
        raise


def _message(manifest: Manifest) -> bytes:
    """What is signed. The manifest as its readers get it: without what JSON does not keep, such as
    tuples, and in an order of its own."""
    body = json.loads(encode_manifest(replace(manifest, signature=None)))
    text = json.dumps(body, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return _CONTEXT + hashlib.sha256(text.encode()).digest()


def _read(path: Path, is_private: bool) -> bytes:
    try:
        with open(open_regular(path, follow=True), "rb") as file:
            status = os.fstat(file.fileno())
            if is_private and status.st_mode & (stat.S_IRWXG | stat.S_IRWXO):
                raise KeyFileError(
                    f"others may read the private key {path} "
                    f"(mode {stat.S_IMODE(status.st_mode):04o}); run chmod 600 {path}, and make a "
                    f"new key if somebody may have read it"
                )
            return file.read(_MAX_KEY_BYTES)
    except OSError as error:
        raise KeyFileError(f"the key {path} cannot be read: {error.strerror}") from None


def _write_new(path: Path, text: bytes, mode: int) -> None:
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW
    try:
        with open(os.open(path, flags, mode), "wb") as file:
            file.write(text)
    except FileExistsError:
        raise KeyFileError(f"{path} exists already") from None
    except OSError as error:
        raise KeyFileError(f"{path} cannot be written: {error.strerror}") from None


def _library() -> tuple[Any, Any]:
    try:
        from cryptography.hazmat.primitives import serialization
        from cryptography.hazmat.primitives.asymmetric import ed25519
    except ModuleNotFoundError:
        raise KeyFileError(
            "signatures need the package cryptography; pip install 'slipstream-serving[signatures]'"
        ) from None
    return serialization, ed25519
