"""What HTTP needs of the engine, and nothing more."""

from __future__ import annotations

from typing import Any, Protocol

from serving.requests import EngineFigures, OnOutput, Request


class EngineFace(Protocol):
    """``swap`` and ``rollback`` wait for the engine, ``drafter_status`` looks at the disk: they are
    called on other threads. The rest is called from the event loop and returns at once."""

    @property
    def tokenizer(self) -> Any:
        """The target's ``transformers`` tokenizer."""

    @property
    def max_model_len(self) -> int:
        """Most tokens, prompt and completion, of a request."""

    @property
    def vocab_size(self) -> int: ...

    @property
    def max_draft(self) -> int:
        """Largest K that may be planned."""

    @property
    def model_name(self) -> str: ...

    @property
    def created_unix_s(self) -> int: ...

    def submit(self, request: Request, on_output: OnOutput) -> None:
        """Queue a request; ``on_output`` is called on the engine's thread until it finishes.

        Raises:
            QueueFullError: too many requests wait already.
            DrainingError: nothing new is admitted.
            ValueError: the request can never run; the text says why.
        """

    def cancel(self, request_id: str) -> None:
        """End a request early and free its pages; unknown and finished ids are fine."""

    def figures(self) -> EngineFigures: ...

    def policy_figures(self) -> dict[str, Any]: ...

    def drafter_status(self) -> dict[str, Any]:
        """Keys ``kind``, ``version``, ``parent``, ``staleness``, ``state``, ``versions``,
        ``former``, ``last_error`` and more."""

    def swap(self, version: int | None) -> dict[str, Any]:
        """Swap to a published version, ``None`` for the newest.

        Raises:
            ValueError: the version is refused; the text says why.
        """

    def rollback(self) -> dict[str, Any]:
        """Return to the former version.

        Raises:
            ValueError: there is none.
        """

    def drain(self) -> None:
        """Admit nothing from now on; what is in flight goes on."""

    def num_inflight(self) -> int: ...

    def is_ready(self) -> bool: ...
