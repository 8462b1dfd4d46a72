"""``logit_bias``: numbers added to the logits of single tokens."""

from __future__ import annotations

import re
from typing import Annotated, Any

from pydantic import Field, PlainValidator
from pydantic_core import PydanticCustomError

from serving.fields.definition import IntegerColumn, LaneTable, declare

MAX_BIASES = 300
MAX_BIAS = 100
TOKEN_ID = r"0|[1-9][0-9]{0,9}"
"""A number in canonical notation, so that no two keys name the same token."""

Biases = tuple[tuple[int, float], ...]


def _check(value: Any) -> Biases:
    if value is None:
        return ()
    if not isinstance(value, dict):
        raise PydanticCustomError("bias_type", "must be an object of token ids and numbers")
    if len(value) > MAX_BIASES:
        raise PydanticCustomError("bias_count", f"at most {MAX_BIASES} token ids")
    if not all(re.fullmatch(TOKEN_ID, key, re.ASCII) for key in value):
        raise PydanticCustomError("bias_key", 'keys must be token ids, such as "50256"')
    if not all(type(bias) in (int, float) and abs(bias) <= MAX_BIAS for bias in value.values()):
        raise PydanticCustomError(
            "bias_range", f"values must be numbers, {-MAX_BIAS} to {MAX_BIAS}"
        )
    return tuple((int(key), float(bias)) for key, bias in value.items())


def _limit_schema(schema: dict[str, Any], vocab_size: int) -> None:
    table = next(branch for branch in schema["anyOf"] if branch.get("type") == "object")
    (limits,) = table["patternProperties"].values()
    table["patternProperties"] = {f"^({_decimals_to(vocab_size - 1)})$": limits}


def _decimals_to(largest: int) -> str:
    """A pattern for the numbers 0 to ``largest``, which has at least two digits."""
    digits = str(largest)
    forms = ["0", f"[1-9][0-9]{{0,{len(digits) - 2}}}"]
    for place, digit in enumerate(digits):
        lowest = 1 if place == 0 else 0
        if int(digit) > lowest:
            tail = len(digits) - place - 1
            forms.append(f"{digits[:place]}[{lowest}-{int(digit) - 1}][0-9]{{{tail}}}")
    return "|".join([*forms, digits])


_Key = Annotated[str, Field(pattern=f"^({TOKEN_ID})$")]
_Bias = Annotated[float, Field(ge=-MAX_BIAS, le=MAX_BIAS)]
_Table = Annotated[
    dict[_Key, _Bias],
    Field(max_length=MAX_BIASES, json_schema_extra={"additionalProperties": False}),
]

FIELD: Biases = declare(
    (),
    "Maps a token id, as a text, to a number that is added to its logit before the penalties.",
    accepted=f"up to {MAX_BIASES} token ids, each with −{MAX_BIAS} to {MAX_BIAS}",
    body=Annotated[Biases, PlainValidator(_check, json_schema_input_type=_Table | None)],
    token_ids=lambda biases: (token for token, _ in biases),
    limit_schema=_limit_schema,
    locations=(LaneTable("biases"), IntegerColumn("BIASES", lambda biases, _: len(biases))),
)
