"""``stop``: strings that end a completion."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Field, PlainValidator
from pydantic_core import PydanticCustomError

from serving.fields.definition import declare

MAX_STOPS = 16
MAX_STOP_CHARS = 1024


def _check(value: Any) -> tuple[str, ...]:
    texts = [value] if isinstance(value, str) else value
    if texts is None:
        return ()
    if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
        raise PydanticCustomError("stop_type", "must be a string or a list of strings")
    if len(texts) > MAX_STOPS:
        raise PydanticCustomError("stop_count", f"at most {MAX_STOPS} stop strings")
    if not all(0 < len(text) <= MAX_STOP_CHARS for text in texts):
        raise PydanticCustomError(
            "stop_length", f"stop strings have 1 to {MAX_STOP_CHARS} characters"
        )
    return tuple(texts)


_Text = Annotated[str, Field(min_length=1, max_length=MAX_STOP_CHARS)]
_Schema = _Text | Annotated[list[_Text], Field(max_length=MAX_STOPS)] | None

FIELD: tuple[str, ...] = declare(
    (),
    "Texts that end the completion; they are not part of it. A text may contain special tokens.",
    accepted=f"a text or up to {MAX_STOPS} texts of 1 to {MAX_STOP_CHARS} characters",
    body=Annotated[tuple[str, ...], PlainValidator(_check, json_schema_input_type=_Schema)],
)
