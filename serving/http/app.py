"""The application: routes, error handlers and what they share."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from configs.checks import check_settings
from configs.schema import Settings
from serving.http.auth import scope_of
from serving.http.boundary import Boundary
from serving.http.context import Context, attach, of_app
from serving.http.errors import (
    ApiError,
    on_api_error,
    on_client_gone,
    on_http_exception,
    on_query_error,
)
from serving.http.face import RunningServer
from serving.http.history import PERIOD_S, History
from serving.http.metrics import Metrics
from serving.http.prompts import PromptEncoder
from serving.http.routes import ALL


def create_app(server: RunningServer, settings: Settings) -> FastAPI:
    """The HTTP application of one running server.

    Raises:
        ValueError: the settings contradict each other, e.g. an address that is not loopback
            without a key.
    """
    problems = check_settings(settings)
    if problems:
        raise ValueError("\n".join(problems))
    for route in ALL:
        assert scope_of(route) is not None, f"{route.path} declares no scope"
    app = FastAPI(
        title="Slipstream",
        routes=list(ALL),
        lifespan=_lifespan,
        openapi_url=None,  # FastAPI's own route would need no key
        docs_url=None,  # loads scripts from other hosts
        redoc_url=None,
        redirect_slashes=False,  # a redirect would repeat the client's Host header
        exception_handlers={
            ApiError: on_api_error,
            HTTPException: on_http_exception,
            RequestValidationError: on_query_error,
            ClientDisconnect: on_client_gone,
        },
    )
    app.add_middleware(Boundary)
    attach(
        app,
        Context(
            server=server,
            settings=settings,
            metrics=Metrics(server),
            prompts=PromptEncoder(server.model.tokenizer),
            history=History(),
        ),
    )
    return app


@asynccontextmanager
async def _lifespan(app: FastAPI) -> AsyncIterator[None]:
    context = of_app(app)
    sampling = asyncio.create_task(_sample(context))
    yield
    sampling.cancel()
    context.prompts.close()


async def _sample(context: Context) -> None:
    """Record the dashboard's history."""
    while True:
        context.history.add(time.time(), context.server.figures())
        await asyncio.sleep(PERIOD_S)
