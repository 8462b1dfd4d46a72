"""GET /openapi.json."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter
from starlette.requests import Request

from serving.http.auth import USER
from serving.http.context import context_of
from serving.http.errors import documented
from serving.http.openapi import build_schema

router = APIRouter()


@router.get("/openapi.json", dependencies=USER, responses=documented(401))
async def openapi(request: Request) -> dict[str, Any]:
    """This API, with the limits of this server."""
    return build_schema(request.app, context_of(request))
