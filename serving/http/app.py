"""The application: routes, error handlers and what they share."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response

from configs.checks import check_settings
from configs.schema import Settings
from serving.http.auth import scope_of
from serving.http.boundary import Boundary
from serving.http.context import Context, attach, of_app
from serving.http.errors import (
    ApiError,
    invalid,
    on_api_error,
    on_client_gone,
    on_engine_gone,
    on_http_exception,
    printable,
)
from serving.http.face import RunningServer
from serving.http.metrics import Metrics
from serving.http.prompts import PromptEncoder
from serving.http.routes import ALL
from serving.http.tallies import Tallies
from serving.requests import EngineGoneError


def create_app(
    server: RunningServer, settings: Settings, tallies: Tallies | None = None
) -> FastAPI:
    """The HTTP application of one running server.

    Args:
        tallies: counted together with other processes, see ``Metrics``; ``None``: alone.

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
            EngineGoneError: on_engine_gone,
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
            metrics=Metrics(server.model.model_name, tallies),
            prompts=PromptEncoder(server.model.tokenizer),
        ),
    )
    return app


async def on_query_error(request: Request, error: Exception) -> Response:
    """An invalid query parameter."""
    assert isinstance(error, RequestValidationError)
    first = error.errors()[0]
    param = ".".join(printable(str(part)) for part in first["loc"][1:])
    return invalid(f"{param}: {first['msg']}", param=param).response()


@asynccontextmanager
async def _lifespan(app: FastAPI) -> AsyncIterator[None]:
    yield
    of_app(app).prompts.close()
