"""One job in the engine: all of its requests are submitted, followed to their end or cancelled."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Iterable
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
        self._mailbox = Mailbox(asyncio.get_running_loop())
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

    async def news(self) -> AsyncIterator[News]:
        """The engine's outputs, until every choice is finished.

        Raises:
            ApiError: 500 or 503, a choice ended without an answer.
        """
        while not self.is_done:
            arrivals = await self._mailbox.take()
            by_choice: dict[int, list[Output]] = {}
            for arrival in arrivals:
                self._note(arrival)
                index = self._index[arrival.output.request_id]
                by_choice.setdefault(index, []).append(arrival.output)
            yield [(index, join_outputs(outputs)) for index, outputs in by_choice.items()]

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
        async for news in self.news():
            for index, output in news:
                outputs[index].append(output)
        return [join_outputs(outputs[index]) for index in sorted(outputs)]

    def _note(self, arrival: Arrival) -> None:
        output = arrival.output
        clock = self._open[output.request_id]
        clock.tick(arrival.at_s, len(output.token_ids))
        self._last[self._index[output.request_id]] = output
        self._num_tokens += len(output.token_ids)
        if output.finish_reason is None:
            return
        clock.finish(arrival.at_s, output.finish_reason)
        del self._open[output.request_id]
        if output.finish_reason in ("error", "cancelled"):
            raise self._failure(output)

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
