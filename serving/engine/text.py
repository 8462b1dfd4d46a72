"""Reads tokens as text, whatever the number of them that comes at a time.

The text of a completion is what its tokens add to the text of the prompt, so a leading space stays
unless the text begins with it. Over byte-level and SentencePiece vocabularies, tokens are looked up
as bytes and decoded here. That is faster than the tokenizer's own decoder and differs from it only
if byte-fallback tokens do not form valid UTF-8: the decoder of ``tokenizers`` then discards the
entire run of such tokens, including characters that were streamed already. Here, as in
SentencePiece, only the malformed bytes read as U+FFFD.

``tokenizers.decoders.DecodeStream`` (0.23) raises an error for such runs (12 % of random sequences)
and loses the last bytes of an answer that ends in the middle of a character.
"""

from __future__ import annotations

import codecs
from collections.abc import Sequence
from typing import Protocol

from serving.engine.vocabulary import MAX_CHARACTER_BYTES, REPLACEMENT, Vocabulary

_CONTEXT, _MOST_CONTEXT = 8, 64
"""Tokens before the new ones that an unknown decoder is given; more if they have no text or begin
within a character."""


class TextReader(Protocol):
    """Reads tokens as text, in order."""

    def read(self, token_ids: Sequence[int]) -> str:
        """Text of the next tokens, up to the last whole character."""

    def end(self) -> str:
        """The rest: an incomplete character."""

    def num_broken(self, token_id: int) -> int:
        """Characters that the next token ends without being a part of them."""


def text_reader(
    vocabulary: Vocabulary, prompt_ids: Sequence[int], skip_special: bool
) -> TextReader:
    """A reader of the tokens after ``prompt_ids``."""
    kind = ByteReader if vocabulary.is_local else WindowReader
    return kind(vocabulary, prompt_ids, skip_special)


class ByteReader:
    """For vocabularies whose tokens are known as bytes.

    A character belongs to the token that completes it. If the prompt ends in the middle of a
    character, the completion may complete it, and otherwise has no part in it.
    """

    __slots__ = (
        "_errors", "_has_begun", "_is_prompts", "_left", "_piece", "_skip", "_vocabulary", "_whole",
    )  # fmt: skip

    def __init__(
        self, vocabulary: Vocabulary, prompt_ids: Sequence[int], skip_special: bool
    ) -> None:
        self._vocabulary = vocabulary
        self._skip = skip_special
        self._piece = vocabulary.pieces(skip_special).__getitem__
        self._whole = vocabulary.whole_pieces(skip_special)
        self._errors = vocabulary.errors
        self._has_begun = not vocabulary.first_differs or any(
            vocabulary.first_piece(token, skip_special) is not None for token in prompt_ids
        )
        self._left = self._cut_character(prompt_ids) if vocabulary.has_bytes else b""
        self._is_prompts = bool(self._left)

    def read(self, token_ids: Sequence[int]) -> str:
        if self._has_begun and not self._left:
            text = self._read_whole(token_ids)
            if text is not None:
                return text
        if self._has_begun:
            data = b"".join(map(self._piece, token_ids))
        else:
            data = self._read_first(token_ids)
        if self._left:
            data = self._with_left(data)
        text, num_read = codecs.utf_8_decode(data, self._errors, False)
        self._left = data[num_read:] if num_read < len(data) else b""
        return text

    def _read_whole(self, token_ids: Sequence[int]) -> str | None:
        """Text of tokens that hold whole characters, as nearly all do; ``None`` for others."""
        if len(token_ids) == 1:
            return self._whole[token_ids[0]]
        texts = [self._whole[token] for token in token_ids]
        return None if None in texts else "".join(filter(None, texts))

    def end(self) -> str:
        left, self._left = self._left, b""
        return "" if self._is_prompts else self._replaced(left)

    def num_broken(self, token_id: int) -> int:
        piece = self._piece(token_id)
        if not (self._left and piece) or self._is_prompts or _continues(self._left, piece):
            return 0
        return len(self._replaced(self._left))

    def _read_first(self, token_ids: Sequence[int]) -> bytes:
        """Bytes of tokens at the start of a text."""
        for index, token in enumerate(token_ids):
            first = self._vocabulary.first_piece(token, self._skip)
            if first is not None:
                self._has_begun = True
                return first + b"".join(map(self._piece, token_ids[index + 1 :]))
        return b""

    def _with_left(self, data: bytes) -> bytes:
        if not data:
            return self._left
        if self._is_prompts:
            self._is_prompts = False
            if not _continues(self._left, data):
                return data
        return self._left + data

    def _cut_character(self, prompt_ids: Sequence[int]) -> bytes:
        """The bytes of a character in the middle of which the prompt ends."""
        data = b""
        for token in reversed(prompt_ids):
            data = self._piece(token) + data
            if len(data) >= MAX_CHARACTER_BYTES or (data and data[-1] < 0x80):
                break
        return data[codecs.utf_8_decode(data, self._errors, False)[1] :]

    def _replaced(self, data: bytes) -> str:
        return codecs.utf_8_decode(data, self._errors, True)[0]


def _continues(left: bytes, data: bytes) -> bool:
    """True if the incomplete character ``left`` goes on with ``data``."""
    try:
        codecs.utf_8_decode(left + data[:1], "strict", False)
    except UnicodeDecodeError:
        return False
    return True


class WindowReader:
    """For other tokenizers, whose decoder may treat a token by what precedes it.

    It is given the last tokens that were read, without and with the new ones; the new text is the
    difference. What a decoder changes further back is not seen.
    """

    __slots__ = ("_ids", "_num_read", "_skip", "_vocabulary")

    def __init__(
        self, vocabulary: Vocabulary, prompt_ids: Sequence[int], skip_special: bool
    ) -> None:
        self._vocabulary = vocabulary
        self._skip = skip_special
        self._ids = self._context(prompt_ids)
        """Context, then the tokens that are not read yet."""
        self._num_read = len(self._ids)

    def read(self, token_ids: Sequence[int]) -> str:
        text = ""
        for token in token_ids:  # one by one, so that the text is the same for all steps
            self._ids.append(token)
            text += self._new_text(is_final=False)
        return text

    def end(self) -> str:
        return self._new_text(is_final=True)

    def num_broken(self, token_id: int) -> int:
        return 0

    def _new_text(self, is_final: bool) -> str:
        before = self._vocabulary.decode(self._ids[: self._num_read], self._skip)
        now = self._vocabulary.decode(self._ids, self._skip)
        if len(now) <= len(before) or (now.endswith(REPLACEMENT) and not is_final):
            return ""
        self._ids = self._context(self._ids)
        self._num_read = len(self._ids)
        return now[len(before) :]

    def _context(self, token_ids: Sequence[int]) -> list[int]:
        """The last tokens that stand by themselves: a decoder may drop a space where a text begins,
        and all bytes that follow half a character."""
        num = _CONTEXT
        while num < min(len(token_ids), _MOST_CONTEXT):
            text = self._vocabulary.decode(token_ids[-num:], self._skip)
            if text and not text.startswith(REPLACEMENT):
                break
            num += 1
        return list(token_ids[-num:])
