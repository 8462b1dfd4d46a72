"""The loop that drives a server through HTTP: client processes send each request when it is due.

Each client is an asyncio loop with httpx in its own process. It also measures its own overhead: how
late it sent requests, how late it woke for a timer, and its CPU time.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import httpx
import numpy as np

TICK_S = 0.01
"""Sleep of the timer that measures how late a client's loop wakes."""


@dataclass(frozen=True, slots=True)
class Arrival:
    """One request and when it is due."""

    at_s: float
    """Seconds after the start of the turn."""
    prompt: str


def arrivals(rate: float, seconds: float, prompts: Sequence[str], seed: int) -> list[Arrival]:
    """A Poisson process of ``rate`` requests per second; prompts repeat in order."""
    numbers = np.random.default_rng(seed)
    found: list[Arrival] = []
    at_s = float(numbers.exponential(1 / rate))
    while at_s < seconds:
        found.append(Arrival(at_s, prompts[len(found) % len(prompts)]))
        at_s += float(numbers.exponential(1 / rate))
    return found


@dataclass(frozen=True, slots=True)
class Ask:
    """Parameters that all requests of a turn share."""

    url: str
    model: str
    max_tokens: int
    max_draft: int | None
    """0: plain decoding; ``None``: the policy decides."""
    patience_s: float
    """Seconds after the last arrival of the turn until an unanswered request counts as failed."""

    def body(self, prompt: str) -> dict[str, Any]:
        return {
            "model": self.model,
            "prompt": prompt,
            "max_tokens": self.max_tokens,
            "temperature": 0,
            "ignore_eos": True,
            "stream": True,
            "return_token_ids": True,
            "capture": False,
            "speculation": {"max_draft": self.max_draft},
        }


@dataclass(frozen=True, slots=True)
class Answer:
    """One request as the client saw it."""

    late_s: float
    """Delay between due and sent."""
    events: tuple[tuple[float, int], ...]
    """(seconds after it was due, number of tokens) for every event with tokens."""
    error: str | None
    tokens_per_step: float | None


@dataclass(frozen=True, slots=True)
class Client:
    """One client process's part of a turn."""

    answers: list[Answer]
    cpu_s: float
    """CPU seconds of this process over the turn."""
    wall_s: float
    tick_late_s: list[float]
    """How late its loop woke at each tick."""


def run_client(ask: Ask, due: Sequence[Arrival], start_unix_s: float) -> Client:
    """Send every request when it is due; runs in its own process."""
    return asyncio.run(_client(ask, due, start_unix_s))


async def _client(ask: Ask, due: Sequence[Arrival], start_unix_s: float) -> Client:
    began_s = time.perf_counter() + (start_unix_s - time.time())
    lateness: list[float] = []
    ticker = asyncio.create_task(_tick(lateness))
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=None)
    async with httpx.AsyncClient(base_url=ask.url, timeout=None, limits=limits) as client:
        cpu_s, wall_s = time.process_time(), time.perf_counter()
        tasks = []
        for arrival in due:
            due_s = began_s + arrival.at_s
            await asyncio.sleep(max(0.0, due_s - time.perf_counter()))
            tasks.append(asyncio.create_task(_send(client, ask, arrival.prompt, due_s)))
        until_s = time.perf_counter() + ask.patience_s
        answers = [await _until(task, until_s) for task in tasks]
    ticker.cancel()
    spent_s = time.process_time() - cpu_s
    return Client(answers, spent_s, time.perf_counter() - wall_s, lateness)


async def _tick(lateness: list[float]) -> None:
    while True:
        before_s = time.perf_counter()
        await asyncio.sleep(TICK_S)
        lateness.append(time.perf_counter() - before_s - TICK_S)


async def _until(task: asyncio.Task[Answer], until_s: float) -> Answer:
    try:
        return await asyncio.wait_for(task, max(0.0, until_s - time.perf_counter()))
    except TimeoutError:
        return Answer(0.0, (), "unanswered when patience_s ended", None)


async def _send(client: httpx.AsyncClient, ask: Ask, prompt: str, due_s: float) -> Answer:
    late_s = time.perf_counter() - due_s
    events: list[tuple[float, int]] = []
    error: str | None = None
    spent: dict[str, Any] = {}
    try:
        async with client.stream("POST", "/v1/completions", json=ask.body(prompt)) as response:
            if response.status_code != 200:
                return Answer(late_s, (), f"HTTP {response.status_code}", None)
            is_done = False
            async for line in response.aiter_lines():
                if not line.startswith("data: "):
                    continue
                if line == "data: [DONE]":
                    is_done = True
                    break
                at_s = time.perf_counter() - due_s
                chunk = json.loads(line[6:])
                if "error" in chunk:
                    error = str(chunk["error"].get("message", chunk["error"]))
                    break
                num_tokens = sum(len(c.get("token_ids") or ()) for c in chunk["choices"])
                if num_tokens:
                    events.append((at_s, num_tokens))
                spent = chunk.get("speculation") or spent
            if not is_done and error is None:
                error = "the stream ended early"
    except httpx.HTTPError as problem:
        error = f"{type(problem).__name__}: {problem}"
    return Answer(late_s, tuple(events), error, spent.get("tokens_per_step"))
