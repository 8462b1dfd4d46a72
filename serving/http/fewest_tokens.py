"""The fewest tokens that a text can have, by its bytes alone.

Tokenizing 1 MiB takes a second or two of a core, counting its bytes 2 ms. That is enough to refuse
most texts that are far too long for a target.

Let ``longest[b]`` be the length of the longest token that contains byte ``b``, and let byte ``b``
count ``1 / longest[b]``. The bytes of one token then count at most 1 together, since each of them
is in a token of at least that length. So a text counts at most as much as it has tokens. The result
is two to ten times that of dividing by the one longest token, which is a run of spaces in most
vocabularies.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from typing import Any

import numpy as np
import numpy.typing as npt
from tokenizers import models

from serving.engine.vocabulary import byte_level_bytes

_LOSSLESS = {"ByteLevel", "Digits", "Metaspace", "Punctuation", "Split", "UnicodeScripts"}
"""Pre-tokenizers that lose no character, unless ``behavior`` is ``Removed``."""
_UNICODE_FORMS = {"NFC", "NFD", "NFKC", "NFKD"}
_ROUNDING = 1 - 1e-9
_NUM_BYTES = 256
_BYTE_TOKENS = {f"<0x{byte:02X}>" for byte in range(_NUM_BYTES)}


class FewestTokens:
    """A lower bound on the number of tokens of a text.

    It is known for BPE, as in GPT-2, Llama, Qwen, Gemma, Mistral and DeepSeek. Other tokenizers may
    drop text or read any length of it as one token; the bound is 0 for them.
    """

    def __init__(self, tokenizer: Any) -> None:
        """
        Args:
            tokenizer: one of ``transformers`` or an ``OwnTokenizer``.
        """
        self._each_256: npt.NDArray[np.float64] = np.zeros(_NUM_BYTES)
        """What each byte counts, in tokens."""
        self._form = _Form()
        backend = getattr(tokenizer, "backend_tokenizer", None)
        form = None if backend is None else _known_form(backend)
        if backend is None or form is None or not _reads_all(backend):
            return
        self._form = form
        longest_256 = np.where(_known_bytes(backend, form), _longest(_tokens(backend, form)), 0)
        np.divide(1, longest_256, out=self._each_256, where=longest_256 > 0)

    def __call__(self, text: str) -> int:
        """At most the number of tokens of a text, without those that are added to every text."""
        data = np.frombuffer(self._form.bytes_of(text), np.uint8)
        count = np.bincount(data, minlength=_NUM_BYTES) @ self._each_256
        return math.ceil(count * _ROUNDING)


class _Form:
    """What of a text the model of a tokenizer is certain to read, and how it is spelled."""

    def __init__(self) -> None:
        self.composes = False
        """Only ASCII before ASCII is certain: Unicode normalization may shorten the rest."""
        self.is_byte_level = False
        self._replaced: list[tuple[str, str]] = []

    def replace(self, character: str, by: str) -> None:
        self._replaced.append((character, by))

    @property
    def replaces(self) -> bool:
        return bool(self._replaced)

    def bytes_of(self, text: str) -> bytes:
        if self.composes:
            data = np.frombuffer(text.encode(), np.uint8)
            is_certain = data < 0x80
            is_certain[:-1] &= data[1:] < 0x80
            text = data[is_certain].tobytes().decode("ascii")
        return self.spelled(text).encode()

    def spelled(self, text: str) -> str:
        for character, by in self._replaced:
            text = text.replace(character, by)
        return text


def _known_form(backend: Any) -> _Form | None:
    """``None`` if text may get lost in normalizers or pre-tokenizers."""
    form = _Form()
    for step in _steps(backend.normalizer, "normalizers"):
        if step["type"] in _UNICODE_FORMS and not form.replaces:
            form.composes = True
        elif step["type"] == "Replace" and len(step["pattern"].get("String", "")) == 1:
            form.replace(step["pattern"]["String"], step["content"])
        elif step["type"] != "Prepend":
            return None
    for step in _steps(backend.pre_tokenizer, "pretokenizers"):
        if step["type"] not in _LOSSLESS or step.get("behavior") == "Removed":
            return None
        if step["type"] == "Metaspace":
            form.replace(" ", step["replacement"])
        form.is_byte_level |= step["type"] == "ByteLevel"
    return form


def _steps(part: Any, name: str) -> list[dict[str, Any]]:
    """Configuration of the parts of a pipeline."""
    if part is None:
        return []
    state = json.loads(part.__getstate__())
    return state[name] if state["type"] == "Sequence" else [state]


def _reads_all(backend: Any) -> bool:
    """True if the model reads every character that it knows in the text that it is given."""
    model = backend.model
    if not isinstance(model, models.BPE):
        return False  # others have one token for an unknown word of any length
    if model.continuing_subword_prefix or model.end_of_word_suffix:
        return False
    added = backend.get_added_tokens_decoder().values()
    return not any(token.lstrip or token.rstrip for token in added)  # they take all spaces


def _known_bytes(backend: Any, form: _Form) -> npt.NDArray[np.bool_]:
    """[256], true for bytes that are never dropped nor a part of an unknown token."""
    vocabulary = backend.get_vocab(with_added_tokens=False)
    if form.is_byte_level:
        singles = {byte_level_bytes(token) for token in vocabulary if len(token) == 1}
    elif backend.model.byte_fallback and vocabulary.keys() >= _BYTE_TOKENS:
        return np.ones(_NUM_BYTES, bool)
    else:
        singles = {token.encode() for token in vocabulary if len(token) == 1}
    return np.array([bytes([byte]) in singles for byte in range(_NUM_BYTES)])


def _tokens(backend: Any, form: _Form) -> list[bytes]:
    """The bytes of each token, in text that is spelled as the model reads it."""
    vocabulary = backend.get_vocab(with_added_tokens=False)
    each = byte_level_bytes if form.is_byte_level else str.encode
    added = backend.get_added_tokens_decoder().values()
    singles = [bytes([byte]) for byte in range(_NUM_BYTES)]
    return [
        *(each(token) for token in vocabulary),
        *(form.spelled(token.content).encode() for token in added),
        *singles,  # what <0xE4> stands for
    ]


def _longest(tokens: Iterable[bytes]) -> npt.NDArray[np.int64]:
    """For each byte, the length of the longest token that contains it; 0 for none."""
    kept = list(tokens)
    data = np.frombuffer(b"".join(kept), np.uint8)
    lengths = np.array([len(token) for token in kept])
    longest_256 = np.zeros(_NUM_BYTES, np.int64)
    np.maximum.at(longest_256, data, np.repeat(lengths, lengths))
    return longest_256
