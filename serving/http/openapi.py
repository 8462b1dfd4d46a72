"""/openapi.json, completed with the request bodies that FastAPI does not see and the limits that
follow from the settings."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from pydantic import BaseModel
from pydantic.json_schema import JsonSchemaMode, models_json_schema

from serving.http.context import Context
from serving.http.request_bodies import ChatRequest, CompletionRequest, NoFields, SwapRequest
from serving.http.response_bodies import ChatChunk
from serving.http.sampling_body import limit_schema

_REFERENCE = "#/components/schemas/{model}"
_BODIES = (CompletionRequest, ChatRequest, SwapRequest, NoFields)


def build_schema(app: FastAPI, context: Context) -> dict[str, Any]:
    schema = get_openapi(
        title="Slipstream",
        version="1",
        description="Speculative decoding that tunes itself to its own traffic.",
        routes=app.routes,
    )
    unseen: list[tuple[type[BaseModel], JsonSchemaMode]] = [(m, "validation") for m in _BODIES]
    unseen.append((ChatChunk, "serialization"))
    _, models = models_json_schema(unseen, ref_template=_REFERENCE)
    schema["components"]["schemas"] |= models["$defs"]
    _add_limits(schema["components"]["schemas"], context)
    for path in schema["paths"].values():
        for operation in path.values():
            _correct(operation, context)
    for model in ("HTTPValidationError", "ValidationError"):
        schema["components"]["schemas"].pop(model, None)
    return schema


def _correct(operation: dict[str, Any], context: Context) -> None:
    """Undo FastAPI's assumptions: that invalid parameters are 422, that errors have the media type
    of the answer, and that a key is required if none is configured."""
    responses = operation["responses"]
    responses.pop("422", None)
    for status, response in responses.items():
        if int(status) >= 400 and "application/json" not in response["content"]:
            response["content"] = {"application/json": response["content"].popitem()[1]}
    if context.settings.server.api_key is None:
        operation.pop("security", None)


def _add_limits(models: dict[str, Any], context: Context) -> None:
    """Write the limits that ``jobs.py`` checks into the models."""
    served, server = context.server.model, context.settings.server
    for model in ("CompletionRequest", "ChatRequest"):
        fields = models[model]["properties"]
        _integer(fields["n"])["maximum"] = server.max_choices
        _branch(fields["model"], "string")["enum"] = [served.model_name]
        for name in ("max_tokens", "max_completion_tokens"):
            if name in fields:
                _integer(fields[name])["maximum"] = served.max_model_len
        limit_schema(fields, served.vocab_size)
    speculation = models["SpeculationOptions"]["properties"]
    _integer(speculation["max_draft"])["maximum"] = served.max_draft
    _limit_choice(speculation, served.drafters)
    for branch in models["CompletionRequest"]["properties"]["prompt"]["anyOf"]:
        _limit_prompt(branch, context)


def _limit_choice(speculation: dict[str, Any], kinds: tuple[str, ...] | None) -> None:
    """``speculation.drafters``: these kinds, or null alone if requests may not choose."""
    if kinds is None:
        speculation["drafters"]["anyOf"] = [{"type": "null"}]
    else:
        _branch(speculation["drafters"], "array")["items"]["enum"] = list(kinds)


def _limit_prompt(branch: dict[str, Any], context: Context) -> None:
    """Bounds of one of the four forms of ``prompt``."""
    if branch["type"] == "string":
        branch["minLength"] = 1
        return
    items = branch["items"]
    if items["type"] == "integer":
        items["maximum"] = context.server.model.vocab_size - 1
        branch["maxItems"] = context.server.model.max_model_len
        return
    branch["maxItems"] = context.settings.engine.max_queue
    _limit_prompt(items, context)


def _integer(field: dict[str, Any]) -> dict[str, Any]:
    return _branch(field, "integer")


def _branch(field: dict[str, Any], kind: str) -> dict[str, Any]:
    """The non-null alternative of a nullable field."""
    found: dict[str, Any] = next(b for b in field["anyOf"] if b.get("type") == kind)
    return found
