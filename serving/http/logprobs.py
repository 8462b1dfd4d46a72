"""Log probabilities in the formats of OpenAI's two endpoints."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial

from serving.engine.text import text_reader
from serving.engine.vocabulary import Vocabulary
from serving.http.response_bodies import ChatLogprob, ChatLogprobs, CompletionLogprobs, TopLogprob
from serving.requests import Request, TokenLogprob

LOWEST = -9999.0
"""Stands for minus infinity, which JSON lacks; the same value as in vLLM."""


class TextOffsets:
    """Where the text of each token of one completion begins, in characters.

    All tokens of a character have the offset at which it begins. A special token that is left out
    of the text has the offset at which it would be. The tokens of a stop string have the offsets
    that they would have if the text went on.
    """

    def __init__(self, vocabulary: Vocabulary, request: Request) -> None:
        skip_special = request.sampling.skip_special_tokens
        self._reader = text_reader(vocabulary, request.prompt_ids, skip_special)
        self._name = vocabulary.name
        self._num_chars = 0

    def of(self, token_ids: Iterable[int]) -> list[int]:
        """Offsets of the next tokens."""
        return [offset for offset, _ in self.places(token_ids)]

    def places(self, token_ids: Iterable[int]) -> list[tuple[int, bool]]:
        """Offsets of the next tokens, and whether the text leaves out the space that a token begins
        with: SentencePiece does so where a text begins, after nothing or special tokens alone."""
        places = []
        for token in token_ids:
            offset, name = self._num_chars + self._reader.num_broken(token), self._name(token)
            text = self._reader.read((token,))
            places.append((offset, not offset and name[:1] == " " and text == name[1:]))
            self._num_chars += len(text)
        return places


def completion_logprobs(
    entries: Sequence[TokenLogprob], vocabulary: Vocabulary, offsets: TextOffsets
) -> CompletionLogprobs:
    """Format of /v1/completions.

    Args:
        offsets: those of the choice; it has read the tokens before ``entries``.
    """
    places = offsets.places(entry.token_id for entry in entries)
    namers = [partial(_first_name, vocabulary) if first else vocabulary.name for _, first in places]
    pairs = list(zip(entries, namers, strict=True))
    return CompletionLogprobs(
        tokens=[name(entry.token_id) for entry, name in pairs],
        token_logprobs=[_finite(entry.logprob) for entry in entries],
        top_logprobs=[_by_name(_with_own(entry), name) for entry, name in pairs],
        text_offset=[offset for offset, _ in places],
    )


def chat_logprobs(
    entries: Sequence[TokenLogprob], vocabulary: Vocabulary, skip_special: bool
) -> ChatLogprobs:
    """Format of /v1/chat/completions.

    Args:
        skip_special: special tokens are not part of the text, so they have no bytes.
    """
    return ChatLogprobs(content=[_chat_entry(entry, vocabulary, skip_special) for entry in entries])


def _with_own(entry: TokenLogprob) -> tuple[tuple[int, float], ...]:
    """The most probable tokens and the one that was drawn, as OpenAI and vLLM have it here."""
    if any(token == entry.token_id for token, _ in entry.top):
        return entry.top
    return (*entry.top, (entry.token_id, entry.logprob))


def _first_name(vocabulary: Vocabulary, token_id: int) -> str:
    """Name of a token where a text begins."""
    return vocabulary.name(token_id).removeprefix(" ")


def _by_name(top: Iterable[tuple[int, float]], name_of: Callable[[int], str]) -> dict[str, float]:
    """Log probabilities by the names of their tokens, highest first, none of them lost."""
    named: dict[str, float] = {}
    for token, logprob in top:
        name = name_of(token)
        named[f"token_id:{token}" if name in named else name] = _finite(logprob)
    return named


def _chat_entry(entry: TokenLogprob, vocabulary: Vocabulary, skip_special: bool) -> ChatLogprob:
    own = _top(entry.token_id, entry.logprob, vocabulary, skip_special)
    return ChatLogprob(
        token=own.token,
        logprob=own.logprob,
        bytes=own.bytes,
        top_logprobs=[
            _top(token, logprob, vocabulary, skip_special) for token, logprob in entry.top
        ],
    )


def _top(token_id: int, logprob: float, vocabulary: Vocabulary, skip_special: bool) -> TopLogprob:
    data = vocabulary.bytes_of(token_id, skip_special)
    return TopLogprob(
        token=vocabulary.name(token_id),
        logprob=_finite(logprob),
        bytes=None if data is None else list(data),
    )


def _finite(logprob: float) -> float:
    return max(logprob, LOWEST)
