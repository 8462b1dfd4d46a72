"""What ``transformers`` made of a folder's tokenizer, kept on the disk for the next start.

The file is JSON and holds the Rust tokenizer, the chat template and the special tokens with a name.
Its own name is a digest of all small files of the folder and of the versions of the libraries, so
another tokenizer, or another version, is another file. One that is damaged is made again.
"""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict

from buffer.files import read_regular, write_atomically
from targets.own_tokenizer import OwnTokenizer, backend_from

log = logging.getLogger(__name__)

_RECIPE = 1
"""Part of the digest. Raise it when a file of this module means something else than before."""
_MOST_BYTES = 256 << 20
_WEIGHTS = (".safetensors", ".bin", ".gguf", ".pt", ".pth", ".onnx", ".h5", ".msgpack")


class _Kept(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)
    backend: str
    """JSON, as in a tokenizer.json."""
    chat_template: str | None
    special_tokens: dict[str, str]


def kept_tokenizer(folder: Path, cache: Path) -> OwnTokenizer | None:
    """The tokenizer of a folder as ``transformers`` made it before; ``None`` if none is kept.

    Args:
        cache: folder of kept tokenizers.
    """
    path = _path(folder, cache)
    try:
        kept = _Kept.model_validate_json(read_regular(path, _MOST_BYTES))
        backend = backend_from(kept.backend)
        return OwnTokenizer(backend, kept.chat_template, kept.special_tokens)
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:  # pydantic's is a ValueError
        problem = str(error).partition("\n")[0]
    log.warning("the tokenizer kept in %s cannot be used (%s); it is made again", path, problem)
    return None


def keep_tokenizer(folder: Path, cache: Path, tokenizer: Any) -> None:
    """Keep a tokenizer that ``transformers`` made of a folder, if an ``OwnTokenizer`` does the same
    and the cache can be written.

    Args:
        tokenizer: whose ``decode`` is the Rust tokenizer's.
    """
    template = tokenizer.chat_template
    if template is not None and not isinstance(template, str):
        return
    backend = tokenizer.backend_tokenizer.to_str()
    try:
        if backend_from(backend).to_str() != backend:
            return
    except ValueError as error:
        log.debug("the tokenizer in %s cannot be kept: %s", folder, error)
        return
    kept = _Kept(
        backend=backend, chat_template=template, special_tokens=tokenizer.special_tokens_map
    )
    try:
        cache.mkdir(parents=True, exist_ok=True)
        write_atomically(_path(folder, cache), kept.model_dump_json().encode())
    except OSError as error:
        log.info("the tokenizer cannot be kept in %s (%s); the next start makes it again", cache,
                 error)  # fmt: skip


def _path(folder: Path, cache: Path) -> Path:
    return cache / f"tokenizer-{_digest(folder)[:32]}.json"


def _digest(folder: Path) -> str:
    """Digest of all that ``transformers`` may look at when it makes a tokenizer of a folder, its
    name among it: for some names there are exceptions."""
    versions = version("transformers"), version("tokenizers")
    digest = hashlib.sha256("\0".join((str(_RECIPE), *versions, str(folder))).encode())
    for path in _files(folder):
        data = path.read_bytes()
        digest.update(f"\0{path.relative_to(folder)}\0{len(data)}\0".encode())
        digest.update(data)
    return digest.hexdigest()


def _files(folder: Path) -> Iterator[Path]:
    """Files that are not weights, in a fixed order."""
    for home, folders, names in os.walk(folder, followlinks=False):
        folders.sort()
        for name in sorted(names):
            path = Path(home) / name
            if path.suffix not in _WEIGHTS and path.is_file():
                yield path
