"""The engine as HTTP sees it, in the engine's own process: no socket, no message."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from serving.history import History
from serving.http.loading import LOADING
from serving.requests import EngineFigures, OnOutput, Output, Request
from serving.served_model import ServedModel
from serving.service import Service
from serving.swap.target_update import TargetUpdates


class Desk:
    """Everything that HTTP may ask of a service, in one place for both kinds of border. Called from
    any thread."""

    def __init__(
        self, service: Service, history: History | None = None, *, is_open: bool = True
    ) -> None:
        """
        Args:
            history: samples for the dashboard; ``None``: there are none.
            is_open: no client is told any more that the model is being loaded. Until ``open`` this
                is a complaint.
        """
        self._service = service
        self._history = History() if history is None else history
        self._is_open = is_open

    @property
    def model(self) -> ServedModel:
        return self._service.model

    def open(self) -> None:
        """The server may be called ready."""
        self._is_open = True

    @property
    def can_swap(self) -> bool:
        return bool(self._service.swappers)

    def submit(self, requests: Sequence[Request], on_output: OnOutput) -> None:
        """Queue all requests, or none. Raises what ``Inbox.submit_all`` raises."""
        self._service.inbox.submit_all(requests, on_output)

    def put_off(self, call: Callable[[], None]) -> None:
        """See ``Handover``. For the engine's thread, that is for ``on_output``."""
        self._service.inbox.handover.put_off(call)

    def cancel(self, request_ids: Iterable[str]) -> None:
        for request_id in request_ids:
            self._service.inbox.cancel(request_id)

    def drain(self) -> int:
        self._service.inbox.drain()
        return self._service.inbox.num_inflight()

    def complaint(self) -> str | None:
        return self._service.complaint() if self._is_open else LOADING

    def figures(self) -> EngineFigures:
        return self._service.figures()

    def policy_figures(self) -> dict[str, Any]:
        return self._service.policy_figures()

    def history(self, since_unix_s: float) -> list[list[float]]:
        return self._history.rows(since_unix_s)

    def drafter_status(self) -> dict[str, Any]:
        """Reads the run folder: not for a thread that others wait for."""
        return self._service.drafter_status()

    def swap(self, version: int | None, drafter: str | None) -> dict[str, Any]:
        """Waits for the engine, and reads weights from disk.

        Raises:
            ValueError, OSError: the version is refused, or cannot be read; or there is no such
                drafter.
        """
        return self._service.swapper_of(drafter).swap(version)

    def rollback(self, drafter: str | None) -> dict[str, Any]:
        """See ``swap``."""
        return self._service.swapper_of(drafter).rollback()

    def target_status(self) -> dict[str, Any]:
        return self._target().status()

    def update_target(self, path: str) -> dict[str, Any]:
        """Reads weights from disk and waits for the engine.

        Raises:
            ValueError, OSError: they are refused, or cannot be read.
        """
        return self._target().update(Path(path))

    def _target(self) -> TargetUpdates:
        if self._service.target is None:
            raise ValueError("this server keeps the weights that its target has")
        return self._service.target


class InProcess:
    """A ``serving.http.face.RunningServer``: a service of this process."""

    def __init__(self, service: Service, history: History | None = None) -> None:
        """
        Args:
            history: samples for the dashboard; ``None``: there are none.
        """
        self._desk = Desk(service, history)
        self._gathered: list[tuple[OnOutput, Output]] = []
        """Outputs of the step under way. For the engine's thread."""

    @property
    def model(self) -> ServedModel:
        return self._desk.model

    @property
    def can_swap(self) -> bool:
        return self._desk.can_swap

    async def submit(self, requests: Sequence[Request], on_output: OnOutput) -> None:
        loop = asyncio.get_running_loop()

        def gather(output: Output) -> None:
            if not self._gathered:
                self._desk.put_off(lambda: self._hand_over(loop))
            self._gathered.append((on_output, output))

        self._desk.submit(requests, gather)

    def _hand_over(self, loop: asyncio.AbstractEventLoop) -> None:
        """Deliver all outputs of a step in one turn of the event loop. To wake it for each of them
        would be a system call each."""
        gathered, self._gathered = self._gathered, []
        with contextlib.suppress(RuntimeError):  # it is closed: nobody waits for an output
            loop.call_soon_threadsafe(_deliver, gathered)

    def cancel(self, request_ids: Iterable[str]) -> None:
        self._desk.cancel(request_ids)

    async def drain(self) -> int:
        return self._desk.drain()

    async def complaint(self) -> str | None:
        return self._desk.complaint()

    async def figures(self) -> EngineFigures:
        return self._desk.figures()

    async def policy_figures(self) -> dict[str, Any]:
        return self._desk.policy_figures()

    async def history(self, since_unix_s: float) -> list[list[float]]:
        return self._desk.history(since_unix_s)

    async def drafter_status(self) -> dict[str, Any]:
        return await asyncio.to_thread(self._desk.drafter_status)

    async def swap(self, version: int | None, drafter: str | None = None) -> dict[str, Any]:
        return await _readable(self._desk.swap, version, drafter)

    async def rollback(self, drafter: str | None = None) -> dict[str, Any]:
        return await _readable(self._desk.rollback, drafter)

    async def target_status(self) -> dict[str, Any]:
        return self._desk.target_status()

    async def update_target(self, path: str) -> dict[str, Any]:
        return await _readable(self._desk.update_target, path)


def _deliver(gathered: list[tuple[OnOutput, Output]]) -> None:
    for on_output, output in gathered:
        on_output(output)


async def _readable(order: Any, *arguments: Any) -> dict[str, Any]:
    """Run an order off the event loop; a disk that fails is a refusal."""
    try:
        result: dict[str, Any] = await asyncio.to_thread(order, *arguments)
    except OSError as error:
        raise ValueError(str(error)) from error
    return result
