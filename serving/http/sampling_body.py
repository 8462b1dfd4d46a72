"""The sampling fields of request bodies, derived from the table in ``serving.sampling``."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache
from typing import Any, TypeVar, get_type_hints

from pydantic import BaseModel, Field, create_model

from serving.fields.definition import Definition, Endpoint
from serving.sampling import TABLE, SamplingParams

Model = TypeVar("Model", bound=BaseModel)

_TYPES = get_type_hints(SamplingParams)


def takes_sampling(endpoint: Endpoint) -> Callable[[type[Model]], type[Model]]:
    """Class decorator that adds every sampling field which the endpoint takes under its own name.

    The fields are optional; ``None`` stands for the table's default.
    """

    def extend(model: type[Model]) -> type[Model]:
        added: dict[str, Any] = {name: _body_field(name, one) for name, one in _taken_by(endpoint)}
        return create_model(
            model.__name__,
            __base__=model,
            __module__=model.__module__,
            __doc__=model.__doc__,
            **added,
        )

    return extend


def bounded(name: str) -> Any:
    """An optional integer within the bounds of a sampling field, for an endpoint that asks for the
    field under another name or with another default."""
    return Field(None, **TABLE[name].bounds.keywords())


def sampling_params(body: BaseModel, choice: int, **translated: Any) -> SamplingParams:
    """The parameters of one choice.

    Args:
        body: an instance of a model that ``takes_sampling``.
        choice: index among the choices of one prompt.
        translated: values of the fields that the endpoint asks for in its own way.
    """
    fields = _fields_of(type(body))
    values = {name: _value(one, getattr(body, name), choice) for name, one in fields}
    return SamplingParams(**values, **translated)


def field_outside_vocabulary(body: BaseModel, vocab_size: int) -> str | None:
    """Name of a field that holds a token id which the target does not have, if any does."""
    for name, one in _fields_of(type(body)):
        value = getattr(body, name)
        if one.token_ids is None or value is None:
            continue
        if any(token >= vocab_size for token in one.token_ids(value)):
            return name
    return None


def limit_schema(properties: dict[str, Any], vocab_size: int) -> None:
    """Write the vocabulary size into the JSON schema of a body's fields, in place."""
    for name, one in TABLE.items():
        if one.limit_schema is not None and name in properties:
            one.limit_schema(properties[name], vocab_size)


def _taken_by(endpoint: Endpoint) -> Iterator[tuple[str, Definition]]:
    return ((name, one) for name, one in TABLE.items() if endpoint in one.endpoints)


@cache
def _fields_of(model: type[BaseModel]) -> tuple[tuple[str, Definition], ...]:
    """The table's fields that a body has untranslated: those translated belong to no endpoint."""
    known = model.model_fields
    return tuple((name, one) for name, one in TABLE.items() if one.endpoints and name in known)


def _body_field(name: str, one: Definition) -> tuple[Any, Any]:
    """Annotation and default, as pydantic's ``create_model`` takes them."""
    annotation = _TYPES[name] | None if one.body is None else one.body
    description = one.doc
    if isinstance(one.default, float):
        description += f" null is {one.default:g}."
    return annotation, Field(None, description=description, **one.bounds.keywords())


def _value(one: Definition, given: Any, choice: int) -> Any:
    value = one.default
    if given is not None:
        value = given if one.from_body is None else one.from_body(given)
    return value if one.of_choice is None else one.of_choice(value, choice)
