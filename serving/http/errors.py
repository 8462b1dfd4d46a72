"""Errors in OpenAI's format: {"error": {"message", "type", "param", "code"}}.

A message tells the caller what to change. It never contains text or tokens of a prompt; internal
failures are answered with a fixed text and the request id, and the log has the details.
"""

from __future__ import annotations

import difflib
import logging
import traceback
from collections.abc import Iterable, Sequence
from typing import Any

from pydantic import BaseModel
from pydantic_core import ErrorDetails
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response

from serving.requests import ENGINE_GONE

logger = logging.getLogger("serving.http")

INTERNAL_MESSAGE = "The server failed on this request; its log has the details."
CLIENT_GONE_STATUS = 499
"""Status of a response to a client that disconnected."""

_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    429: "rate_limit_error",
    500: "server_error",
    503: "service_unavailable_error",
}


class ErrorDetail(BaseModel):
    message: str
    type: str
    param: str | None
    """Dotted path of the invalid field."""
    code: str | None


class ErrorBody(BaseModel):
    """Body of every error response."""

    error: ErrorDetail


class ApiError(Exception):
    """An error to send to the client."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        code: str | None = None,
        param: str | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.headers = headers
        kind = _TYPES.get(status, "invalid_request_error")
        self.body = ErrorBody(error=ErrorDetail(message=message, type=kind, param=param, code=code))

    def response(self) -> Response:
        return JSONResponse(self.body.model_dump(), status_code=self.status, headers=self.headers)


def invalid(message: str, *, param: str | None = None, code: str = "invalid_value") -> ApiError:
    """400: the caller must change the request."""
    return ApiError(400, message, param=param, code=code)


def overloaded(message: str) -> ApiError:
    """429: the same request may succeed shortly."""
    return ApiError(429, message, code="queue_full", headers={"Retry-After": "1"})


def unavailable(message: str) -> ApiError:
    """503: this server is shutting down; another may answer."""
    return ApiError(503, message, code="draining", headers={"Retry-After": "1"})


def engine_gone() -> ApiError:
    """503: the engine does not run any more; the server is about to end."""
    return ApiError(
        503,
        "The engine has stopped; this server ends. Retry the request.",
        code=ENGINE_GONE,
        headers={"Retry-After": "1"},
    )


def internal(request_id: str) -> ApiError:
    """500 with a fixed text."""
    return ApiError(500, f"{INTERNAL_MESSAGE} Request id: {request_id}", code="internal_error")


def failed(message: str, code: str) -> ApiError:
    """500 that says what failed. OpenAI's clients repeat a request after other 500s; this one would
    most likely fail again."""
    return ApiError(500, message, code=code, headers={"x-should-retry": "false"})


def log_failure(request_id: str, error: BaseException) -> None:
    """Log the traceback without the exception's text, which may quote a prompt."""
    frames = "".join(traceback.format_tb(error.__traceback__))
    logger.error("request %s failed: %s\n%s", request_id, type(error).__qualname__, frames)


def documented(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """``responses=`` of a route: its own error statuses and those that every route has."""
    return {status: {"model": ErrorBody} for status in sorted({*statuses, 431, 500})}


def from_validation(first: ErrorDetails, model: type[BaseModel]) -> ApiError:
    """The error for an invalid body. Does not quote its values."""
    loc = first["loc"]
    param = ".".join(printable(str(part)) for part in loc)
    if first["type"] == "extra_forbidden":
        return _unknown_field(str(loc[-1]), param, _known_fields(model, loc[:-1]))
    if first["type"] == "missing":
        return invalid(f"{param}: this field is required", param=param, code="missing_field")
    if not loc:
        return invalid(f"the body: {first['msg']}")
    code = "unsupported_field" if first["type"] == "unsupported_field" else "invalid_value"
    return invalid(f"{param}: {first['msg']}", param=param, code=code)


def printable(word: str, limit: int = 64) -> str:
    """A client's word, shortened, without control characters and lone surrogates."""
    return ascii(word[:limit])[1:-1]


def _unknown_field(name: str, param: str, known: Sequence[str]) -> ApiError:
    close = difflib.get_close_matches(name[:64], known, n=1)
    hint = f"; did you mean '{close[0]}'?" if close else ""
    return invalid(f"unknown field '{param}'{hint}", param=param, code="unknown_field")


def _known_fields(model: type[BaseModel], loc: Iterable[int | str]) -> list[str]:
    """Field names of the object at ``loc``; list indices are skipped."""
    for name in (part for part in loc if isinstance(part, str)):
        model = _model_in(model.model_fields[name].annotation)
    return list(model.model_fields)


def _model_in(annotation: Any) -> type[BaseModel]:
    """The one model named in an annotation such as ``Inner | None`` or ``list[Inner]``."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next(_model_in(part) for part in annotation.__args__ if part is not type(None))


async def on_api_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    return error.response()


async def on_http_exception(request: Request, error: Exception) -> Response:
    """Starlette's own errors: unknown path, wrong method."""
    assert isinstance(error, HTTPException)
    texts = {404: "No such route.", 405: "This route does not answer this method."}
    text = texts.get(error.status_code, str(error.detail))
    headers = dict(error.headers) if error.headers else None
    return ApiError(error.status_code, text, headers=headers).response()


async def on_engine_gone(request: Request, error: Exception) -> Response:
    return engine_gone().response()


async def on_client_gone(request: Request, error: Exception) -> Response:
    assert isinstance(error, ClientDisconnect)
    return Response(status_code=CLIENT_GONE_STATUS)
