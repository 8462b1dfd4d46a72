"""GET /v1/models, /v1/models/{model} and /version."""

from __future__ import annotations

from pathlib import Path

from fastapi import APIRouter
from starlette.requests import Request

from configs.version import package_version
from serving.http.auth import USER
from serving.http.context import Context, context_of
from serving.http.errors import ApiError, documented
from serving.http.response_bodies import ModelCard, ModelList, ModelMetadata, Version

router = APIRouter()


@router.get("/v1/models", dependencies=USER, responses=documented(401))
async def list_models(request: Request) -> ModelList:
    """The one model that is served."""
    return ModelList(object="list", data=[await _card(context_of(request))])


@router.get("/v1/models/{model:path}", dependencies=USER, responses=documented(401, 404))
async def get_model(request: Request, model: str) -> ModelCard:
    """The model of that name, which may contain slashes."""
    card = await _card(context_of(request))
    if model != card.id:
        raise ApiError(404, "The model does not exist.", param="model", code="model_not_found")
    return card


@router.get("/version", dependencies=USER, responses=documented(401))
async def get_version() -> Version:
    return Version(version=package_version())


def target_label(target: str) -> str:
    """The target's id, or the name of its folder or file without the path, which clients need not
    know."""
    return Path(target).name if Path(target).exists() else target


async def _card(context: Context) -> ModelCard:
    model = context.server.model
    figures = await context.server.figures()
    return ModelCard(
        id=model.model_name,
        object="model",
        created=model.created_unix_s,
        owned_by="slipstream",
        max_model_len=model.max_model_len,
        metadata=ModelMetadata(
            target=target_label(context.settings.target),
            drafter_version=figures.drafter_version,
            max_draft=model.max_draft,
        ),
    )
