"""What a request gives back: its outputs, and everything it held once it ends."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from serving.engine.drafting import Drafting
from serving.engine.inbox import Inbox
from serving.engine.lanes import Lanes
from serving.engine.scheduler import Scheduler
from serving.engine.sequence import Sequence
from serving.requests import FinishReason, Output

NOT_FINITE = "not_finite"
"""Error code of a request whose target computed NaN or infinity."""
_NOT_FINITE_TEXT = (
    "The target computed NaN or infinity for this request, so it has no next token. The same "
    "request will most likely fail again."
)
_MOST_UNSOUND = 3
"""Requests in a row that may end in NaN or infinity before the server is not ready."""


class Soundness:
    """Whether the target still computes numbers: told by how requests end."""

    def __init__(self) -> None:
        self._num_unsound = 0

    def note(self, reason: FinishReason) -> None:
        """A request has ended: by its own, or for lack of a finite logit."""
        if reason in ("stop", "length"):
            self._num_unsound = 0
        elif reason == "error":
            self._num_unsound += 1

    @property
    def complaint(self) -> str | None:
        """Why the server should get no requests; ``None`` if it is sound. One answer suffices."""
        if self._num_unsound < _MOST_UNSOUND:
            return None
        return (
            f"the target computed NaN or infinity in the last {self._num_unsound} requests that "
            f"ended; its weights may be damaged"
        )


class Outputs:
    """Delivers outputs and ends requests, each of them once."""

    def __init__(
        self,
        inbox: Inbox,
        scheduler: Scheduler,
        drafting: Drafting,
        lanes: Lanes,
        on_finished: Callable[[Sequence], None],
    ) -> None:
        self._inbox = inbox
        self._scheduler = scheduler
        self._drafting = drafting
        self._lanes = lanes
        self._on_finished = on_finished
        self.soundness = Soundness()

    def after_commit(self, committed: Iterable[Sequence]) -> None:
        """Deliver the new tokens of the requests of a step, and end those that are done."""
        page_size = self._scheduler.page_size
        for sequence in committed:
            reason = sequence.finish_reason
            if reason == "error":  # set by ``Commits`` only where a row is not finite
                self._scheduler.forget_pages(sequence)
                self.soundness.note(reason)
                self.finish(sequence, reason, _NOT_FINITE_TEXT, NOT_FINITE)
                continue
            if sequence.num_computed >= (sequence.num_named + 1) * page_size:
                self._scheduler.name_full_pages(sequence)
            if reason:
                self.soundness.note(reason)
                self.finish(sequence, reason)
            elif len(sequence.tokens) > sequence.num_prompt + sequence.num_emitted:
                self._emit(sequence, None)

    def finish(
        self,
        sequence: Sequence,
        reason: FinishReason,
        error: str | None = None,
        error_code: str | None = None,
    ) -> None:
        """Free the pages and the lane of a request, deliver the rest of its text, and hand it to
        ``on_finished`` if it was captured.

        Args:
            error, error_code: see ``Output``, with the reason ``error``.
        """
        request = sequence.request
        captured = request.capture and reason in ("stop", "length")
        self._drafting.finish(sequence, keep=captured)
        self._scheduler.remove(sequence)
        if sequence.lane is not None:
            self._lanes.give_back(sequence.lane)
            sequence.lane = None
        self._inbox.remove(request.id)
        sequence.finish_reason = reason
        if captured:
            self._on_finished(sequence)
        self._emit(sequence, reason, error, error_code)

    def _emit(
        self,
        sequence: Sequence,
        reason: FinishReason | None,
        error: str | None = None,
        error_code: str | None = None,
    ) -> None:
        request, start = sequence.request, sequence.num_prompt + sequence.num_emitted
        tokens = tuple(sequence.tokens[start:])
        logprobs = None
        if sequence.is_scored:
            logprobs = tuple(sequence.logprobs[sequence.num_emitted :])
        sequence.num_emitted += len(tokens)
        # By position: with names, making one takes twice as long.
        sequence.on_output(
            Output(
                request.id,
                sequence.detokenizer.take(final=reason is not None),
                tokens,
                logprobs,
                reason,
                sequence.stats(),
                sequence.num_prompt,
                sequence.num_cached,
                error,
                error_code,
            )
        )
