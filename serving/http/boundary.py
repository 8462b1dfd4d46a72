"""The outermost layer: gives each request an id and logs every failure of the server."""

from __future__ import annotations

import asyncio
import re

from starlette.datastructures import MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serving.http.errors import ApiError, internal, log_failure, unavailable
from serving.http.ids import new_id

REQUEST_ID_HEADER = "X-Request-Id"
MAX_HEAD_BYTES = 16 << 10
_ABSOLUTE = re.compile(r"https?://[^/]*", re.IGNORECASE)
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
            await self._app(_usual(scope), receive, send_with_id)
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


def _usual(scope: Scope) -> Scope:
    """The scope as routes know it.

    - ``/v1/models/`` is ``/v1/models``.
    - A target with scheme and host, as clients behind a proxy send it, is its path (RFC 9112,
      Section 3.2.2).
    - HEAD is GET; the HTTP server leaves the body of its answer out (RFC 9110, Section 9.3.2).
    """
    path = scope["path"]
    if (whole := _ABSOLUTE.match(path)) is not None:
        path = path[whole.end() :] or "/"
    if len(path) > 1 and path.endswith("/"):
        path = path[:-1]
    method = "GET" if scope["method"] == "HEAD" else scope["method"]
    return {**scope, "path": path, "method": method}


def _check_head(scope: Scope) -> None:
    """Limit the request line and headers. The HTTP parser limits incomplete ones only.

    Raises:
        ApiError: 431; 400 for a body of two lengths, of which a proxy in front may believe the
            other (RFC 9112, Section 6.3).
    """
    names = {name for name, _ in scope["headers"]}
    if b"transfer-encoding" in names and (
        b"content-length" in names or scope["http_version"] == "1.0"
    ):
        raise ApiError(
            400,
            "Send either Content-Length or, in HTTP/1.1, Transfer-Encoding.",
            code="invalid_http",
            headers={"Connection": "close"},
        )
    num_bytes = len(scope["raw_path"]) + len(scope["query_string"])
    num_bytes += sum(len(name) + len(value) for name, value in scope["headers"])
    if num_bytes > MAX_HEAD_BYTES:
        raise ApiError(431, f"Request line and headers exceed {MAX_HEAD_BYTES} bytes.")


def request_id_of(scope: Scope) -> str:
    """The caller's id if it is a plain word, for tracing through proxies; otherwise a new one."""
    given = [value for name, value in scope["headers"] if name == b"x-request-id"]
    if len(given) == 1 and _ACCEPTABLE_ID.fullmatch(given[0]):
        return str(given[0].decode())
    return new_id()
