"""What each token of a tokenizer adds to a text, as bytes.

Texts are decoded from bytes rather than by ``tokenizer.decode``, because the text of a token on its
own is not what the token adds to a text: SentencePiece decoders strip the space of ``▁the`` at the
start of a text only, and a token may hold a part of a character.
"""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Callable, Sequence
from typing import Any

from targets.tokenizer import decodes_plainly

REPLACEMENT = "\ufffd"
EACH_BYTE = "serving.engine.each_byte"
"""Error handler for UTF-8: one U+FFFD for each malformed byte, as SentencePiece decodes."""
MAX_CHARACTER_BYTES = 4
_LOCAL_DECODERS = {"WordPiece", "Metaspace", "Replace", "ByteFallback", "Fuse", "Strip"}
"""Decoders in which a token depends at most on whether it is the first of the text."""
_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")


def _replace_each_byte(error: UnicodeError) -> tuple[str, int]:
    assert isinstance(error, UnicodeDecodeError)
    return REPLACEMENT * (error.end - error.start), error.end


codecs.register_error(EACH_BYTE, _replace_each_byte)


class Pieces(dict[int, bytes]):
    """Token id -> the bytes that it adds to a text; computed at the first lookup."""

    def __init__(self, compute: Callable[[int], bytes]) -> None:
        super().__init__()
        self._compute = compute

    def __missing__(self, token_id: int) -> bytes:
        piece = self[token_id] = self._compute(token_id)
        return piece


class WholePieces(dict[int, str | None]):
    """Token id -> the text that it adds if it begins and ends with whole characters."""

    def __init__(self, pieces: Pieces) -> None:
        super().__init__()
        self._pieces = pieces

    def __missing__(self, token_id: int) -> str | None:
        try:
            text = self._pieces[token_id].decode()
        except UnicodeDecodeError:
            text = None
        self[token_id] = text
        return text


class Vocabulary:
    """The tokens of one tokenizer. Safe to read from several threads.

    ``is_local`` is False for tokenizers whose decoder is unknown or whose Python class changes what
    it decodes; they have no pieces, and their text is decoded by ``decode``.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._backend = getattr(tokenizer, "backend_tokenizer", None)
        steps = _decoder_steps(tokenizer)
        kinds = [step["type"] for step in steps or ()]
        self._is_byte_level = kinds == ["ByteLevel"]
        self.is_local = steps is not None and (self._is_byte_level or _are_local(steps))
        self.has_bytes = self._is_byte_level or "ByteFallback" in kinds
        """A token may hold a part of a character."""
        self.first_differs = self.is_local and not self._is_byte_level
        """The first token of a text may add other bytes than later in the text."""
        self.errors = EACH_BYTE if "ByteFallback" in kinds else "replace"
        """How malformed bytes are decoded: the name of an error handler for UTF-8."""
        self._space = _space_symbol(steps or [])
        self.special = _special_tokens(tokenizer)
        """Token id -> text of the special tokens."""
        self._special_ids = {text: token_id for token_id, text in self.special.items() if text}
        self._special_lengths: dict[str, list[int]] = {}
        """First character -> lengths of the special tokens that begin with it, longest first."""
        for text in sorted(self._special_ids, key=len, reverse=True):
            lengths = self._special_lengths.setdefault(text[0], [])
            if len(text) not in lengths:
                lengths.append(len(text))
        self._pieces = Pieces(self._piece)
        self._visible_pieces = Pieces(self._visible_piece)
        self._whole = WholePieces(self._pieces)
        self._visible_whole = WholePieces(self._visible_pieces)

    def pieces(self, skip_special: bool) -> Pieces:
        """Bytes that a token adds to a text that has begun; none for an unknown token.

        Args:
            skip_special: special tokens add none.
        """
        return self._visible_pieces if skip_special else self._pieces

    def whole_pieces(self, skip_special: bool) -> WholePieces:
        """The same as text; ``None`` for a token that holds a part of a character."""
        return self._visible_whole if skip_special else self._whole

    def first_piece(self, token_id: int, skip_special: bool) -> bytes | None:
        """Bytes that a token adds at the start of a text; ``None`` if the text starts after it."""
        token = self._token(token_id)
        if token is None or (skip_special and token_id in self.special):
            return None
        byte = self._byte_of(token)
        return self._join([token]).encode() if byte is None else self._first_byte(byte)

    def decode(self, token_ids: Sequence[int], skip_special: bool) -> str:
        """The tokenizer's own text of some tokens."""
        text: str = self._tokenizer.decode(list(token_ids), skip_special_tokens=skip_special)
        return text

    def bytes_of(self, token_id: int, skip_special: bool) -> bytes | None:
        """Bytes of one token; ``None`` if it adds nothing to any text."""
        if skip_special and token_id in self.special:
            return None
        if self.is_local:
            return self._pieces[token_id] or None
        text = self.decode([token_id], skip_special=False)
        return None if REPLACEMENT in text else text.encode() or None

    def special_at(self, text: str, at: int) -> int | None:
        """The special token whose text is in ``text`` at a position: the longest, if several."""
        for length in self._special_lengths.get(text[at], ()):
            token_id = self._special_ids.get(text[at : at + length])
            if token_id is not None:
                return token_id
        return None

    def name(self, token_id: int) -> str:
        """Text of one token, or ``token_id:N`` if it has none of its own: it is part of a character
        or reads the same as another token."""
        if token_id in self.special:
            return self.special[token_id]
        data = self.bytes_of(token_id, skip_special=False)
        try:
            text = data.decode() if data else None
        except UnicodeDecodeError:
            text = None
        if not text or self._owner_of(text, token_id) != token_id:
            return f"token_id:{token_id}"
        return text

    def _visible_piece(self, token_id: int) -> bytes:
        return b"" if token_id in self.special else self._pieces[token_id]

    def _piece(self, token_id: int) -> bytes:
        token = self._token(token_id)
        if token is None:
            return b""
        if self._is_byte_level:
            return byte_level_bytes(token)
        byte = self._byte_of(token)
        if byte is not None:
            return byte
        return self._join(["x", token])[1:].encode()

    def _token(self, token_id: int) -> str | None:
        """A token as the vocabulary spells it; ``None`` if there is none: models may have more ids
        than their tokenizer."""
        assert self._backend is not None
        token: str | None = self._backend.id_to_token(token_id)
        return token

    def _byte_of(self, token: str) -> bytes | None:
        """The byte that a token such as ``<0xE4>`` stands for."""
        match = _BYTE_TOKEN.fullmatch(token) if self.errors == EACH_BYTE else None
        return bytes([int(match[1], 16)]) if match else None

    def _first_byte(self, byte: bytes) -> bytes:
        return self._join([f"<0x{byte[0]:02X}>"]).encode() if byte < b"\x80" else byte

    def _join(self, tokens: list[str]) -> str:
        """Text of tokens by the tokenizer's own decoder."""
        assert self._backend is not None
        decoder = self._backend.decoder
        text: str = " ".join(tokens) if decoder is None else decoder.decode(tokens)
        return text

    def _owner_of(self, text: str, token_id: int) -> int | None:
        """Id of the one token that has a text as its name, if it may be that of ``token_id``: the
        token that is the usual spelling of the text or, in its absence, any one."""
        if self._backend is None:
            return token_id
        symbols = "".join(_SYMBOLS[byte] for byte in text.encode())
        if self.is_local:
            owner = self._id_of(symbols if self._is_byte_level else text.replace(" ", self._space))
            return token_id if owner is None else owner
        marked = text.replace(" ", "\u2581")
        for token in (text, marked, symbols, "\u2581" + marked):
            owner = self._id_of(token)
            if owner is not None and self.decode([owner], skip_special=False) == text:
                return owner
        return None

    def _id_of(self, token: str) -> int | None:
        assert self._backend is not None
        found: int | None = self._backend.token_to_id(token)
        return found


def _decoder_steps(tokenizer: Any) -> list[dict[str, Any]] | None:
    """Configuration of the Rust decoders, one after another; ``None`` if Python code changes what
    they decode. A tokenizer without decoder has no steps: its tokens are joined by spaces."""
    if not decodes_plainly(tokenizer):
        return None
    decoder = tokenizer.backend_tokenizer.decoder
    if decoder is None:
        return []
    state = json.loads(decoder.__getstate__())
    return state["decoders"] if state["type"] == "Sequence" else [state]


def _are_local(steps: list[dict[str, Any]]) -> bool:
    """True if what a token adds depends only on whether it is the first of the text."""
    kinds = [step["type"] for step in steps]
    if not _LOCAL_DECODERS.issuperset(kinds):
        return False
    end = kinds.index("Fuse") if "Fuse" in kinds else len(kinds)
    whole = steps[end + 1 :]  # these see the entire text
    return not whole or (len(whole) == 1 and _strips_first_space(whole[0]))


def _strips_first_space(step: dict[str, Any]) -> bool:
    wanted = {"type": "Strip", "content": " ", "start": 1, "stop": 0}
    return all(step.get(key) == value for key, value in wanted.items())


def _space_symbol(steps: list[dict[str, Any]]) -> str:
    """How the vocabulary spells a space."""
    for step in steps:
        if step["type"] == "Metaspace":
            return str(step["replacement"])
        if step["type"] == "Replace" and step["content"] == " ":
            return str(step["pattern"].get("String", " "))
    return " "


def _special_tokens(tokenizer: Any) -> dict[int, str]:
    """Special tokens, as ``skip_special_tokens`` understands them."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return dict(zip(tokenizer.all_special_ids, tokenizer.all_special_tokens, strict=True))
    added = backend.get_added_tokens_decoder()
    return {token_id: str(token.content) for token_id, token in added.items() if token.special}


def _byte_symbols() -> list[str]:
    """Symbol of each byte in byte-level vocabularies, as in GPT-2: printable Latin-1 characters
    stand for themselves, the other bytes are numbered from U+0100."""
    shown = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = iter(range(0x100, 0x200))
    return [chr(byte if byte in shown else next(others)) for byte in range(256)]


_SYMBOLS = _byte_symbols()
_BYTES = {symbol: byte for byte, symbol in enumerate(_SYMBOLS)}


def byte_level_bytes(token: str) -> bytes:
    """Bytes of a token in a byte-level vocabulary; added tokens may be spelled in plain text."""
    try:
        return bytes([_BYTES[symbol] for symbol in token])
    except KeyError:
        return token.encode()
