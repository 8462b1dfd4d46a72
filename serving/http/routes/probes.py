"""GET /health and /ready: open to everybody, for load balancers."""

from __future__ import annotations

from typing import Literal

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from serving.http.auth import OPEN
from serving.http.context import context_of
from serving.http.errors import documented
from serving.http.response_bodies import Health, Readiness
from serving.http.responses import json_answer

router = APIRouter()


@router.get("/health", dependencies=OPEN, responses=documented())
async def health() -> Health:
    """The process is alive; it may be draining."""
    return Health(status="alive")


@router.get(
    "/ready",
    dependencies=OPEN,
    response_model=Readiness,
    responses={503: {"model": Readiness}, **documented()},
)
async def ready(request: Request) -> Response:
    """200 when a model is loaded, the server is not draining, and the last requests did not all end
    in NaN or infinity; else 503 with the reason. A swap does not change it."""
    reason = await context_of(request).server.complaint()
    status: Literal["ready", "not ready"] = "ready" if reason is None else "not ready"
    answer = json_answer(Readiness(status=status, reason=reason))
    answer.status_code = 200 if reason is None else 503
    return answer
