"""GET /metrics, for Prometheus."""

from __future__ import annotations

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response

from serving.http.auth import USER
from serving.http.context import context_of
from serving.http.errors import documented
from serving.http.metrics import CONTENT_TYPE

router = APIRouter()


@router.get(
    "/metrics", dependencies=USER, response_class=PlainTextResponse, responses=documented(401)
)
async def metrics(request: Request) -> Response:
    """Counters and gauges in Prometheus' text format."""
    context = context_of(request)
    figures = await context.server.figures()
    return Response(context.metrics.render(figures), media_type=CONTENT_TYPE)
