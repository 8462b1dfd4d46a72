"""``stop_token_ids``: tokens that end a completion."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Field

from serving.fields.definition import declare

MAX_STOP_TOKEN_IDS = 64

_TokenId = Annotated[int, Field(ge=0)]


def _limit_schema(schema: dict[str, Any], vocab_size: int) -> None:
    array = next(branch for branch in schema["anyOf"] if branch.get("type") == "array")
    array["items"]["maximum"] = vocab_size - 1


FIELD: tuple[int, ...] = declare(
    (),
    "Token ids that end the completion.",
    accepted=f"up to {MAX_STOP_TOKEN_IDS} token ids",
    body=Annotated[list[_TokenId], Field(max_length=MAX_STOP_TOKEN_IDS, fail_fast=True)] | None,
    from_body=tuple,
    token_ids=lambda ids: ids,
    limit_schema=_limit_schema,
)
