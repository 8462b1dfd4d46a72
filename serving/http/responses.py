"""Helpers that several routes share."""

from __future__ import annotations

import json
import math
from typing import Any

from pydantic import BaseModel
from starlette.responses import Response

from serving.http.errors import ErrorBody
from serving.http.response_bodies import FinishReasonName
from serving.requests import Output

REFUSALS = (400, 401, 404, 408, 413, 415, 429, 503)
"""Error statuses of the routes that generate."""


def event_stream(chunk: type[BaseModel]) -> dict[str, Any]:
    """Streamed form of a 200, for ``responses=``: events with ``chunk``s, then [DONE]."""
    bodies = [{"$ref": f"#/components/schemas/{m.__name__}"} for m in (chunk, ErrorBody)]
    data = {
        "type": "string",
        "contentMediaType": "application/json",
        "contentSchema": {"anyOf": bodies},
    }
    schema = {
        "type": "object",
        "properties": {"data": {"anyOf": [{"const": "[DONE]"}, data]}},
        "required": ["data"],
    }
    return {
        "description": "The answer; with `stream` as server-sent events.",
        "content": {"text/event-stream": {"schema": schema}},
    }


def json_answer(model: BaseModel) -> Response:
    """A model as JSON, not validated again: the route's ``response_model`` only documents it."""
    return Response(model.model_dump_json(), media_type="application/json")


def reason_name(output: Output) -> FinishReasonName | None:
    """Finish reason as clients know it. Cancelled and failed choices have no answer."""
    reason = output.finish_reason
    assert reason != "cancelled" and reason != "error"
    return reason


def json_status(status: dict[str, Any]) -> Response:
    """A dict as JSON. NaN and infinities become null, other objects their ``str``."""
    return Response(json.dumps(finite(status), default=str), media_type="application/json")


def finite(value: Any) -> Any:
    """The same tree with string keys; floats that JSON lacks become ``None``."""
    if isinstance(value, dict):
        return {str(key): finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
