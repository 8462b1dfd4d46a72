"""A log line every few seconds while there is traffic: the figures of vLLM's periodic line, and how
well drafts are accepted.

A separate thread takes the differences of ``EngineFigures``; the engine's thread is not involved.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from serving.requests import EngineFigures

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Window:
    """The engine's figures at the start and end of a time window."""

    before: EngineFigures
    after: EngineFigures
    seconds: float
    """> 0."""

    @property
    def had_traffic(self) -> bool:
        """Tokens were processed in it, or requests are unfinished at its end."""
        return bool(
            self._grown("prompt_tokens")
            or self._grown("generation_tokens")
            or self.after.num_running
            or self.after.num_waiting
        )

    @property
    def prompt_tokens_per_s(self) -> float:
        return self._grown("prompt_tokens") / self.seconds

    @property
    def generation_tokens_per_s(self) -> float:
        return self._grown("generation_tokens") / self.seconds

    @property
    def prefix_cache_hit_rate(self) -> float | None:
        """Share of prompt tokens found in the prefix cache, in [0, 1]; ``None`` without prompts."""
        return _ratio(self._grown("cached_prompt_tokens"), self._grown("prompt_tokens"))

    @property
    def tokens_per_step(self) -> float | None:
        """Tokens committed per target pass of a request; ``None`` when none were."""
        return _ratio(self._grown("generation_tokens"), self._grown("num_request_steps"))

    @property
    def acceptance_rate(self) -> float | None:
        """Accepted / proposed, in [0, 1]; ``None`` when nothing was proposed."""
        return _ratio(self._grown("num_accepted_tokens"), self._grown("num_draft_tokens"))

    def line(self) -> str:
        """One line of text, with vLLM's names where vLLM has the figure."""
        return (
            f"Avg prompt throughput: {self.prompt_tokens_per_s:.1f} tokens/s, "
            f"Avg generation throughput: {self.generation_tokens_per_s:.1f} tokens/s, "
            f"Running: {self.after.num_running} reqs, Waiting: {self.after.num_waiting} reqs, "
            f"KV cache usage: {self.after.kv_usage:.1%}, "
            f"Prefix cache hit rate: {_shown(self.prefix_cache_hit_rate, '.1%')}, "
            f"Tokens per step: {_shown(self.tokens_per_step, '.2f')}, "
            f"Acceptance rate: {_shown(self.acceptance_rate, '.1%')}, "
            f"Drafter version: {self.after.drafter_version}"
        )

    def _grown(self, counter: str) -> int:
        grown: int = getattr(self.after, counter) - getattr(self.before, counter)
        return grown


@contextmanager
def periodic_stats(figures: Callable[[], EngineFigures], every_s: float) -> Iterator[None]:
    """Log a line every ``every_s`` seconds of traffic until the block ends; 0 logs none.

    Args:
        figures: called from another thread.
    """
    if every_s == 0:
        yield
        return
    stopping = threading.Event()
    thread = threading.Thread(
        target=_run, args=(figures, every_s, stopping), name="periodic-stats", daemon=True
    )
    thread.start()
    try:
        yield
    finally:
        stopping.set()
        thread.join()


def _run(figures: Callable[[], EngineFigures], every_s: float, stopping: threading.Event) -> None:
    before, began_s = figures(), time.monotonic()
    while not stopping.wait(every_s):
        after, now_s = figures(), time.monotonic()
        window = Window(before, after, now_s - began_s)
        if window.had_traffic:
            log.info(window.line())
        before, began_s = after, now_s


def _ratio(part: int, whole: int) -> float | None:
    return part / whole if whole else None


def _shown(value: float | None, form: str) -> str:
    return "None" if value is None else format(value, form)
