"""The outermost layer of a request: it gets an id, and no failure of ours gets out unspoken."""

from __future__ import annotations

import re
import uuid

from starlette.datastructures import MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serving.http.errors import internal, log_failure

REQUEST_ID_HEADER = "X-Request-Id"
_ACCEPTABLE_ID = re.compile(rb"[A-Za-z0-9._:-]{1,128}")


class Boundary:
    """Pure ASGI, so that streams pass through untouched."""

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
            await self._app(scope, receive, send_with_id)
        except Exception as error:  # the outermost place that knows the request
            log_failure(request_id, error)
            if not is_started:  # else the server drops the connection, for the answer is cut short
                await internal(request_id).response()(scope, receive, send_with_id)


def request_id_of(scope: Scope) -> str:
    """The caller's own id if it is a plain word, for tracing through proxies; else a fresh one."""
    given = [value for name, value in scope["headers"] if name == b"x-request-id"]
    if len(given) == 1 and _ACCEPTABLE_ID.fullmatch(given[0]):
        return str(given[0].decode())
    return uuid.uuid4().hex
