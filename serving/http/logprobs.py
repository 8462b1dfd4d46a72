"""Log probabilities in the formats of OpenAI's two endpoints."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from serving.http.prompts import token_label
from serving.http.response_bodies import ChatLogprob, ChatLogprobs, CompletionLogprobs, TopLogprob
from serving.requests import TokenLogprob

LOWEST = -9999.0
"""Stands for minus infinity, which JSON lacks; the same value as in vLLM."""

TokenText = Callable[[int], str | None]
"""Text of one token; ``None`` if it is not a whole character."""


def completion_logprobs(
    entries: Sequence[TokenLogprob], text_of: TokenText, offset: int
) -> CompletionLogprobs:
    """Format of /v1/completions.

    Args:
        offset: characters of the choice before these tokens.
    """
    labels = [token_label(text_of, entry.token_id) for entry in entries]
    return CompletionLogprobs(
        tokens=labels,
        token_logprobs=[_finite(entry.logprob) for entry in entries],
        top_logprobs=[
            {token_label(text_of, token): _finite(logprob) for token, logprob in entry.top}
            for entry in entries
        ],
        text_offset=_offsets([text_of(entry.token_id) or "" for entry in entries], offset),
    )


def chat_logprobs(entries: Sequence[TokenLogprob], text_of: TokenText) -> ChatLogprobs:
    """Format of /v1/chat/completions."""
    return ChatLogprobs(content=[_chat_entry(entry, text_of) for entry in entries])


def _chat_entry(entry: TokenLogprob, text_of: TokenText) -> ChatLogprob:
    own = _top(entry.token_id, entry.logprob, text_of)
    return ChatLogprob(
        token=own.token,
        logprob=own.logprob,
        bytes=own.bytes,
        top_logprobs=[_top(token, logprob, text_of) for token, logprob in entry.top],
    )


def _top(token_id: int, logprob: float, text_of: TokenText) -> TopLogprob:
    text = text_of(token_id)
    return TopLogprob(
        token=token_label(text_of, token_id),
        logprob=_finite(logprob),
        bytes=None if text is None else list(text.encode()),
    )


def _offsets(texts: Sequence[str], start: int) -> list[int]:
    offsets = []
    for text in texts:
        offsets.append(start)
        start += len(text)
    return offsets


def _finite(logprob: float) -> float:
    return max(logprob, LOWEST)
