"""The routes that generate, without what FastAPI does for every request.

FastAPI resolves the dependencies of a route anew for each request, which takes half as long as all
that these routes do themselves, and every stream of the process waits for it. What a route here
declares is still what it does, and what /openapi.json says: its scope, its body and the header.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

from fastapi.routing import APIRoute
from starlette.requests import Request
from starlette.types import Receive, Scope, Send

from serving.http.auth import require_user
from serving.http.context import context_of
from serving.http.jobs import NO_CAPTURE

_HEADER = NO_CAPTURE.lower().encode()


class GenerationRoute(APIRoute):
    """A POST of scope ``user`` whose endpoint takes ``request``, ``body`` and ``no_capture``."""

    def __init__(self, path: str, endpoint: Callable[..., Any], **kwargs: Any) -> None:
        super().__init__(path, endpoint, **kwargs)
        taken = {one.name: one.call for one in self.dependant.dependencies}
        assert [one.dependency for one in self.dependencies] == [require_user], path
        assert self.methods == {"POST"} and set(taken) == {None, "body"}, path
        self._read: Callable[[Request], Awaitable[Any]] = taken["body"]  # type: ignore[assignment]

    async def handle(self, scope: Scope, receive: Receive, send: Send) -> None:
        no_capture = [value for name, value in scope["headers"] if name == _HEADER] or [b"0"]
        if scope["method"] != "POST" or no_capture[0] not in (b"0", b"1"):
            await super().handle(scope, receive, send)  # it knows how to refuse these
            return
        request = Request(scope, receive)
        await require_user(request, None)
        await context_of(request).turns.mine()
        body = await self._read(request)
        response = await self.endpoint(request, body, no_capture[0].decode())
        await response(scope, receive, send)
