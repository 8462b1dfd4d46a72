"""Admin routes: inspect drafter and target, change their weights, drain the server."""

from __future__ import annotations

from collections.abc import Awaitable
from typing import Annotated, Any

from fastapi import APIRouter, Depends
from starlette.requests import Request
from starlette.responses import Response

from serving.http.auth import ADMIN
from serving.http.bodies import body_schema, json_body
from serving.http.context import context_of
from serving.http.errors import ApiError, documented
from serving.http.face import RunningServer
from serving.http.request_bodies import (
    NoFields,
    RollbackRequest,
    SwapRequest,
    TargetUpdateRequest,
)
from serving.http.response_bodies import (
    DrafterStatus,
    Drain,
    SwapResult,
    TargetStatus,
    TargetUpdate,
)
from serving.http.responses import json_status

router = APIRouter()

_POST_REFUSALS = documented(400, 401, 403, 408, 413, 415)
_NoFields = Annotated[NoFields, Depends(json_body(NoFields))]


@router.get(
    "/admin/drafter",
    dependencies=ADMIN,
    response_model=DrafterStatus,
    responses=documented(401, 403),
)
async def drafter(request: Request) -> Response:
    """Version in use, available versions, and the result of the last swap."""
    return json_status(await context_of(request).server.drafter_status())


@router.post(
    "/admin/drafter/swap",
    dependencies=ADMIN,
    response_model=SwapResult,
    responses={**_POST_REFUSALS, **documented(409)},
    openapi_extra=body_schema(SwapRequest, required=False),
)
async def swap(
    request: Request, body: Annotated[SwapRequest, Depends(json_body(SwapRequest))]
) -> Response:
    """Switch to another published version between two steps; requests continue."""
    return await _ordered(_learning(request).swap(body.version, body.drafter))


@router.post(
    "/admin/drafter/rollback",
    dependencies=ADMIN,
    response_model=SwapResult,
    responses={**_POST_REFUSALS, **documented(409)},
    openapi_extra=body_schema(RollbackRequest, required=False),
)
async def rollback(
    request: Request, body: Annotated[RollbackRequest, Depends(json_body(RollbackRequest))]
) -> Response:
    """Return to the former version."""
    return await _ordered(_learning(request).rollback(body.drafter))


@router.get(
    "/admin/target",
    dependencies=ADMIN,
    response_model=TargetStatus,
    responses=documented(401, 403),
)
async def target(request: Request) -> Response:
    """The weights in force, and the result of the last update."""
    return json_status(await context_of(request).server.target_status())


@router.post(
    "/admin/target/update",
    dependencies=ADMIN,
    response_model=TargetUpdate,
    responses={**_POST_REFUSALS, **documented(409)},
    openapi_extra=body_schema(TargetUpdateRequest),
)
async def update_target(
    request: Request, body: Annotated[TargetUpdateRequest, Depends(json_body(TargetUpdateRequest))]
) -> Response:
    """Replace the target's weights by others of the same shape between two steps; requests in
    flight continue."""
    order = context_of(request).server.update_target(body.path)
    return await _ordered(order, "target_update_refused")


@router.post(
    "/admin/drain",
    dependencies=ADMIN,
    responses=_POST_REFUSALS,
    openapi_extra=body_schema(NoFields, required=False),
)
async def drain(request: Request, body: _NoFields) -> Drain:
    """Accept no new requests and answer /ready with 503. The process runs on until SIGTERM."""
    return Drain(draining=True, inflight=await context_of(request).server.drain())


def _learning(request: Request) -> RunningServer:
    server = context_of(request).server
    if not server.can_swap:
        raise _refused("this server has no drafter that learns; there is nothing to swap")
    return server


def _refused(message: str, code: str = "swap_refused") -> ApiError:
    return ApiError(409, message, code=code)


async def _ordered(order: Awaitable[dict[str, Any]], code: str = "swap_refused") -> Response:
    """Wait for an order to change weights.

    Args:
        code: of its refusal.
    """
    try:
        return json_status(await order)
    except ValueError as error:
        raise _refused(str(error), code) from None
