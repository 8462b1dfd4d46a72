"""State that the routes of one app share."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import cast

from fastapi import FastAPI
from starlette.requests import HTTPConnection

from configs.schema import Settings
from serving.http.face import RunningServer
from serving.http.metrics import Metrics
from serving.http.prompts import PromptEncoder
from serving.http.turns import Turns


@dataclass(frozen=True, slots=True)
class Context:
    """One instance per app; two apps in a process share nothing."""

    server: RunningServer
    settings: Settings
    metrics: Metrics
    prompts: PromptEncoder
    turns: Turns = field(default_factory=Turns)
    """For requests that begin to generate."""


def attach(app: FastAPI, context: Context) -> None:
    app.state.context = context


def context_of(connection: HTTPConnection) -> Context:
    return of_app(connection.app)


def of_app(app: FastAPI) -> Context:
    return cast(Context, app.state.context)
