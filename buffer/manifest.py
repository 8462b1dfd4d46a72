"""``manifest.json`` of a bundle: how it is written, read and checked."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from buffer.records import FileDigest, Manifest
from buffer.tensors import TensorFileError, parse_json

SCHEMA = "slipstream.bundle"
SCHEMA_VERSION = 2
"""1 knows no files that are digested in pieces. A manifest without such files still says 1."""
MANIFEST = "manifest.json"
TENSORS = "drafter.safetensors"
"""The file that every bundle has."""

MAX_FILE_BYTES = 16 << 30
"""The drafter of the largest target has a fifth of it."""

VERSION_NAME = re.compile(r"0|[1-9][0-9]{0,17}")
_FILE_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,127}\.(safetensors|json)")
_MAX_TEXT = 1024
_SHA256 = re.compile(r"[0-9a-f]{64}")
_PIECE_BYTES = range(1 << 20, (1 << 30) + 1)
"""Longer ones would not divide the work, and shorter ones cost more than they hold."""


class ManifestError(ValueError):
    """Bytes that are not a manifest this reader understands."""


def encode_manifest(manifest: Manifest) -> bytes:
    """Content of ``manifest.json``.

    Raises:
        ValueError: a figure is NaN or infinite.
    """
    values = asdict(manifest)
    version = 1
    for entry in values["files"].values():
        if entry["piece_bytes"] is None:
            del entry["piece_bytes"]
        else:
            version = SCHEMA_VERSION
    body = {"schema": SCHEMA, "schema_version": version, **values}
    return json.dumps(body, indent=1, allow_nan=False).encode()


def decode_manifest(text: bytes) -> Manifest:
    """Inverse of ``encode_manifest``. Values are not checked; see ``manifest_problem``.

    Raises:
        ManifestError: it is not JSON, has another or newer schema, or lacks a field.
    """
    try:
        return _manifest_of(parse_json(text))
    except (TensorFileError, KeyError, TypeError, AttributeError) as error:
        raise ManifestError(str(error)) from None


def manifest_problem(manifest: Manifest, folder: str) -> str | None:
    """What is wrong with a manifest stored under the name ``folder``; ``None`` if nothing is.

    Raises:
        RecursionError: its figures are nested too deeply.
    """
    version, parent = manifest.version, manifest.parent
    if type(version) is not int or not VERSION_NAME.fullmatch(str(version)):
        return f"version must be an integer >= 0, got {version!r}"
    if str(version) != folder:
        return f"it is version {version}, but is in folder {folder!r}"
    if parent is not None and (type(parent) is not int or not 0 <= parent < version):
        return f"parent must be a version below {version} or null, got {parent!r}"
    for name in ("kind", "target_fingerprint"):
        if not isinstance(getattr(manifest, name), str):
            return f"{name} must be a text, got {getattr(manifest, name)!r}"
    signature = manifest.signature
    if signature is not None and not (isinstance(signature, str) and len(signature) <= _MAX_TEXT):
        return f"signature must be a text of at most {_MAX_TEXT} characters or null"
    if type(manifest.created_unix_ms) is not int:
        return f"created_unix_ms must be an integer, got {manifest.created_unix_ms!r}"
    for name in ("drafter_config", "gate", "policy"):
        value = getattr(manifest, name)
        if not isinstance(value, dict) or not _is_finite(value):
            return f"{name} must be an object of finite numbers"
    if TENSORS not in manifest.files:
        return f"files must name {TENSORS}"
    return next(filter(None, map(_entry_problem, manifest.files.items())), None)


def _entry_problem(entry: tuple[str, FileDigest]) -> str | None:
    name, digest = entry
    if not _FILE_NAME.fullmatch(name) or name == MANIFEST:
        return f"file name {name!r} is not a plain name ending in .safetensors or .json"
    if not isinstance(digest.sha256, str) or not _SHA256.fullmatch(digest.sha256):
        return f"sha256 of {name} must be 64 hex digits, got {digest.sha256!r}"
    if type(digest.num_bytes) is not int or not 0 <= digest.num_bytes <= MAX_FILE_BYTES:
        return (
            f"num_bytes of {name} must be an integer in 0..{MAX_FILE_BYTES}, "
            f"got {digest.num_bytes!r}"
        )
    piece = digest.piece_bytes
    if piece is not None and (type(piece) is not int or piece not in _PIECE_BYTES):
        return (
            f"piece_bytes of {name} must be an integer in {_PIECE_BYTES.start}.."
            f"{_PIECE_BYTES.stop - 1} or absent, got {piece!r}"
        )
    return None


def _is_finite(value: Any) -> bool:
    if isinstance(value, Mapping):
        return all(map(_is_finite, value.values()))
    if isinstance(value, list | tuple):
        return all(map(_is_finite, value))
    return not isinstance(value, float) or math.isfinite(value)


def _manifest_of(body: Any) -> Manifest:
    schema, version = body.get("schema"), body.get("schema_version")
    if schema != SCHEMA:
        raise TypeError(f"schema is {schema!r}, expected {SCHEMA!r}")
    if type(version) is not int or not 1 <= version <= SCHEMA_VERSION:
        raise TypeError(f"schema_version is {version!r}, this reader knows 1 to {SCHEMA_VERSION}")
    known = {name: body[name] for name in Manifest.__dataclass_fields__ if name != "files"}
    files = {
        name: FileDigest(entry["sha256"], entry["num_bytes"], entry.get("piece_bytes"))
        for name, entry in body["files"].items()
    }
    return Manifest(**known, files=files)
