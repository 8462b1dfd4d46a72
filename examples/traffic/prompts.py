"""What clients send: a prompt with its domain, and files of them.

A file has one JSON object per line, with ``prompt`` (text to continue) or ``messages`` (a chat),
and optionally ``domain``, ``max_tokens`` and ``temperature``.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator


class PromptError(ValueError):
    """A file of prompts cannot be used; the text names file, line and field."""


class Message(BaseModel):
    """One turn of a chat."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    role: Literal["system", "user", "assistant"]
    content: str = Field(min_length=1)


class Prompt(BaseModel):
    """A text to continue, or a chat to answer."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, strict=True, allow_inf_nan=False, use_attribute_docstrings=True
    )

    prompt: str | None = Field(None, min_length=1)
    messages: tuple[Message, ...] | None = Field(None, min_length=1)
    domain: str = Field("prompts", min_length=1)
    """What the text is about; traffic shifts from one domain to the next."""
    max_tokens: int | None = Field(None, ge=1)
    """Bound on the answer; ``None``: the client's."""
    temperature: float | None = Field(None, ge=0, le=2)
    """``None``: the client's."""

    @model_validator(mode="after")
    def _has_one_text(self) -> Self:
        if (self.prompt is None) == (self.messages is None):
            raise ValueError("give either 'prompt' or 'messages'")
        return self

    def seed(self, base: int) -> int:
        """Seed of its answer, below 2**31: a function of its text and ``base``, so that every arm
        of a comparison draws alike."""
        turns = [(m.role, m.content) for m in self.messages or ()]
        digest = hashlib.blake2b(repr((base, self.prompt, turns)).encode(), digest_size=4)
        return int.from_bytes(digest.digest()) >> 1


def asked(domain: str, content: str) -> Prompt:
    """A chat of one question."""
    return Prompt(domain=domain, messages=(Message(role="user", content=content),))


def read_prompts(path: Path) -> list[Prompt]:
    """All prompts of a JSONL file; empty lines are skipped.

    Raises:
        PromptError: the file cannot be read or holds no prompt, or a line is not one.
    """
    try:
        # Not ``splitlines``: JSON may hold the other ends of lines that it knows, such as U+2028.
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise PromptError(f"{path}: cannot be read: {error}") from None
    found = [_parsed(path, n, line) for n, line in enumerate(lines, start=1) if line.strip()]
    if not found:
        raise PromptError(f"{path}: holds no prompts")
    return found


def write_prompts(path: Path, prompts: Iterable[Prompt]) -> None:
    """The inverse of ``read_prompts``."""
    lines = (prompt.model_dump_json(exclude_none=True) + "\n" for prompt in prompts)
    path.write_text("".join(lines), encoding="utf-8")


def by_domain(prompts: Iterable[Prompt]) -> dict[str, list[Prompt]]:
    """Different prompts of each domain, in the order in which they come."""
    found: dict[str, dict[Prompt, None]] = {}
    for prompt in prompts:
        found.setdefault(prompt.domain, {})[prompt] = None
    return {domain: list(different) for domain, different in found.items()}


def _parsed(path: Path, number: int, line: str) -> Prompt:
    try:
        return Prompt.model_validate_json(line)
    except ValidationError as error:
        problems = "; ".join(_problems(error))
        raise PromptError(f"{path}, line {number}: {problems}") from None


def _problems(error: ValidationError) -> Iterator[str]:
    """``field: what is wrong``, for each. Bad items are left out of a list, which is then too short
    as well: only the items are named."""
    problems = error.errors()
    inner = {one["loc"][:1] for one in problems if len(one["loc"]) > 1}
    for one in problems:
        if one["type"] == "too_short" and one["loc"] in inner:
            continue
        field = ".".join(map(str, one["loc"]))
        yield f"{field}: {_said(one)}" if field else _said(one)


def _said(problem: Any) -> str:
    if problem["type"] == "extra_forbidden":
        return f"unknown field; known: {', '.join(Prompt.model_fields)}"
    said: str = problem["msg"].removeprefix("Value error, ")
    return said[0].lower() + said[1:]
