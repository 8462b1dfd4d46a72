"""What a target's files say before its weights are loaded. Imports no torch: a server reads them
while torch is imported."""

from __future__ import annotations

import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from buffer.fingerprint import target_fingerprint
from targets.config import load_config
from targets.find import checked_folder, target_name
from targets.tokenizer import served_tokenizer


@dataclass(frozen=True, slots=True)
class TargetFiles:
    """A target whose files are all there and whole."""

    folder: Path
    config: Any
    """Of Hugging Face, or an ``OwnConfig``."""
    tokenizer: Any
    fingerprint: str
    """64 hex digits that tie drafters and traces to it."""
    name: str
    """Its name in the API unless ``server.model_name`` says otherwise."""


def read_target(target: str, cache: Path | None = None) -> TargetFiles:
    """Find a target, check its files, and read all of them but the weights.

    Args:
        target: see ``targets.find.target_folder``.
        cache: folder of converted GGUF files and tokenizers; ``None``: the user's.

    Raises:
        ValueError: it cannot be used; the message says why.
    """
    folder = checked_folder(target, cache)
    digest = _Digest(folder)
    config, tokenizer = load_config(folder), served_tokenizer(folder, cache)
    return TargetFiles(folder, config, tokenizer, digest.value(), target_name(target))


class _Digest(threading.Thread):
    """Computes a target's fingerprint beside other work: hashing needs no interpreter."""

    def __init__(self, folder: Path) -> None:
        super().__init__(name="target's fingerprint", daemon=True)
        self._folder = folder
        self._found: str | BaseException = ""
        self.start()

    def run(self) -> None:
        try:
            self._found = target_fingerprint(self._folder)
        except BaseException as error:  # raised by whoever asks
            self._found = error

    def value(self) -> str:
        self.join()
        if isinstance(self._found, BaseException):
            raise self._found
        return self._found
