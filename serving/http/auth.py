"""Access control. Each route declares its scope as a dependency; the app is not built if one does
not.

No decision depends on the path, and the Host header opens nothing: forged ones can bypass a prefix
check (CVE-2026-48710), but not a dependency. A Host that is not this machine closes pages and admin
routes that need no key: a web page whose name was made to lead to 127.0.0.1 (DNS rebinding) is of
the same origin as this server to a browser, and may read what it answers.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac
import ipaddress
import re
import socket
from functools import cache
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
"""Documents the scheme in /openapi.json; the check is our own."""


async def allow_everybody() -> None:
    """Scope ``open``: a load balancer's probes."""


async def require_user(request: Request, _: _Documented) -> None:
    """Scope ``user``: the bearer key, if one is configured."""
    _require_key(request, _bearer_key(request), "Bearer")


async def require_page(request: Request, _: _Documented) -> None:
    """Scope ``page``: read-only pages; a browser may send the key as the Basic password."""
    _require_own_host(request)
    key = _bearer_key(request)
    _require_key(request, key if key is not None else _basic_password(request), "Basic")


async def require_admin(request: Request, _: _Documented) -> None:
    """Scope ``admin``: the bearer key. If none is configured, loopback clients except web pages:
    any page in a local browser can reach 127.0.0.1."""
    if context_of(request).settings.server.api_key is None:
        _require_local_program(request)
    await require_user(request, None)


OPEN = [Depends(allow_everybody)]
USER = [Depends(require_user)]
PAGE = [Depends(require_page)]
ADMIN = [Depends(require_admin)]

_HOST = re.compile(r"(?:\[([0-9a-f:.]+)\]|([^\[\]:/@]+))(?::[0-9]*)?")

_SCOPES: dict[Any, Scope] = {
    allow_everybody: "open",
    require_user: "user",
    require_page: "page",
    require_admin: "admin",
}


def scope_of(route: BaseRoute) -> Scope | None:
    """The scope that a route declares; ``None`` if it declares none or several."""
    if not isinstance(route, APIRoute):
        return None
    found = [_SCOPES[d.dependency] for d in route.dependencies if d.dependency in _SCOPES]
    return found[0] if len(found) == 1 else None


def is_loopback(host: str) -> bool:
    """True for an address, configured or a client's, of this machine's loopback interface."""
    if host == "localhost":
        return True
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return False
    mapped = getattr(address, "ipv4_mapped", None)
    return (mapped or address).is_loopback


def _require_key(request: Request, given: bytes | None, scheme: str) -> None:
    expected = context_of(request).settings.server.api_key
    if expected is None:
        return
    if given is None or not _equal(given, expected.encode()):
        raise ApiError(
            401,
            "Missing or wrong key: send 'Authorization: Bearer <server.api_key>'.",
            code="invalid_api_key",
            headers={"WWW-Authenticate": f'{scheme} realm="slipstream"'},
        )


def _equal(given: bytes, expected: bytes) -> bool:
    """Compare digests, so that the time depends on neither content nor length."""
    digests = [hashlib.sha256(key).digest() for key in (given, expected)]
    return hmac.compare_digest(*digests)


def _require_local_program(request: Request) -> None:
    client = request.client
    if client is None or not is_loopback(client.host):
        raise ApiError(403, "Admin routes need server.api_key.", code="key_required")
    if "origin" in request.headers or request.headers.get("sec-fetch-site", "none") != "none":
        raise ApiError(
            403,
            "Admin routes do not answer web pages unless server.api_key is set.",
            code="web_page",
        )
    _require_own_host(request)


def _require_own_host(request: Request) -> None:
    """Refuse a name that is not this machine's, unless a key decides. A browser always sends the
    one that its page came from; programs of old may send none."""
    server = context_of(request).settings.server
    if server.api_key is not None:
        return
    own = {server.host.lower(), *_own_names()}
    for host in map(_host_of, request.headers.getlist("host")):
        if not is_loopback(host) and host not in own:
            raise ApiError(
                403,
                "The Host header names another machine. Use 127.0.0.1, localhost or this machine's "
                "name, or set server.api_key.",
                code="foreign_host",
            )


def _host_of(header: str) -> str:
    """The host in a Host header, without port and brackets; empty if it is none."""
    found = _HOST.fullmatch(header.strip().lower())
    return "" if found is None else (found[1] or found[2]).removesuffix(".")


@cache
def _own_names() -> frozenset[str]:
    """What this machine calls itself, without asking a name server."""
    name = socket.gethostname().lower()
    short = name.partition(".")[0]
    return frozenset((name, short, f"{short}.local", "localhost.localdomain")) - {""}


def _credentials(request: Request, scheme: bytes) -> bytes | None:
    """Credentials of the Authorization header under ``scheme``; ``None`` if there are several."""
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
