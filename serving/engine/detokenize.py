"""Incremental detokenization: whole characters only, and no text from a stop string onwards."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from serving.engine.text import text_reader
from serving.engine.vocabulary import Vocabulary

_MARKS = 0xD800
"""First code point of the marks in the text that is searched for stop strings: surrogates, which
decoded text never contains."""


class StopStrings:
    """The stop strings of one request, and the special tokens that they contain.

    With ``skip_special``, a special token has no text of its own. If a stop string contains its
    text, a *mark* takes the token's place in the text that is searched and in a second version of
    the string, so that it matches as if the token were shown. Marks never leave the detokenizer.
    """

    __slots__ = ("_first", "_longest", "marks", "searched")

    def __init__(self, vocabulary: Vocabulary, stop: Iterable[str], skip_special: bool) -> None:
        self.searched: dict[str, str] = {}
        """What to search for -> the stop string as the client wrote it."""
        self.marks: dict[int, str] = {}
        """Token id -> its mark."""
        for text in stop:
            if text:
                self.searched[text] = text
                if skip_special:
                    self.searched[self._marked(vocabulary, text)] = text
        self._first = {searched[0] for searched in self.searched}
        self._longest = max((len(searched) for searched in self.searched), default=1)

    def _marked(self, vocabulary: Vocabulary, text: str) -> str:
        parts: list[str] = []
        at = 0
        while at < len(text):
            token = vocabulary.special_at(text, at)
            if token is None:
                parts.append(text[at])
                at += 1
            else:
                parts.append(self.marks.setdefault(token, chr(_MARKS + len(self.marks))))
                at += len(vocabulary.special[token])
        return "".join(parts)

    def find(self, text: str) -> tuple[int, str] | None:
        """Where the first stop string of the text begins, not counting marks, and which it is."""
        clean = self.clean(text) if self.marks else text
        if clean is text and not any(map(text.__contains__, self.searched)):
            return None  # nearly every token
        found = _occurrences(self.searched, clean)
        if clean != text:
            among_marks = _occurrences(self.searched, text)
            found += [(len(self.clean(text[:at])), size, stop) for at, size, stop in among_marks]
        if not found:
            return None
        at, _, stop = min(found)
        return at, stop

    def overlap(self, text: str) -> int:
        """Length of the longest tail of the text that begins some stop string, with or without its
        marks."""
        num_marks = len(text) - len(self.clean(text)) if self.marks else 0
        for at in range(max(0, len(text) - self._longest - num_marks + 1), len(text)):
            if self._begins_with(text[at:]) or (
                num_marks and self._begins_with(self.clean(text[at:]))
            ):
                return len(text) - at
        return 0

    def clean(self, text: str) -> str:
        """Text without marks."""
        for mark in self.marks.values():
            text = text.replace(mark, "")
        return text

    def _begins_with(self, tail: str) -> bool:
        return tail[:1] in self._first and any(one.startswith(tail) for one in self.searched)


def _occurrences(searched: dict[str, str], text: str) -> list[tuple[int, int, str]]:
    """First occurrence of each string in a text: where, how long, and its value."""
    return [(at, len(one), stop) for one, stop in searched.items() if (at := text.find(one)) >= 0]


class Detokenizer:
    """Text of one completion: add committed tokens one by one, take the text that is final."""

    __slots__ = ("_ids", "_keeps_stop", "_pending", "_reader", "_stop", "stopped")

    def __init__(
        self,
        vocabulary: Vocabulary,
        prompt_ids: Sequence[int] = (),
        *,
        stop: Sequence[str] = (),
        skip_special: bool = True,
        keeps_stop: bool = False,
    ) -> None:
        """
        Args:
            prompt_ids: what the completion follows.
            skip_special: leave special tokens out of the text.
            keeps_stop: the text ends after the stop string that was found, not before it.
        """
        self._reader = text_reader(vocabulary, prompt_ids, skip_special)
        self._stop = StopStrings(vocabulary, stop, skip_special) if stop else None
        self._keeps_stop = keeps_stop
        self._ids: list[int] = []
        """Tokens to be read by ``take``; empty if stop strings are searched for at each token."""
        self._pending = ""
        self.stopped = False
        """A stop string was found; text and tokens after it are discarded."""

    def add(self, token_id: int) -> bool:
        """Append one token. Returns True if a stop string is now complete."""
        if self._stop is None:
            self._ids.append(token_id)
            return False
        self._pending += self._reader.read((token_id,)) + self._stop.marks.get(token_id, "")
        found = self._stop.find(self._pending)
        if found is not None:
            at, text = found
            self._pending = self._stop.clean(self._pending)[:at]
            if self._keeps_stop:
                self._pending += text
            self.stopped = True
        return self.stopped

    def take(self, final: bool) -> str:
        """Text since the last call. Unless ``final``, it ends before a possible stop string."""
        if self._ids:
            self._pending = self._reader.read(self._ids)
            self._ids.clear()
        if final and not self.stopped:
            self._pending += self._reader.end()
        if self._stop is None or self.stopped:
            text, self._pending = self._pending, ""
            return text
        cut = len(self._pending) - (0 if final else self._stop.overlap(self._pending))
        text, self._pending = self._pending[:cut], self._pending[cut:]
        return self._stop.clean(text)
