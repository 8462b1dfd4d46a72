"""What HTTP needs from a running server, which may be another process.

``serving.border`` has both: ``in_process.InProcess`` over a ``Service`` in this process, and
``http_side.RemoteServer`` over one beside it. What needs the engine is awaited; everything raises
``EngineGoneError`` once the engine's process is gone.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, Protocol

from serving.requests import EngineFigures, OnOutput, Request
from serving.served_model import ServedModel


class RunningServer(Protocol):
    """The argument of ``create_app``. Called on the event loop."""

    @property
    def model(self) -> ServedModel: ...

    @property
    def can_swap(self) -> bool:
        """Whether the server has a drafter that learns."""

    async def submit(self, requests: Sequence[Request], on_output: OnOutput) -> None:
        """Queue all requests of a job, or none.

        Args:
            on_output: called on the event loop's thread until each of them has finished, perhaps
                before this returns.

        Raises:
            QueueFullError: too many requests are waiting.
            DrainingError: no new requests are admitted.
            ValueError: a request can never be served; the message says why.
        """

    def cancel(self, request_ids: Iterable[str]) -> None:
        """End requests early and free their pages; unknown and finished ids are ignored. Returns at
        once."""

    async def drain(self) -> int:
        """Admit no new requests; those in flight continue. Returns how many those are."""

    async def complaint(self) -> str | None:
        """Why the server should get no requests, in words for its operator; ``None`` if it
        decodes and does not drain."""

    async def figures(self) -> EngineFigures:
        """Counters and gauges of engine, swaps and traces."""

    async def policy_figures(self) -> dict[str, Any]:
        """The policy's own view of itself, for the dashboard."""

    async def history(self, since_unix_s: float) -> list[list[float]]:
        """Samples after a time, as ``serving.history.History.rows``."""

    async def drafter_status(self) -> dict[str, Any]:
        """Keys ``kind``, ``version``, ``parent``, ``staleness``, ``state``, ``versions``,
        ``former``, ``last_error``, ``drafters`` and more."""

    async def swap(self, version: int | None, drafter: str | None = None) -> dict[str, Any]:
        """Swap to a published version of a drafter, ``None`` for the newest.

        Args:
            drafter: its kind; ``None``: the main one.

        Raises:
            ValueError: the version is refused, or cannot be read, or there is no such drafter; the
                message says why.
        """

    async def rollback(self, drafter: str | None = None) -> dict[str, Any]:
        """Return to a drafter's former version.

        Args:
            drafter: its kind; ``None``: the main one.

        Raises:
            ValueError: there is none, or it cannot be read, or there is no such drafter.
        """

    async def target_status(self) -> dict[str, Any]:
        """Keys ``version``, ``fingerprint``, ``folder``, ``updates``, ``last_error`` and more."""

    async def update_target(self, path: str) -> dict[str, Any]:
        """Replace the target's weights by those in a folder.

        Raises:
            ValueError: they are refused, or cannot be read; the former ones stay in force.
        """
