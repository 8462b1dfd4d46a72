"""Tokenization off the event loop.

A long text takes seconds of a core: it delays no short one, and is refused without being tokenized
if its bytes alone show that it is too long.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from typing import Any, TypeVar

import jinja2

from serving.engine.vocabulary import Vocabulary
from serving.http.errors import failed, invalid
from serving.http.fewest_tokens import FewestTokens

T = TypeVar("T")

_FAULTS = (TypeError, ValueError, ArithmeticError, LookupError, AttributeError, RecursionError)
"""What expressions of a template raise; anything else is a fault of ours."""


LONG_TEXT = 16 << 10
"""Characters from which texts are long, together; 16 KiB take about 30 ms."""


def _are_long(texts: Iterable[str]) -> bool:
    return sum(map(len, texts)) >= LONG_TEXT


class TooManyTokensError(Exception):
    """A text has more tokens than it may have."""

    def __init__(self, at_least: int) -> None:
        super().__init__(at_least)
        self.at_least = at_least
        """Lower bound on its number of tokens."""


class PromptEncoder:
    """The target's tokenizer on separate threads, one for short texts and one for long ones. A long
    prompt delays other long prompts, but neither short ones nor running streams."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._backend = getattr(tokenizer, "backend_tokenizer", None)
        if (
            self._backend is not None
        ):  # a tokenizer.json may set these, and transformers ignores them
            self._backend.no_truncation()
            self._backend.no_padding()
        self._short = ThreadPoolExecutor(max_workers=1, thread_name_prefix="tokenize-short")
        self._long = self._short  # Python code may not stand two threads
        if self._backend is not None:
            self._long = ThreadPoolExecutor(max_workers=1, thread_name_prefix="tokenize-long")
        self.vocabulary = Vocabulary(tokenizer)

    async def encode(self, texts: Sequence[str], most: int) -> list[tuple[int, ...]]:
        """Token ids of each text, including the special tokens that the tokenizer adds.

        Args:
            most: tokens that a text may have.

        Raises:
            TooManyTokensError: texts are long, and one certainly has more. Otherwise they are
                returned, whatever their number of tokens.
        """
        await self._refuse_long(texts, most)
        return await self._run(lambda: [self._ids(text) for text in texts], texts)

    async def encode_chat(self, messages: Sequence[dict[str, str]], most: int) -> tuple[int, ...]:
        """Token ids of a conversation, up to the start of the assistant's turn.

        Args:
            most: see ``encode``.

        Raises:
            ApiError: 400, the target has no chat template, or its template refuses the messages or
                fails on them; 500, the template is not valid.
            TooManyTokensError: as in ``encode``.
        """
        if not self._tokenizer.chat_template:
            raise invalid(
                "the target has no chat template; use /v1/completions",
                param="messages",
                code="no_chat_template",
            )
        contents = [message["content"] for message in messages]
        text, ids = await self._run(lambda: self._chat(messages), contents)
        if ids is not None:
            return ids
        await self._refuse_long([text], most)
        return await self._run(lambda: self._ids(text, add_special_tokens=False), [text])

    def close(self) -> None:
        for thread in (self._short, self._long):
            thread.shutdown(wait=False, cancel_futures=True)

    @cached_property
    def _fewest_tokens(self) -> FewestTokens:
        return FewestTokens(self._tokenizer)

    def _at_least(self, texts: Iterable[str]) -> int:
        """Lower bound on the tokens of the longest text."""
        return max(map(self._fewest_tokens, texts))

    async def _refuse_long(self, texts: Sequence[str], most: int) -> None:
        if _are_long(texts):
            at_least = await asyncio.to_thread(self._at_least, texts)
            if at_least > most:
                raise TooManyTokensError(at_least)

    async def _run(self, job: Callable[[], T], texts: Iterable[str]) -> T:
        thread = self._long if _are_long(texts) else self._short
        return await asyncio.get_running_loop().run_in_executor(thread, job)

    def _ids(self, text: str, add_special_tokens: bool = True) -> tuple[int, ...]:
        """Same as ``tokenizer(text)``. The backend alone takes a third of the time and lets other
        threads run: 1.9 s instead of 7 for 1 MiB, longest stall 0.09 s instead of 0.26."""
        if self._backend is None:
            encoded = self._tokenizer(text, add_special_tokens=add_special_tokens, verbose=False)
            return tuple(encoded["input_ids"])
        (encoding,) = self._backend.encode_batch_fast([text], add_special_tokens=add_special_tokens)
        return tuple(encoding.ids)

    def _chat(self, messages: Sequence[dict[str, str]]) -> tuple[str, tuple[int, ...] | None]:
        """Text of a conversation, and its token ids unless it is long: to hand over to another
        thread takes nearly as long as a short text."""
        text = self._chat_text(messages)
        return text, None if _are_long([text]) else self._ids(text, add_special_tokens=False)

    def _chat_text(self, messages: Sequence[dict[str, str]]) -> str:
        try:
            return str(
                self._tokenizer.apply_chat_template(
                    list(messages), add_generation_prompt=True, tokenize=False
                )
            )
        except jinja2.TemplateSyntaxError as error:
            raise failed(
                f"the target's chat template is not valid (line {error.lineno}: {error.message}); "
                f"use /v1/completions",
                code="chat_template",
            ) from None
        except jinja2.TemplateError as error:
            raise invalid(
                f"the target's chat template refuses these messages: {error.message}",
                param="messages",
                code="chat_template",
            ) from None
        except _FAULTS as error:  # its text may quote a message
            raise invalid(
                f"the target's chat template fails on these messages ({type(error).__name__}); "
                f"use /v1/completions",
                param="messages",
                code="chat_template",
            ) from None
