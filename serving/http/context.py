"""State that the routes of one app share."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import cast

from fastapi import FastAPI
from starlette.requests import HTTPConnection

from configs.schema import Settings
from serving.http.face import RunningServer
from serving.http.history import History
from serving.http.metrics import Metrics
from serving.http.prompts import PromptEncoder


@dataclass(slots=True)
class Context:
    """One instance per app; two apps in a process share nothing."""

    server: RunningServer
    settings: Settings
    metrics: Metrics
    prompts: PromptEncoder
    history: History
    is_draining: bool = False
    inflight_ids: set[str] = field(default_factory=set)
    """Engine requests whose HTTP response is not finished."""

    def begin_drain(self) -> None:
        """Answer /ready with 503 and admit no requests; those in flight continue."""
        self.is_draining = True
        self.server.inbox.drain()

    def cancel_inflight(self) -> None:
        for request_id in list(self.inflight_ids):
            self.server.inbox.cancel(request_id)

    @property
    def complaint(self) -> str | None:
        """Why /ready answers 503; ``None`` if it does not."""
        return "draining" if self.is_draining else self.server.complaint()


def attach(app: FastAPI, context: Context) -> None:
    app.state.context = context


def context_of(connection: HTTPConnection) -> Context:
    return of_app(connection.app)


def of_app(app: FastAPI) -> Context:
    return cast(Context, app.state.context)
