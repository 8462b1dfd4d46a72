"""Loops that drive an engine in this thread, without HTTP: one batch, or a batch kept full.

The loop through HTTP is in ``http_loop.py``.
"""

from __future__ import annotations

import functools
import itertools
import math
import random
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from buffer.records import Acceptance
from serving.engine.loop import Engine
from serving.requests import Output, Request, SamplingParams

Prompt = tuple[int, ...]
IDLE_S = 10.0
"""If the engine has had nothing to do for this long, it has lost a request."""


def random_prompts(num_prompts: int, length: int, vocab_size: int, seed: int = 0) -> list[Prompt]:
    """Random prompts without a common prefix."""
    numbers = random.Random(f"{seed} {num_prompts} {length}")
    return [tuple(numbers.choices(range(vocab_size), k=length)) for _ in range(num_prompts)]


@torch.inference_mode()
def clear(engine: Engine) -> None:
    """Cancel all in-flight requests, and step until the engine has nothing left to do."""
    engine.inbox.cancel_all()
    while engine.step():
        pass


@dataclass(slots=True)
class Answer:
    """One output as it grows."""

    tokens: list[int] = field(default_factory=list)
    acceptance: Acceptance = field(default_factory=Acceptance)
    is_over: bool = False
    error: str | None = None

    def take(self, output: Output) -> None:
        self.tokens += output.token_ids
        spent = output.stats
        self.acceptance = Acceptance(spent.steps, spent.proposed, spent.accepted)
        self.is_over = output.finish_reason is not None
        self.error = output.error


class Batch:
    """Requests submitted together, one per prompt; greedy unless ``fields_of`` changes that."""

    def __init__(
        self,
        engine: Engine,
        prompts: Sequence[Prompt],
        max_tokens: int,
        *,
        capture: bool = False,
        fields_of: Callable[[int], dict[str, Any]] = lambda _number: {},
    ) -> None:
        """
        Args:
            fields_of: prompt index -> sampling parameters that replace or extend the greedy ones.
        """
        clear(engine)  # a failed turn may have left requests in flight
        self._engine, self._max_tokens = engine, max_tokens
        self.answers = [Answer() for _ in prompts]
        for number, (ids, answer) in enumerate(zip(prompts, self.answers, strict=True)):
            fields = {"temperature": 0.0, "ignore_eos": True, **fields_of(number)}
            sampling = SamplingParams(max_tokens=max_tokens, **fields)
            request = Request(f"batch-{number}", tuple(ids), sampling, capture=capture)
            engine.inbox.submit(request, answer.take)

    @property
    def num_tokens(self) -> int:
        """Completion tokens so far."""
        return sum(len(answer.tokens) for answer in self.answers)

    @property
    def tokens(self) -> list[list[int]]:
        return [answer.tokens for answer in self.answers]

    @torch.inference_mode()
    def step(self) -> float:
        """Run one engine step; returns its seconds."""
        started = time.perf_counter()
        self._engine.step()
        return time.perf_counter() - started

    def begin(self, warm_ups: int = 0) -> None:
        """Step until every request has a token and is decoding, then ``warm_ups`` more times.

        Raises:
            RuntimeError: requests ended before all had a token.
        """
        while not all(answer.tokens for answer in self.answers):
            if not self._engine.inbox.num_inflight():
                self._raise("ended before all had a token")
            self.step()
        for _ in range(warm_ups):
            self.step()

    @torch.inference_mode()
    def finish(self) -> None:
        """Step until all have ended.

        Raises:
            RuntimeError: a request failed or was cut short, or the engine lost one.
        """
        busy_s = time.perf_counter()
        while not all(answer.is_over for answer in self.answers):
            if self._engine.step():
                busy_s = time.perf_counter()
            elif time.perf_counter() - busy_s > IDLE_S:
                self._raise("have not ended, and the engine has nothing to do")
        if any(len(answer.tokens) != self._max_tokens for answer in self.answers):
            self._raise("failed or were cut short")

    def end(self) -> None:
        """Cancel all in-flight requests.

        Raises:
            RuntimeError: a request has failed.
        """
        clear(self._engine)
        if any(answer.error for answer in self.answers):
            self._raise("failed")

    def _raise(self, what: str) -> None:
        wrong = [a for a in self.answers if a.error or len(a.tokens) != self._max_tokens]
        error = next((a.error for a in wrong if a.error), "no error was reported")
        raise RuntimeError(f"{len(wrong)} of {len(self.answers)} requests {what}: {error}")


@dataclass(frozen=True, slots=True)
class Turn:
    """All prompts of a batch answered once."""

    answers: list[Answer]
    seconds: float
    """Time from submission to the last token."""
    decode_tokens: int
    """Tokens emitted after every request had its first token."""
    decode_s: float

    @property
    def num_tokens(self) -> int:
        return sum(len(answer.tokens) for answer in self.answers)

    @property
    def tokens_per_s(self) -> float:
        return self.num_tokens / self.seconds

    @property
    def decode_tokens_per_s(self) -> float:
        return self.decode_tokens / self.decode_s


def answer_all(engine: Engine, prompts: Sequence[Prompt], max_tokens: int, **options: Any) -> Turn:
    """Answer all prompts as one batch.

    Args:
        options: keyword arguments for ``Batch``.
    """
    clear(engine)
    started = time.perf_counter()
    batch = Batch(engine, prompts, max_tokens, **options)
    batch.begin()
    begun, first = time.perf_counter(), batch.num_tokens
    batch.finish()
    ended = time.perf_counter()
    clear(engine)
    decoded = batch.num_tokens - first
    return Turn(batch.answers, ended - started, decoded, ended - begun)


# A batch kept full


@dataclass(frozen=True, slots=True)
class Window:
    """What was decoded in a period of time."""

    seconds: float
    num_tokens: int
    num_steps: int


class Feed:
    """Keeps the engine's batch full: submits a request whenever one ends."""

    def __init__(
        self,
        engine: Engine,
        requests: Iterable[Request],
        batch: int,
        *,
        each: Callable[[Request, Output], None] | None = None,
    ) -> None:
        """
        Args:
            requests: taken one by one; the batch drains when there are no more.
            each: called with every output and its request.
        """
        self.num_tokens = self.num_finished = 0
        self._engine, self._requests = engine, iter(requests)
        self._each = each
        self._num_missing = batch
        self._failed: str | None = None
        self._fill()

    @torch.inference_mode()
    def run(self, seconds: float) -> Window:
        """Step for ``seconds``, or until no request is in flight.

        Raises:
            RuntimeError: a request failed.
        """
        engine, tokens, steps = self._engine, self.num_tokens, self._engine.figures().num_steps
        started = now = time.perf_counter()
        while now - started < seconds and engine.inbox.num_inflight():
            engine.step()
            self._fill()
            now = time.perf_counter()
        if self._failed is not None:
            raise RuntimeError(f"a request failed: {self._failed}")
        return Window(now - started, self.num_tokens - tokens, engine.figures().num_steps - steps)

    @torch.inference_mode()
    def step(self) -> None:
        """Step once, and submit requests in place of those that ended."""
        self._engine.step()
        self._fill()

    def finish(self) -> Window:
        """Submit no further requests, and step until those in flight have ended."""
        self._requests = iter(())
        return self.run(math.inf)

    def stop(self) -> None:
        """Cancel all in-flight requests."""
        clear(self._engine)

    def _fill(self) -> None:
        for request in itertools.islice(self._requests, self._num_missing):
            self._num_missing -= 1
            self._engine.inbox.submit(request, functools.partial(self._take, request))

    def _take(self, request: Request, output: Output) -> None:
        if self._each is not None:
            self._each(request, output)
        self.num_tokens += len(output.token_ids)
        if output.finish_reason is not None:
            self._num_missing += 1
            self.num_finished += 1
        if output.error is not None:
            self._failed = output.error


def full_window(
    engine: Engine, requests: Iterable[Request], batch: int, warm_s: float, seconds: float
) -> Window:
    """What is decoded in ``seconds`` with a batch that stays full, after ``warm_s`` of the same."""
    clear(engine)
    feed = Feed(engine, requests, batch)
    feed.run(warm_s)
    window = feed.run(seconds)
    feed.stop()
    return window


def greedy_requests(prompts: Sequence[Prompt], batch: int, length: int) -> Iterator[Request]:
    """Endless requests of ``length`` tokens for a ``Feed``, cycling through the prompts. The first
    ``batch`` have staggered lengths, so that requests do not end together."""
    for number, prompt in enumerate(itertools.cycle(prompts)):
        num = max(1, length * (number + 1) // batch) if number < batch else length
        sampling = SamplingParams(temperature=0.0, max_tokens=num, ignore_eos=True)
        yield Request(f"feed-{number}", prompt, sampling, capture=False)


def arm_steps(before: Any, after: Any) -> dict[str, int]:
    """Steps of each (drafter, K) between two ``Engine.figures()``, keyed ``drafter-kK``."""
    former = before.steps_by_arm
    more = {key: count - former.get(key, 0) for key, count in after.steps_by_arm.items()}
    return {f"{kind}-k{k}": count for (kind, k), count in sorted(more.items()) if count}
