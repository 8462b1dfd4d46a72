"""Who may call what. A route declares its scope as a dependency; without one the app is not built.

No decision looks at the path or at the Host header: both can be forged past a prefix check
(CVE-2026-48710), a dependency cannot.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac
import ipaddress
from typing import Annotated, Any, Literal

from fastapi import Depends
from fastapi.routing import APIRoute
from fastapi.security import HTTPBearer
from starlette.requests import Request
from starlette.routing import BaseRoute

from serving.http.context import context_of
from serving.http.errors import ApiError

Scope = Literal["open", "user", "page", "admin"]

_documented = HTTPBearer(auto_error=False, description="`Authorization: Bearer <server.api_key>`")
_Documented = Annotated[Any, Depends(_documented)]
"""Puts the scheme into /openapi.json; the decision is ours."""


async def allow_everybody() -> None:
    """Scope ``open``: probes of a load balancer."""


async def require_user(request: Request, _: _Documented) -> None:
    """Scope ``user``: the bearer key, where one is set."""
    _require_key(request, _bearer_key(request), "Bearer")


async def require_page(request: Request, _: _Documented) -> None:
    """Scope ``page``: read-only pages; a browser may send the key as the Basic password."""
    key = _bearer_key(request)
    _require_key(request, key if key is not None else _basic_password(request), "Basic")


async def require_admin(request: Request, _: _Documented) -> None:
    """Scope ``admin``: the bearer key. Without a configured key, loopback clients that are no
    web page: any page that a local browser shows can reach 127.0.0.1."""
    if context_of(request).settings.server.api_key is None:
        _require_local_program(request)
    await require_user(request, None)


OPEN = [Depends(allow_everybody)]
USER = [Depends(require_user)]
PAGE = [Depends(require_page)]
ADMIN = [Depends(require_admin)]

_SCOPES: dict[Any, Scope] = {
    allow_everybody: "open",
    require_user: "user",
    require_page: "page",
    require_admin: "admin",
}


def scope_of(route: BaseRoute) -> Scope | None:
    """The one scope that a route declares; ``None`` when it declares none or several."""
    if not isinstance(route, APIRoute):
        return None
    found = [_SCOPES[d.dependency] for d in route.dependencies if d.dependency in _SCOPES]
    return found[0] if len(found) == 1 else None


def is_loopback(host: str) -> bool:
    """Whether an address of the configuration or of a client is this machine's own."""
    if host == "localhost":
        return True
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return False
    mapped = getattr(address, "ipv4_mapped", None)
    return (mapped or address).is_loopback


def _require_key(request: Request, given: bytes | None, scheme: str) -> None:
    wanted = context_of(request).settings.server.api_key
    if wanted is None:
        return
    if given is None or not _equal(given, wanted.encode()):
        raise ApiError(
            401,
            "Missing or wrong key: send 'Authorization: Bearer <server.api_key>'.",
            code="invalid_api_key",
            headers={"WWW-Authenticate": f'{scheme} realm="slipstream"'},
        )


def _equal(given: bytes, wanted: bytes) -> bool:
    """Constant-time in content and length: digests are compared."""
    digests = [hashlib.sha256(key).digest() for key in (given, wanted)]
    return hmac.compare_digest(*digests)


def _require_local_program(request: Request) -> None:
    client = request.client
    if client is None or not is_loopback(client.host):
        raise ApiError(403, "Admin routes need server.api_key.", code="key_required")
    if "origin" in request.headers:
        raise ApiError(
            403, "Admin routes do not answer web pages without server.api_key.", code="web_page"
        )


def _credentials(request: Request, scheme: bytes) -> bytes | None:
    """What follows ``scheme`` in the one Authorization header; several headers are none."""
    values = [value for name, value in request.headers.raw if name == b"authorization"]
    if len(values) != 1:
        return None
    given_scheme, _, credentials = values[0].partition(b" ")
    return credentials.strip(b" ") if given_scheme.lower() == scheme else None


def _bearer_key(request: Request) -> bytes | None:
    return _credentials(request, b"bearer")


def _basic_password(request: Request) -> bytes | None:
    credentials = _credentials(request, b"basic")
    if credentials is None:
        return None
    try:
        return base64.b64decode(credentials, validate=True).partition(b":")[2]
    except binascii.Error:
        return None
