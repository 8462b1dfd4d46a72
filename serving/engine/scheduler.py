"""Chooses who runs in the next step: admission with full reservation, prefix reuse, chunked
prefill.

A request is admitted only when pages for its whole possible length are free, so a running request
never has to be evicted.

A program of prompt chunks takes as long as a round even for one short prompt, and all decoding
requests wait for it. So while many requests decode, short prompts wait a few milliseconds for each
other.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

from serving.engine.pages import PagePool, page_names, page_root
from serving.engine.sequence import Sequence

_GROUP = 8
"""Prefill once at least one prompt is waiting per this many decoding requests."""
_FULL_ROWS = 512
"""Prefill once this many prompt rows are waiting, whatever the number of prompts."""


@dataclass(frozen=True, slots=True)
class Chunk:
    """Consecutive prompt positions of one request, computed in one step."""

    sequence: Sequence
    start: int
    end: int

    @property
    def num_rows(self) -> int:
        """Positions to compute."""
        return self.end - self.start

    @property
    def is_last(self) -> bool:
        """Reaches the anchor: its last row yields the first token."""
        return self.end == len(self.sequence.tokens)


@dataclass(frozen=True, slots=True)
class StepPlan:
    """The work of one step."""

    decode: list[Sequence]
    chunks: tuple[Chunk, ...]


class Scheduler:
    """Waiting and running requests, first come first served."""

    def __init__(
        self,
        pool: PagePool,
        page_size: int,
        max_batch: int,
        prefill_chunk: int,
        max_draft: int,
        prefill_hold_s: float = 0.0,
    ) -> None:
        """
        Args:
            prefill_hold_s: maximum time that a prompt waits for others.
        """
        self.pool = pool
        self.page_size = page_size
        self.max_batch = max_batch
        self.prefill_chunk = prefill_chunk
        self.max_draft = max_draft
        self.prefill_hold_s = prefill_hold_s
        self.target_version = 0
        """How often the target's weights were replaced."""
        self._held_from_s: float | None = None
        self.waiting: deque[Sequence] = deque()
        self._fresh: list[Sequence] = []
        """Admitted, the prompt not known to be computed."""
        self._decoding: list[Sequence] = []

    @property
    def running(self) -> list[Sequence]:
        """Requests that were admitted and have not ended."""
        return self._decoding + self._fresh

    @property
    def num_running(self) -> int:
        return len(self._decoding) + len(self._fresh)

    def num_pages_for(self, num_prompt: int, max_tokens: int) -> int:
        """Pages for every position a request can ever write, drafted ones included."""
        length = num_prompt + max_tokens + self.max_draft + 1
        return -(-length // self.page_size)

    def admit(self) -> list[Sequence]:
        """Move waiting requests into the batch while slots and pages last; returns the new ones."""
        admitted = []
        while self.waiting and self.num_running < self.max_batch:
            sequence = self.waiting[0]
            if not self._reserve(sequence):
                break
            self.waiting.popleft()
            sequence.target_version = self.target_version
            self._fresh.append(sequence)
            admitted.append(sequence)
        return admitted

    def _reserve(self, sequence: Sequence) -> bool:
        # The anchor must be computed in any case, so its page is never taken from the cache.
        root = page_root(sequence.request.namespace)
        names = page_names(sequence.tokens[:-1], self.page_size, root)
        cached = self.pool.lookup(names)
        max_tokens = sequence.request.sampling.max_tokens
        fresh = self.num_pages_for(sequence.num_prompt, max_tokens) - len(cached)
        if fresh + self.pool.num_idle(cached) > self.pool.num_available:
            return False
        self.pool.share(cached)
        sequence.pages = cached + self.pool.take(fresh)
        sequence.names = names[: len(cached)]
        sequence.num_named = len(cached)
        sequence.num_cached = sequence.num_computed = len(cached) * self.page_size
        return True

    def plan(self, now_s: float) -> StepPlan:
        """Decode every prefilled request; fill the prefill budget in order of arrival, unless the
        prompts are held back to wait for others.

        Args:
            now_s: current time, on any clock.
        """
        if self._fresh:
            self._decoding += [s for s in self._fresh if s.is_prefilled]
            self._fresh = [s for s in self._fresh if not s.is_prefilled]
        decode, fresh = self._decoding.copy(), self._fresh
        if self._holds(len(decode), fresh, now_s) or not fresh:
            return StepPlan(decode, ())
        chunks = []
        budget = self.prefill_chunk
        for sequence in fresh:
            if budget == 0:
                break
            start = sequence.num_computed
            end = min(len(sequence.tokens), start + budget)
            chunks.append(Chunk(sequence, start, end))
            budget -= end - start
        return StepPlan(decode, tuple(chunks))

    def _holds(self, num_decoding: int, fresh: list[Sequence], now_s: float) -> bool:
        """Whether the prompts wait for others; the wait counts from the first step held back."""
        from_s = now_s if self._held_from_s is None else self._held_from_s
        holds = (
            0 < len(fresh) < num_decoding // _GROUP
            and now_s - from_s < self.prefill_hold_s
            and all(s.num_computed == s.num_cached for s in fresh)
            and sum(len(s.tokens) - s.num_computed for s in fresh) < _FULL_ROWS
        )
        self._held_from_s = from_s if holds else None
        return holds

    def name_full_pages(self, sequence: Sequence) -> list[int]:
        """Declare newly completed pages to the prefix cache; returns those pages."""
        full = sequence.num_computed // self.page_size
        fresh = []
        while sequence.num_named < full:
            index = sequence.num_named
            start = index * self.page_size
            parent = sequence.names[-1] if index else page_root(sequence.request.namespace)
            tokens = sequence.tokens[start : start + self.page_size]
            sequence.names += page_names(tokens, self.page_size, parent)
            self.pool.name(sequence.pages[index], sequence.names[-1])
            fresh.append(sequence.pages[index])
            sequence.num_named += 1
        return fresh

    def target_changed(self) -> list[Sequence]:
        """Nothing that was computed counts any more: forget all cached prefixes, and compute the
        text of every running request from its beginning again. Returns these requests.

        Requests that share pages all write the same rows into them, each before it reads them.
        """
        self.target_version += 1
        self.pool.forget_all()
        self._fresh, self._decoding = self.running, []
        for sequence in self._fresh:
            sequence.target_changed(self.target_version)
        return self._fresh.copy()

    def forget_pages(self, sequence: Sequence) -> None:
        """Take a request's pages out of the prefix cache: they may hold NaN, also those that it
        found there."""
        self.pool.forget(sequence.pages)

    def remove(self, sequence: Sequence) -> None:
        """Take a finished or cancelled request out and give its pages back."""
        for running in (self._decoding, self._fresh):
            if sequence in running:
                running.remove(sequence)
                self.pool.release(sequence.pages)
                sequence.pages = []
        if sequence in self.waiting:
            self.waiting.remove(sequence)
