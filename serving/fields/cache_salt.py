"""``cache_salt``: separates requests of one tenant from each other."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from serving.fields.definition import declare

MAX_SALT_CHARS = 1024

FIELD: str | None = declare(
    None,
    "Cached prompts, and text to draft from, are shared only with requests of the same `user` that "
    "send the same salt, as in vLLM; best a long random text.",
    accepted=f"a text of 1 to {MAX_SALT_CHARS} characters",
    body=Annotated[str, Field(min_length=1, max_length=MAX_SALT_CHARS)] | None,
)
