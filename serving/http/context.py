"""State that the routes of one app share."""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

from fastapi import FastAPI
from starlette.requests import HTTPConnection

from configs.schema import Settings
from serving.http.face import RunningServer
from serving.http.metrics import Metrics
from serving.http.prompts import PromptEncoder


@dataclass(frozen=True, slots=True)
class Context:
    """One instance per app; two apps in a process share nothing."""

    server: RunningServer
    settings: Settings
    metrics: Metrics
    prompts: PromptEncoder


def attach(app: FastAPI, context: Context) -> None:
    app.state.context = context


def context_of(connection: HTTPConnection) -> Context:
    return of_app(connection.app)


def of_app(app: FastAPI) -> Context:
    return cast(Context, app.state.context)
