"""What the HTTP layer needs from a running server: one small protocol for each need."""

from __future__ import annotations

from typing import Any, Protocol

from serving.requests import EngineFigures, OnOutput, Request


class ServedModel(Protocol):
    """The target and its limits; constant while the server runs."""

    @property
    def tokenizer(self) -> Any:
        """The target's ``transformers`` tokenizer."""

    @property
    def max_model_len(self) -> int:
        """Maximum number of tokens of a request, prompt and completion together."""

    @property
    def vocab_size(self) -> int: ...

    @property
    def max_draft(self) -> int:
        """Largest K that may be chosen."""

    @property
    def drafters(self) -> tuple[str, ...] | None:
        """Kinds that a request may name; ``None``: requests may not choose."""

    @property
    def model_name(self) -> str: ...

    @property
    def created_unix_s(self) -> int: ...


class Inbox(Protocol):
    """Requests on their way into the engine. Called from the event loop; returns at once."""

    def submit(self, request: Request, on_output: OnOutput) -> None:
        """Queue a request; ``on_output`` is called on the engine's thread until it finishes.

        Raises:
            QueueFullError: too many requests are waiting.
            DrainingError: no new requests are admitted.
            ValueError: the request can never be served; the message says why.
        """

    def cancel(self, request_id: str) -> None:
        """End a request early and free its pages; unknown and finished ids are ignored."""

    def drain(self) -> None:
        """Admit no new requests; those in flight continue."""

    def num_inflight(self) -> int:
        """Requests submitted and not finished."""


class Policy(Protocol):
    """The policy's own view of itself, for the dashboard."""

    def figures(self) -> dict[str, Any]: ...


class Swapper(Protocol):
    """Changes the drafter's version. Both wait for the engine: call them off the event loop."""

    def swap(self, version: int | None) -> dict[str, Any]:
        """Swap to a published version, ``None`` for the newest.

        Raises:
            ValueError: the version is refused; the message says why.
        """

    def rollback(self) -> dict[str, Any]:
        """Return to the former version.

        Raises:
            ValueError: there is none.
        """


class RunningServer(Protocol):
    """The argument of ``create_app``: the parts above, and the state of all of them together."""

    @property
    def model(self) -> ServedModel: ...

    @property
    def inbox(self) -> Inbox: ...

    @property
    def policy(self) -> Policy: ...

    @property
    def swapper(self) -> Swapper | None:
        """``None`` if the server has no drafter that learns."""

    def complaint(self) -> str | None:
        """Why the server should get no requests, in words for its operator; ``None`` if it
        decodes and does not drain."""

    def figures(self) -> EngineFigures:
        """Counters and gauges of engine, swaps and traces. Returns at once."""

    def drafter_status(self) -> dict[str, Any]:
        """Keys ``kind``, ``version``, ``parent``, ``staleness``, ``state``, ``versions``,
        ``former``, ``last_error``, ``drafters`` and more. Reads the run folder: call it off the
        event loop."""
