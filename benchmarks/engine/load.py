"""Requests of random tokens on an engine whose steps the benchmark takes itself."""

from __future__ import annotations

import random
import time
from collections.abc import Sequence
from dataclasses import dataclass

from serving.engine.loop import Engine
from serving.engine.pages import page_names
from serving.requests import Output, Request, SamplingParams

Prompt = tuple[int, ...]


def random_prompts(num_prompts: int, length: int, vocab_size: int, seed: int = 0) -> list[Prompt]:
    """Prompts without a common prefix."""
    numbers = random.Random(f"{seed} {num_prompts} {length}")
    return [tuple(numbers.choices(range(vocab_size), k=length)) for _ in range(num_prompts)]


def declare_computed(engine: Engine, prompts: Sequence[Prompt]) -> None:
    """Name pages for all but the last tokens of each prompt, as if they had been computed.

    A context of many tokens is there at once then, in pages of its own; its keys and values are
    what lies there. The engine finds the pages in its prefix cache.
    """
    scheduler = engine.scheduler
    for prompt in prompts:
        names = page_names(prompt[:-1], scheduler.page_size)
        pages = scheduler.pool.take(len(names))
        for page, name in zip(pages, names, strict=True):
            scheduler.pool.name(page, name)
        scheduler.pool.release(pages)


def clear(engine: Engine) -> None:
    """Cancel what is in flight, and step until nothing is under way on the device."""
    engine.cancel_all()
    while engine.step():
        pass


class Load:
    """Greedy requests, one for each prompt, from submission to the end."""

    def __init__(
        self,
        engine: Engine,
        prompts: Sequence[Prompt],
        max_tokens: int,
        *,
        temperature: float = 0.0,
        capture: bool = False,
    ) -> None:
        clear(engine)  # of a load that failed
        self._engine = engine
        self._counts = [0] * len(prompts)
        self.errors: list[str] = []
        for number, ids in enumerate(prompts):
            sampling = SamplingParams(
                temperature=temperature, max_tokens=max_tokens, ignore_eos=True
            )

            def take(output: Output, number: int = number) -> None:
                self._counts[number] += len(output.token_ids)
                if output.error:
                    self.errors.append(output.error)

            engine.submit(Request(f"load-{number}", ids, sampling, capture=capture), take)

    @property
    def num_tokens(self) -> int:
        """Completion tokens so far."""
        return sum(self._counts)

    @property
    def has_begun(self) -> bool:
        """Every request has a token, so that only decoding is left."""
        return all(self._counts)

    def step(self) -> float:
        """One step of the engine, in seconds."""
        started = time.perf_counter()
        self._engine.step()
        return time.perf_counter() - started

    def begin(self, warm_ups: int = 0) -> None:
        """Step until all decode, and then some."""
        while not self.has_begun:
            if not self._engine.num_inflight():
                raise RuntimeError(f"requests ended before all had a token: {self.errors}")
            self.step()
        for _ in range(warm_ups):
            self.step()

    def end(self) -> None:
        """Cancel what is in flight."""
        clear(self._engine)
        assert not self.errors, self.errors[0]


@dataclass(frozen=True, slots=True)
class Turn:
    """All prompts of a load answered once."""

    num_tokens: int
    seconds: float
    """From submission to the last token."""
    decode_tokens: int
    """After every request had its first."""
    decode_s: float

    @property
    def tokens_per_s(self) -> float:
        return self.num_tokens / self.seconds

    @property
    def decode_tokens_per_s(self) -> float:
        return self.decode_tokens / self.decode_s


def answer_all(
    engine: Engine,
    prompts: Sequence[Prompt],
    max_tokens: int,
    *,
    temperature: float = 0.0,
    capture: bool = False,
) -> Turn:
    """One turn."""
    started = time.perf_counter()
    load = Load(engine, prompts, max_tokens, temperature=temperature, capture=capture)
    load.begin()
    begun, first = time.perf_counter(), load.num_tokens
    while engine.num_inflight():
        load.step()
    ended = time.perf_counter()
    load.end()
    total = load.num_tokens
    return Turn(total, ended - started, total - first, ended - begun)
