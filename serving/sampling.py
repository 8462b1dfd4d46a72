"""The table of sampling fields: everything that a request can specify about choosing its tokens.

``SamplingParams`` is the table. A new field is one line in it; a definition that needs code of its
own is a file in ``serving/fields/`` that the line names through ``defined_in``. The table
determines

- the request bodies and their limits, /openapi.json included (``serving.http.sampling_body``),
- the columns of the lanes on the device (``lane_integers``, ``lane_reals``, ``table_row``),
- what a trace keeps (``trace_values``),
- the documentation: ``python -m serving.sampling`` prints the table of ``docs/operations.md``.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from types import MappingProxyType

from buffer.records import SamplingValue
from serving.fields.definition import (
    METADATA_KEY,
    Definition,
    IntegerColumn,
    LaneTable,
    RealColumn,
    declare,
    defined_in,
)

GREEDY_BELOW = 1e-5
"""Temperatures below it are greedy, as in vLLM: dividing logits by them would overflow."""
MAX_INT32 = 2**31 - 1
MAX_INT64 = 2**63 - 1

_REAL = (RealColumn(),)
_TOP_K = (IntegerColumn("TOP_K", lambda k, vocab_size: min(k or vocab_size, vocab_size)),)
_PENALTY = (LaneTable("penalties"), IntegerColumn("PENALIZES", lambda value, _: value != 0))
_REPETITION = (LaneTable("penalties"), IntegerColumn("PENALIZES", lambda value, _: value != 1))


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How to choose tokens and when to stop. HTTP checks the bounds; other callers must respect
    them."""

    temperature: float = declare(
        1.0,
        "Divides the logits; 0 (and anything below 1e-5) is greedy.",
        at_least=0,
        at_most=2,
        from_body=lambda value: 0.0 if value < GREEDY_BELOW else value,
        locations=_REAL,
        in_trace=True,
    )
    top_p: float = declare(
        1.0,
        "Keeps the smallest set of most probable tokens whose probabilities add up to it.",
        at_least=1e-6,
        at_most=1,
        locations=_REAL,
        in_trace=True,
    )
    top_k: int | None = declare(
        None,
        "Keeps this number of most probable tokens; null is no limit.",
        at_least=1,
        at_most=MAX_INT32,
        accepted="1 or more",
        locations=_TOP_K,
        in_trace=True,
    )
    min_p: float = declare(
        0.0,
        "Excludes tokens whose probability is below this share of the most probable token's.",
        at_least=0,
        below=1,
        locations=_REAL,
        in_trace=True,
    )
    seed: int | None = declare(
        None,
        "The same seed and prompt give the same completion; choice i uses seed + i.",
        at_least=-MAX_INT64 - 1,
        at_most=MAX_INT64,
        accepted="a signed 64-bit integer",
        of_choice=lambda seed, choice: None if seed is None else _wrapped(seed + choice),
        in_trace=True,
    )
    max_tokens: int = declare(
        16,
        "Most completion tokens. Chat also takes it as `max_completion_tokens` and defaults to all "
        "that fit.",
        at_least=0,
        accepted="0 or more; with the prompt at most `engine.max_model_len`",
        endpoints=(),
    )
    stop: tuple[str, ...] = defined_in("serving.fields.stop")
    stop_token_ids: tuple[int, ...] = defined_in("serving.fields.stop_token_ids")
    include_stop_str_in_output: bool = declare(
        False,
        "Keep the text of the stop string or stop token that ended the completion, as in vLLM. A "
        "special token has text only if `skip_special_tokens` is false or a stop string spells it.",
    )
    ignore_eos: bool = declare(False, "Continue after the target's own end-of-text token.")
    skip_special_tokens: bool = declare(
        True,
        "Leave special tokens out of the text. A stop string that contains the text of one still "
        "matches it.",
    )
    logprobs: int | None = declare(
        None,
        "Most probable alternatives to report for each token, by the target's own distribution: "
        "before bias, penalties, temperature and truncation, as in vLLM. Chat takes `logprobs: "
        "true` and the number as `top_logprobs`.",
        at_least=0,
        at_most=20,
        endpoints=(),
    )
    presence_penalty: float = declare(
        0.0,
        "Subtracted from the logit of every token that occurs in the completion.",
        at_least=-2,
        at_most=2,
        locations=_PENALTY,
    )
    frequency_penalty: float = declare(
        0.0,
        "Subtracted from a token's logit once for each time it occurs in the completion.",
        at_least=-2,
        at_most=2,
        locations=_PENALTY,
    )
    repetition_penalty: float = declare(
        1.0,
        "Divides the logits above 0, and multiplies the others, of tokens that occur in prompt or "
        "completion, as in vLLM.",
        at_least=0.01,  # between these two no logit becomes infinite
        at_most=100,
        locations=_REPETITION,
    )
    logit_bias: tuple[tuple[int, float], ...] = defined_in("serving.fields.logit_bias")
    cache_salt: str | None = defined_in("serving.fields.cache_salt")
    domain: str | None = defined_in("serving.fields.domain")

    @property
    def penalizes(self) -> bool:
        """The logits depend on which tokens occurred before, and how often."""
        penalties = (self.presence_penalty, self.frequency_penalty, self.repetition_penalty)
        return penalties != (0, 0, 1)

    @property
    def adjusts_logits(self) -> bool:
        """The target's logits are changed before they become a distribution."""
        return bool(self.logit_bias) or self.penalizes


TABLE: MappingProxyType[str, Definition] = MappingProxyType(
    {one.name: one.metadata[METADATA_KEY] for one in dataclasses.fields(SamplingParams)}
)
"""Name of each field -> its definition, in the table's order."""

_INTEGERS = tuple(
    (name, location)
    for name, definition in TABLE.items()
    for location in definition.locations
    if isinstance(location, IntegerColumn)
)
_REALS = tuple(
    name
    for name, definition in TABLE.items()
    if any(isinstance(location, RealColumn) for location in definition.locations)
)
_TRACED = tuple(name for name, definition in TABLE.items() if definition.in_trace)

LANE_INTEGERS = tuple(dict.fromkeys(column.name for _, column in _INTEGERS))
"""Names of the integer columns, each once."""
LANE_REALS = _REALS
"""Names of the real columns. The kernels read the first three by position."""
assert LANE_REALS[:3] == ("temperature", "top_p", "min_p")


def lane_integers(params: SamplingParams, vocab_size: int) -> tuple[int, ...]:
    """Values of ``LANE_INTEGERS`` for one request."""
    values = dict.fromkeys(LANE_INTEGERS, 0)
    for name, column in _INTEGERS:
        value = int(column.value(getattr(params, name), vocab_size))
        values[column.name] = max(values[column.name], value)
    return tuple(values.values())


def lane_reals(params: SamplingParams) -> tuple[float, ...]:
    """Values of ``LANE_REALS`` for one request."""
    return tuple(getattr(params, name) for name in _REALS)


def table_row(params: SamplingParams, table: str) -> tuple[float, ...]:
    """Values of the fields that are in one ``LaneTable``, in the table's order."""
    place = LaneTable(table)
    return tuple(getattr(params, name) for name, one in TABLE.items() if place in one.locations)


def trace_values(params: SamplingParams) -> dict[str, SamplingValue]:
    """What a trace keeps of one request, by name of the field."""
    return {name: getattr(params, name) for name in _TRACED}


def documentation() -> str:
    """The table in Markdown, as ``docs/operations.md`` has it."""
    lines = ["| field | default | accepted | meaning |", "|---|---|---|---|"]
    for name, one in TABLE.items():
        accepted = one.accepted or str(one.bounds) or "true or false"
        lines.append(f"| `{name}` | {_shown(one.default)} | {accepted} | {one.doc} |")
    return "\n".join(lines) + "\n"


def _shown(default: object) -> str:
    if default is None or default == ():
        return "none"
    return str(default).lower()


if __name__ == "__main__":
    print(documentation(), end="")


def _wrapped(seed: int) -> int:
    """A seed of 64 bits with its sign: that of a later choice may be one above the largest."""
    return (seed + 2**63) % 2**64 - 2**63
