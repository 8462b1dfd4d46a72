"""``domain``: what kind of text this is, for the trainer."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from serving.fields.definition import VISIBLE, declare

MAX_DOMAIN_CHARS = 64

FIELD: str | None = declare(
    None,
    "Kind of text, such as `code`, which its trace keeps: the trainer can learn from all domains "
    "alike, and bound the influence of each. Changes no token.",
    accepted=f"a text of 1 to {MAX_DOMAIN_CHARS} visible characters",
    body=Annotated[str, Field(min_length=1, max_length=MAX_DOMAIN_CHARS, pattern=VISIBLE)] | None,
    in_trace=True,
)
