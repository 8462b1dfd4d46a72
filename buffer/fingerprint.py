"""Identity of a target: a digest of its configuration and weights."""

from __future__ import annotations

import hashlib
from pathlib import Path

FULL_BYTES = 1 << 30
"""Total size up to which weights are hashed whole."""
_BLOCKS = 64
_BLOCK_BYTES = 1 << 20


def target_fingerprint(folder: Path) -> str:
    """Digest of a target: 64 hex digits of a sha256 over config.json and all *.safetensors.

    Up to 1 GiB of weights are hashed whole. Above that, each file contributes its name, its size
    and 64 blocks of 1 MiB, spread evenly from its first byte (which covers the header, with all
    names and shapes) to its last, so that a server with a large target starts in seconds. A
    fine-tuned model differs in every block; a single altered weight between them goes unnoticed.

    Raises:
        ValueError: no config.json, no safetensors, or weights in pickle files only.
    """
    weights = weight_files(folder)
    sampled = sum(path.stat().st_size for path in weights) > FULL_BYTES
    digest = hashlib.sha256(b"sampled" if sampled else b"full")
    _add_file(digest, folder / "config.json", sampled=False)
    for path in weights:
        _add_file(digest, path, sampled=sampled)
    return digest.hexdigest()


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a target, sorted by name; at least one.

    Raises:
        ValueError: no config.json, no safetensors, or weights in pickle files only.
    """
    if not (folder / "config.json").is_file():
        raise ValueError(f"{folder} has no config.json: it is not a model folder")
    weights = sorted(folder.glob("*.safetensors"))
    if not weights:
        raise ValueError(_no_weights(folder))
    return weights


def file_fingerprint(path: Path) -> str:
    """The same of a single file: 64 hex digits over its name, size and content."""
    digest = hashlib.sha256()
    _add_file(digest, path, sampled=path.stat().st_size > FULL_BYTES)
    return digest.hexdigest()


def _no_weights(folder: Path) -> str:
    pickles = sorted(path.name for path in folder.glob("*.bin"))
    if pickles:
        return (
            f"{folder} holds its weights as pickle ({pickles[0]}), which can run code when it is "
            f"loaded; not loading. Convert them to safetensors, or name a revision that has them"
        )
    return f"{folder} has no *.safetensors weights"


def _add_file(digest: hashlib._Hash, path: Path, *, sampled: bool) -> None:
    size = path.stat().st_size
    digest.update(f"\0{path.name}\0{size}\0".encode())
    with path.open("rb") as file:
        for start in _starts(size, sampled):
            file.seek(start)
            digest.update(file.read(_BLOCK_BYTES))


def _starts(size: int, sampled: bool) -> list[int]:
    """Offsets of the hashed blocks of a file."""
    if not sampled or size <= _BLOCKS * _BLOCK_BYTES:
        return list(range(0, size, _BLOCK_BYTES))
    return [(size - _BLOCK_BYTES) * i // (_BLOCKS - 1) for i in range(_BLOCKS)]
