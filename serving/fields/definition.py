"""The definition of one sampling field, from which everything else about it is derived.

HTTP bodies, OpenAPI, validation, the lanes on the device, traces and the documentation read a
``Definition``; none of them names a field.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any, Literal, TypeVar

Endpoint = Literal["completions", "chat"]
ENDPOINTS: tuple[Endpoint, ...] = ("completions", "chat")
METADATA_KEY = "definition"
"""Metadata key under which a dataclass field keeps its ``Definition``."""
VISIBLE = r"^[^\x00-\x1f\x7f-\x9f\u200b-\u200f\u2028-\u202e\u2066-\u2069\ufeff]+$"
"""Excludes invisible and control characters: an operator's terminal may show the text."""
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class IntegerColumn:
    """A row of the lanes' int64 state. Fields that name the same column share it; it then holds the
    largest of their values."""

    name: str
    """A member of ``specops.lanes.Field``, or a new name for a row after those."""
    value: Callable[[Any, int], int] = lambda value, vocab_size: int(value)
    """(value of the field, vocabulary size) -> what the device reads."""


@dataclass(frozen=True, slots=True)
class RealColumn:
    """A row of the lanes' float32 state, named after its field."""


@dataclass(frozen=True, slots=True)
class LaneTable:
    """A table with one row for each lane, written only for requests that use it."""

    name: str


Location = IntegerColumn | RealColumn | LaneTable


@dataclass(frozen=True, slots=True)
class Bounds:
    """Limits of a number; ``None`` means no limit on that side."""

    at_least: float | None = None
    above: float | None = None
    at_most: float | None = None
    below: float | None = None

    def keywords(self) -> dict[str, Any]:
        """The limits under pydantic's names."""
        limits = {"ge": self.at_least, "gt": self.above, "le": self.at_most, "lt": self.below}
        return {name: limit for name, limit in limits.items() if limit is not None}

    def __str__(self) -> str:
        if self.at_least is not None and self.at_most is not None:
            return f"{self.at_least:g} to {self.at_most:g}"
        signs = (("≥", self.at_least), (">", self.above), ("≤", self.at_most), ("<", self.below))
        return ", ".join(f"{sign} {limit:g}" for sign, limit in signs if limit is not None)


@dataclass(frozen=True, slots=True)
class Definition:
    """One sampling field. Its name and type are those of its line in the table."""

    default: Any
    """Value of a request that leaves the field out or sends null."""
    doc: str
    """What it does, in one or two sentences; shown in /openapi.json and in the documentation."""
    bounds: Bounds
    accepted: str | None
    """The accepted values in words, for the documentation; ``None``: the bounds suffice."""
    endpoints: tuple[Endpoint, ...]
    """Endpoints whose body takes the field under its own name. The others, if any, take it under
    another name, which their route translates."""
    body: Any
    """Pydantic annotation of the field in a body; ``None``: follows from its type and bounds."""
    from_body: Callable[[Any], Any] | None
    """Turns the body's value into the field's; ``None``: they are the same."""
    of_choice: Callable[[Any, int], Any] | None
    """(value, index of the choice) -> value, for fields that differ between the choices of one
    prompt."""
    token_ids: Callable[[Any], Iterable[int]] | None
    """Token ids that a value names; each must be in the target's vocabulary."""
    limit_schema: Callable[[dict[str, Any], int], None] | None
    """Writes the vocabulary size into the field's JSON schema, in place."""
    locations: tuple[Location, ...]
    """Where the device reads it; empty for a field that only the host reads."""
    in_trace: bool
    """Traces keep it. Such a value is a number, a short string, a bool or ``None``."""


def declare(
    default: T,
    doc: str,
    *,
    at_least: float | None = None,
    above: float | None = None,
    at_most: float | None = None,
    below: float | None = None,
    accepted: str | None = None,
    endpoints: tuple[Endpoint, ...] = ENDPOINTS,
    body: Any = None,
    from_body: Callable[[Any], Any] | None = None,
    of_choice: Callable[[Any, int], Any] | None = None,
    token_ids: Callable[[Any], Iterable[int]] | None = None,
    limit_schema: Callable[[dict[str, Any], int], None] | None = None,
    locations: tuple[Location, ...] = (),
    in_trace: bool = False,
) -> T:
    """Define a sampling field; the arguments are those of ``Definition``.

    Returns:
        A dataclass field with that default, typed as the default so that mypy compares it with the
        field's annotation.
    """
    definition = Definition(
        default=default,
        doc=doc,
        bounds=Bounds(at_least, above, at_most, below),
        accepted=accepted,
        endpoints=endpoints,
        body=body,
        from_body=from_body,
        of_choice=of_choice,
        token_ids=token_ids,
        limit_schema=limit_schema,
        locations=locations,
        in_trace=in_trace,
    )
    return field(default=default, metadata={METADATA_KEY: definition})


def defined_in(module: str) -> Any:
    """The field that a module defines as ``FIELD``: a definition that takes more than one line."""
    return import_module(module).FIELD
