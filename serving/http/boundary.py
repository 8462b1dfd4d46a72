"""The outermost layer: gives each request an id and logs every failure of the server."""

from __future__ import annotations

import asyncio
import re
import uuid

from starlette.datastructures import MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serving.http.errors import ApiError, internal, log_failure, unavailable

REQUEST_ID_HEADER = "X-Request-Id"
MAX_HEAD_BYTES = 16 << 10
_ACCEPTABLE_ID = re.compile(rb"[A-Za-z0-9._:-]{1,128}")


class Boundary:
    """Pure ASGI middleware, so that streams pass through unbuffered."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        request_id = request_id_of(scope)
        scope.setdefault("state", {})["request_id"] = request_id
        is_started = False

        async def send_with_id(message: Message) -> None:
            nonlocal is_started
            if message["type"] == "http.response.start":
                is_started = True
                MutableHeaders(scope=message)[REQUEST_ID_HEADER] = request_id
            await send(message)

        try:
            _check_head(scope)
            await self._app(_without_slash(scope), receive, send_with_id)
        except ApiError as error:
            await error.response()(scope, receive, send_with_id)
        except asyncio.CancelledError:  # the process ends, and did not wait for this request
            if not is_started:
                gone = unavailable("The server is shutting down and had to end this request.")
                await gone.response()(scope, receive, send_with_id)
        except Exception as error:  # the outermost handler that knows the request id
            log_failure(request_id, error)
            if not is_started:  # else the server drops the connection: the answer is incomplete
                await internal(request_id).response()(scope, receive, send_with_id)


def _without_slash(scope: Scope) -> Scope:
    """The scope with a path that does not end in a slash: ``/v1/models/`` is ``/v1/models``."""
    path = scope["path"]
    return {**scope, "path": path[:-1]} if len(path) > 1 and path.endswith("/") else scope


def _check_head(scope: Scope) -> None:
    """Limit the request line and headers. The HTTP parser limits incomplete ones only.

    Raises:
        ApiError: 431.
    """
    num_bytes = len(scope["raw_path"]) + len(scope["query_string"])
    num_bytes += sum(len(name) + len(value) for name, value in scope["headers"])
    if num_bytes > MAX_HEAD_BYTES:
        raise ApiError(431, f"Request line and headers exceed {MAX_HEAD_BYTES} bytes.")


def request_id_of(scope: Scope) -> str:
    """The caller's id if it is a plain word, for tracing through proxies; otherwise a new one."""
    given = [value for name, value in scope["headers"] if name == b"x-request-id"]
    if len(given) == 1 and _ACCEPTABLE_ID.fullmatch(given[0]):
        return str(given[0].decode())
    return uuid.uuid4().hex
