"""One job in the engine: all of its requests are submitted, followed to their end or cancelled."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterable
from types import TracebackType

from starlette.requests import ClientDisconnect
from starlette.types import Receive

from serving.http.context import Context
from serving.http.errors import (
    ApiError,
    engine_gone,
    failed,
    internal,
    invalid,
    logger,
    overloaded,
    unavailable,
)
from serving.http.jobs import Job, PromptField
from serving.http.metrics import ChoiceClock
from serving.http.response_bodies import PromptTokensDetails, Speculation, Usage
from serving.http.streaming import Arrival, Mailbox, until_disconnect
from serving.requests import (
    ENGINE_GONE,
    DrainingError,
    Output,
    QueueFullError,
    SpeculationStats,
    join_outputs,
)

News = list[tuple[int, Output]]
"""(choice index, its new output), at most one entry for each choice."""


class Generation:
    """Running state of one job. Leaving the context, on any path, cancels unfinished requests."""

    def __init__(self, context: Context, job: Job, request_id: str) -> None:
        self.job = job
        self._context = context
        self._request_id = request_id
        self._mailbox = Mailbox()
        self._index = {request.id: index for index, request in enumerate(job.requests)}
        self._open: dict[str, ChoiceClock] = {}
        """Clock of every request that was submitted and has not finished."""
        self._last: dict[int, Output] = {}
        """Latest output of each choice; its counters are totals."""
        self._num_tokens = 0

    async def submit(self) -> None:
        """Hand every choice to the engine, or none.

        Raises:
            ApiError: 429, 503 or 400.
        """
        now_s = time.perf_counter()
        try:
            await self._context.server.submit(self.job.requests, self._mailbox.put)
        except Exception as error:
            raise _refusal(error, self.job.prompt_field) from None
        start_clock = self._context.metrics.start_clock
        self._open = {request.id: start_clock(now_s) for request in self.job.requests}

    def close(self) -> None:
        """Cancel the requests that still run, if any."""
        self._mailbox.at_once = None  # refers to this, which the collector would have to find
        if self._open:
            self._context.server.cancel(list(self._open))
        for _ in self._open:
            self._context.metrics.count_finished("cancelled")
        self._open.clear()

    def __enter__(self) -> Generation:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    @property
    def is_done(self) -> bool:
        return not self._open

    async def news(self) -> News:
        """What the engine has put out since the last call; waits for it. Not to be called once
        every choice is finished.

        Raises:
            ApiError: 500 or 503, a choice ended without an answer.
        """
        arrivals = await self._mailbox.take()
        if len(arrivals) == 1:  # as nearly always
            return [(self._note(arrivals[0]), arrivals[0].output)]
        by_choice: dict[int, list[Output]] = {}
        for arrival in arrivals:
            by_choice.setdefault(self._note(arrival), []).append(arrival.output)
        return [(index, join_outputs(outputs)) for index, outputs in by_choice.items()]

    def give_at_once(self, take: Callable[[int, Output], bool]) -> None:
        """Offer each output to ``take``, with the index of its choice, while somebody waits in
        ``news``; one that it returns False for, or fails on, comes from ``news``. Not offered are
        those that end a choice."""

        def at_once(arrival: Arrival) -> bool:
            output = arrival.output
            if output.finish_reason is not None:
                return False
            try:
                is_taken = take(self._index[output.request_id], output)
            except Exception:  # it fails again in ``news``, where the response tells its client
                return False
            if is_taken:
                self._note(arrival)
            return is_taken

        self._mailbox.at_once = at_once

    async def answers(self, receive: Receive) -> list[Output]:
        """The complete output of each choice, ordered by index.

        Raises:
            ApiError: 500 or 503, a choice ended without an answer.
            ClientDisconnect: the client left first.
        """
        collecting = asyncio.create_task(self._collect())
        leaving = asyncio.create_task(until_disconnect(receive))
        try:
            await asyncio.wait({collecting, leaving}, return_when=asyncio.FIRST_COMPLETED)
            if not collecting.done():
                raise ClientDisconnect
            return collecting.result()
        finally:
            collecting.cancel()
            leaving.cancel()

    async def _collect(self) -> list[Output]:
        outputs: dict[int, list[Output]] = {index: [] for index in self._index.values()}
        while not self.is_done:
            for index, output in await self.news():
                outputs[index].append(output)
        return [join_outputs(outputs[index]) for index in sorted(outputs)]

    def _note(self, arrival: Arrival) -> int:
        """Count an output in. Returns the index of its choice."""
        at_s, output = arrival
        request_id, num_tokens = output.request_id, len(output.token_ids)
        clock, index = self._open[request_id], self._index[request_id]
        clock.tick(at_s, num_tokens)
        self._last[index] = output
        self._num_tokens += num_tokens
        if output.finish_reason is not None:
            clock.finish(at_s, output.finish_reason)
            del self._open[request_id]
            if output.finish_reason in ("error", "cancelled"):
                raise self._failure(output)
        return index

    def _failure(self, output: Output) -> ApiError:
        if output.finish_reason == "cancelled":
            return unavailable("The server is shutting down and had to end this request.")
        if output.error_code == ENGINE_GONE:
            return engine_gone()
        logger.error("request %s failed in the engine: %s", self._request_id, output.error)
        if output.error is None or output.error_code is None:
            return internal(self._request_id)
        return failed(f"{output.error} Request id: {self._request_id}", output.error_code)

    def usage(self) -> Usage:
        """Token counts. A prompt counts once, regardless of its number of choices."""
        first = [o for index, o in self._last.items() if self.job.is_first_choice(index)]
        prompt_tokens = sum(output.num_prompt_tokens for output in first)
        cached_tokens = sum(output.num_cached_tokens for output in first)
        return Usage(
            prompt_tokens=prompt_tokens,
            completion_tokens=self._num_tokens,
            total_tokens=prompt_tokens + self._num_tokens,
            prompt_tokens_details=PromptTokensDetails(cached_tokens=cached_tokens),
        )

    def speculation(self) -> Speculation:
        total = sum_stats(output.stats for output in self._last.values())
        return Speculation(
            drafter_version=total.drafter_version,
            steps=total.steps,
            proposed=total.proposed,
            accepted=total.accepted,
            tokens_per_step=total.tokens_per_step,
            target_version=total.target_version,
            target_switches=list(total.target_switches),
        )


def sum_stats(stats: Iterable[SpeculationStats]) -> SpeculationStats:
    """Sums of the counts; versions are the newest ones."""
    every = list(stats)
    return SpeculationStats(
        drafter_version=max(entry.drafter_version for entry in every),
        steps=sum(entry.steps for entry in every),
        proposed=sum(entry.proposed for entry in every),
        accepted=sum(entry.accepted for entry in every),
        target_version=max(entry.target_version for entry in every),
        target_switches=tuple(sorted(n for entry in every for n in entry.target_switches)),
    )


def _refusal(error: Exception, prompt_field: PromptField) -> Exception:
    """The error for a request that the engine did not accept."""
    if isinstance(error, QueueFullError):
        return overloaded("The waiting queue is full (engine.max_queue); retry shortly.")
    if isinstance(error, DrainingError):
        return unavailable("The server is shutting down and accepts no new requests.")
    if isinstance(error, ValueError):
        return invalid(str(error), param=prompt_field, code="invalid_prompt")
    return error
