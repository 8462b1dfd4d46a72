"""GET /dashboard: one page for people, and the data that it polls."""

from __future__ import annotations

import asyncio
import time
from dataclasses import asdict
from importlib import resources
from typing import Annotated, Any

from fastapi import APIRouter, Query
from starlette.requests import Request
from starlette.responses import HTMLResponse, Response

from configs.version import package_version
from serving.history import SAMPLE_FIELDS
from serving.http.auth import PAGE
from serving.http.context import context_of
from serving.http.errors import documented
from serving.http.response_bodies import ArmSteps, DashboardData
from serving.http.responses import finite, json_answer
from serving.http.routes.models import target_label
from serving.requests import EngineFigures

router = APIRouter()

_PAGE = resources.files("serving.http").joinpath("dashboard.html").read_text(encoding="utf-8")
_HEADERS = {
    "Content-Security-Policy": (
        "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; "
        "connect-src 'self'; img-src data:; frame-ancestors 'none'; base-uri 'none'"
    ),
    "X-Content-Type-Options": "nosniff",
    "Cache-Control": "no-cache",
}


@router.get(
    "/dashboard",
    dependencies=PAGE,
    response_class=HTMLResponse,
    responses=documented(401),
)
async def dashboard() -> Response:
    """The page. It loads nothing from other hosts."""
    return HTMLResponse(_PAGE, headers=_HEADERS)


@router.get(
    "/dashboard/data",
    dependencies=PAGE,
    response_model=DashboardData,
    responses=documented(400, 401),
)
async def dashboard_data(
    request: Request,
    since: Annotated[
        float, Query(ge=0, allow_inf_nan=False, description="only samples after this unix time")
    ] = 0.0,
) -> Response:
    """Current figures, and one sample per second of the last minutes."""
    context = context_of(request)
    server, model = context.server, context.server.model
    figures, status, policy, samples, complaint = await asyncio.gather(
        server.figures(),
        server.drafter_status(),
        server.policy_figures(),
        server.history(since),
        server.complaint(),
    )
    return json_answer(
        DashboardData(
            model=model.model_name,
            target=target_label(context.settings.target),
            package_version=package_version(),
            unix_s=time.time(),
            started_unix_s=model.created_unix_s,
            is_ready=complaint is None,
            figures=_plain(figures),
            arms=[
                ArmSteps(drafter=drafter, draft_k=draft_k, steps=steps)
                for (drafter, draft_k), steps in sorted(figures.steps_by_arm.items())
            ],
            drafter=finite(status),
            policy=finite(policy),
            sample_fields=list(SAMPLE_FIELDS),
            samples=samples,
        )
    )


def _plain(figures: EngineFigures) -> dict[str, Any]:
    plain = asdict(figures)
    del plain["steps_by_arm"]  # its keys are tuples; ``arms`` has it
    cleaned: dict[str, Any] = finite(plain)
    return cleaned
