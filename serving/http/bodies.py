"""Reading and parsing request bodies. Each limit is checked before the work that it bounds."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, NoReturn, TypeVar

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails
from starlette.requests import Request

from serving.http.context import context_of
from serving.http.errors import ApiError, from_validation, invalid

MAX_DEPTH = 32
"""Deepest nesting of arrays and objects in a body."""
BODY_S = 30.0
"""Time a client may take to send a body, seconds."""
INLINE_BYTES = 32 << 10
"""Larger bodies are parsed on a thread: 1 MiB of token ids takes 50 ms."""

_STRING_OR_BRACKET = re.compile(rb'"(?:[^"\\]|\\.?)*+"?|[\[\]{}]', re.DOTALL)
"""A string, including one without an end: rescanning it from each quote would be quadratic."""
_UTF_8 = {"charset=utf-8", "charset=utf8"}
_SURROGATE_ESCAPE = re.compile(r"\\u[dD][89a-fA-F]")

Model = TypeVar("Model", bound=BaseModel)


def json_body(model: type[Model]) -> Callable[[Request], Awaitable[Model]]:
    """A dependency that reads the request's body as ``model``.

    It runs after the check of the route's scope, so no body is parsed for a client without a key;
    FastAPI would read its own body parameters first.
    """

    async def read(request: Request) -> Model:
        if _has_body(request):
            _check_content_type(request)
        body = await read_body(request, context_of(request).settings.server.max_body_bytes)
        if len(body) <= INLINE_BYTES:
            return parse_body(body, model)
        return await asyncio.to_thread(parse_body, body, model)

    return read


def body_schema(model: type[BaseModel], required: bool = True) -> dict[str, Any]:
    """``openapi_extra=`` of a route that reads ``model`` through ``json_body``."""
    reference = {"$ref": f"#/components/schemas/{model.__name__}"}
    content = {"application/json": {"schema": reference}}
    return {"requestBody": {"required": required, "content": content}}


async def read_body(request: Request, max_bytes: int) -> bytes:
    """The whole body.

    Raises:
        ApiError: 413 above ``max_bytes``, 408 when the client takes longer than ``BODY_S``.
        ClientDisconnect: the client left.
    """
    announced = request.headers.get("content-length", "0")
    if int(announced) > max_bytes:
        raise _too_large(max_bytes)
    body = bytearray()
    try:
        async with asyncio.timeout(BODY_S):
            async for chunk in request.stream():
                body += chunk
                if len(body) > max_bytes:
                    raise _too_large(max_bytes)
    except TimeoutError:
        raise ApiError(408, f"The body did not arrive within {BODY_S:.0f} s.") from None
    return bytes(body)


def parse_body(body: bytes, model: type[Model]) -> Model:
    """Check a body against ``model``; an empty one stands for {}.

    Raises:
        ApiError: 400 that names the first field at fault.
    """
    value = parse_json(body) if body else {}
    if not isinstance(value, dict):
        raise invalid("the body must be a JSON object", code="invalid_json")
    try:
        return model.model_validate(value)
    except ValidationError as error:
        details = error.errors(include_url=False, include_context=False, include_input=False)
        raise from_validation(_first(details), model) from None


def _first(details: Sequence[ErrorDetails]) -> ErrorDetails:
    """What to tell the caller: a feature that is missing rather than a value beside it, such as
    ``tool_calls`` rather than the content that a message with calls does not have."""
    missing = (error for error in details if error["type"] == "unsupported_field")
    return next(missing, details[0])


def parse_json(body: bytes) -> Any:
    """Strict JSON: UTF-8, at most ``MAX_DEPTH`` deep, no NaN or Infinity, no lone surrogates.

    Raises:
        ApiError: 400.
    """
    if _depth_exceeds(body, MAX_DEPTH):
        raise invalid(f"the body nests deeper than {MAX_DEPTH} levels", code="invalid_json")
    try:
        text = body.decode()
        value = json.loads(text, parse_constant=_refuse_constant, parse_float=_number)
        if _SURROGATE_ESCAPE.search(text):
            json.dumps(value, ensure_ascii=False).encode()
    except UnicodeDecodeError:
        raise invalid("the body is not valid UTF-8", code="invalid_json") from None
    except UnicodeEncodeError:
        raise invalid("the body holds half a surrogate pair", code="invalid_json") from None
    except json.JSONDecodeError as error:
        place = f"line {error.lineno}, column {error.colno}"
        raise invalid(
            f"the body is not JSON: {error.msg} at {place}", code="invalid_json"
        ) from None
    except ValueError:  # an integer of more than 4,300 digits
        raise invalid("the body holds a number that is too long", code="invalid_json") from None
    return value


def _depth_exceeds(body: bytes, limit: int) -> bool:
    if body.count(b"[") + body.count(b"{") <= limit:  # nearly always
        return False
    depth = 0
    for match in _STRING_OR_BRACKET.finditer(body):
        token = match.group()[:1]
        if token in b"[{":
            depth += 1
            if depth > limit:
                return True
        elif token in b"]}":
            depth -= 1
    return False


def _number(text: str) -> float:
    """JSON has one type of number: 3.0 is the integer 3."""
    value = float(text)
    return int(value) if value.is_integer() else value


def _refuse_constant(name: str) -> NoReturn:
    raise invalid(f"the body holds {name}, which is not JSON", code="invalid_json")


def _has_body(request: Request) -> bool:
    """Whether a body is announced; without one, its type does not matter."""
    headers = request.headers
    return "transfer-encoding" in headers or headers.get("content-length", "0") != "0"


def _check_content_type(request: Request) -> None:
    """Accept JSON only: a web page cannot send it to another origin without a preflight request."""
    given = request.headers.get("content-type", "")
    kind, *parameters = given.lower().replace('"', "").split(";")
    charsets = [word.strip() for word in parameters if word.strip().startswith("charset=")]
    if kind.strip() != "application/json" or not set(charsets) <= _UTF_8:
        raise ApiError(415, "Send the body as 'Content-Type: application/json'.")
    if request.headers.get("content-encoding", "identity").lower() != "identity":
        raise ApiError(415, "Send the body without Content-Encoding.")


def _too_large(max_bytes: int) -> ApiError:
    return ApiError(
        413, f"The body is larger than server.max_body_bytes ({max_bytes}).", code="body_too_large"
    )
