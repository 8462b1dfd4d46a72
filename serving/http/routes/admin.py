"""Admin routes: inspect the drafter, change its version, drain the server."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Annotated, Any

from fastapi import APIRouter, Depends
from starlette.requests import Request
from starlette.responses import Response

from serving.http.auth import ADMIN
from serving.http.bodies import body_schema, json_body
from serving.http.context import context_of
from serving.http.errors import ApiError, documented
from serving.http.face import Swapper
from serving.http.request_bodies import NoFields, SwapRequest
from serving.http.response_bodies import DrafterStatus, Drain, SwapResult
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
    return json_status(await asyncio.to_thread(context_of(request).server.drafter_status))


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
    swapper = _swapper(request)
    return await _ordered(lambda: swapper.swap(body.version))


@router.post(
    "/admin/drafter/rollback",
    dependencies=ADMIN,
    response_model=SwapResult,
    responses={**_POST_REFUSALS, **documented(409)},
    openapi_extra=body_schema(NoFields, required=False),
)
async def rollback(request: Request, body: _NoFields) -> Response:
    """Return to the former version."""
    return await _ordered(_swapper(request).rollback)


@router.post(
    "/admin/drain",
    dependencies=ADMIN,
    responses=_POST_REFUSALS,
    openapi_extra=body_schema(NoFields, required=False),
)
async def drain(request: Request, body: _NoFields) -> Drain:
    """Accept no new requests and answer /ready with 503. The process runs on until SIGTERM."""
    context = context_of(request)
    context.begin_drain()
    return Drain(draining=True, inflight=context.server.inbox.num_inflight())


def _swapper(request: Request) -> Swapper:
    swapper = context_of(request).server.swapper
    if swapper is None:
        raise _refused("this server has no drafter that learns; there is nothing to swap")
    return swapper


def _refused(message: str) -> ApiError:
    return ApiError(409, message, code="swap_refused")


async def _ordered(order: Callable[[], dict[str, Any]]) -> Response:
    """Run a swap or rollback, which reads weights from disk, off the event loop."""
    try:
        return json_status(await asyncio.to_thread(order))
    except (ValueError, OSError) as error:
        raise _refused(str(error)) from None
