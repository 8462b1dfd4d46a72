"""Passes requests, cancellations and drain orders from other threads to the engine's thread.

The engine's thread takes what has arrived between two steps, under a lock around two short lists.
"""

from __future__ import annotations

import secrets
import threading
from collections import deque
from collections.abc import Callable
from collections.abc import Sequence as Several
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from serving.engine.detokenize import Detokenizer
from serving.engine.handover import Handover
from serving.engine.lanes import MOST_BIASES
from serving.engine.round_buffers import MOST_LOGPROBS
from serving.engine.scheduler import Scheduler
from serving.engine.sequence import Sequence
from serving.engine.vocabulary import Vocabulary
from serving.requests import DrainingError, OnOutput, QueueFullError, Request


@dataclass(frozen=True, slots=True)
class Limits:
    """What a request may ask for."""

    vocab_size: int
    max_model_len: int
    max_queue: int
    """Maximum number of waiting requests."""


class Sequences:
    """Makes the running state of requests."""

    def __init__(
        self,
        tokenizer: Any,
        eos_ids: frozenset[int],
        seed: int,
        captures: Callable[[str], bool] = lambda tenant: True,
    ) -> None:
        """
        Args:
            captures: whether the traffic of a tenant may be captured.
            seed: determines the random numbers of requests without a seed; 0 draws one.
        """
        self._vocabulary = Vocabulary(tokenizer)
        self._eos_ids = eos_ids
        self._captures = captures
        self._keys = np.random.default_rng(seed if seed else secrets.randbits(64))

    def new(self, request: Request, on_output: OnOutput) -> Sequence:
        """State of a request that has just arrived."""
        if request.capture and not self._captures(request.tenant):
            request = replace(request, capture=False)
        sampling = request.sampling
        seed = sampling.seed
        key = int(self._keys.integers(1 << 63)) if seed is None else seed & ((1 << 64) - 1)
        return Sequence(
            request=request,
            on_output=on_output,
            key=key,
            detokenizer=Detokenizer(
                self._vocabulary,
                request.prompt_ids,
                stop=sampling.stop,
                skip_special=sampling.skip_special_tokens,
                keeps_stop=sampling.include_stop_str_in_output,
            ),
            eos_ids=frozenset() if sampling.ignore_eos else self._eos_ids,
            tokens=list(request.prompt_ids),
        )


class Inbox:
    """Requests on their way to the engine, and those it has not finished."""

    def __init__(self, limits: Limits, sequences: Sequences, scheduler: Scheduler) -> None:
        """
        Args:
            scheduler: says how many requests wait and how many pages a request needs.
        """
        self.limits = limits
        self.handover = Handover()
        """For ``on_output`` to put off what it does for many outputs at once."""
        self._sequences = sequences
        self._scheduler = scheduler
        self._wake = threading.Condition()
        self._arrived: deque[Sequence] = deque()
        self._cancels: list[str] = []
        self._inflight: dict[str, Sequence] = {}
        self._is_draining = False
        self._is_closed = False

    # ---- called from other threads -------------------------------------------------------------

    def submit(self, request: Request, on_output: OnOutput) -> None:
        """``submit_all`` of one request."""
        self.submit_all((request,), on_output)

    def submit_all(self, requests: Several[Request], on_output: OnOutput) -> None:
        """Queue all requests, or none: the engine sees none of them before all are accepted.

        Args:
            on_output: called on the engine's thread until each request has finished.

        Raises:
            ValueError: one can never be served; the message names the field.
            QueueFullError, DrainingError: they cannot be served now.
        """
        for request in requests:
            self._check(request)
        sequences = {one.id: self._sequences.new(one, on_output) for one in requests}
        with self._wake:
            if self._is_draining:
                raise DrainingError("the server is draining")
            known = set[str]()
            for request in requests:
                if request.id in self._inflight or request.id in known:
                    raise ValueError(f"request id {request.id!r} is already in flight")
                known.add(request.id)
            if self.num_waiting() + len(requests) > self.limits.max_queue:
                raise QueueFullError(f"{self.limits.max_queue} requests are already waiting")
            self._inflight |= sequences
            self._arrived.extend(sequences.values())
            self._wake.notify()

    def cancel(self, request_id: str) -> None:
        """Stop a request and free its pages; unknown ids are ignored (it may just have ended)."""
        with self._wake:
            self._cancels.append(request_id)
            self._wake.notify()

    def cancel_all(self) -> None:
        """Stop every request in flight."""
        with self._wake:
            self._cancels.extend(self._inflight)
            self._wake.notify()

    def drain(self) -> None:
        """Admit no new requests; those in flight continue."""
        with self._wake:
            self._is_draining = True

    def close(self) -> None:
        """Drain, and let ``wait`` return."""
        with self._wake:
            self._is_closed = self._is_draining = True
            self._wake.notify()

    def wake(self) -> None:
        """Let an idle engine run a step, because it has something else to do."""
        with self._wake:
            self._wake.notify()

    @property
    def is_draining(self) -> bool:
        return self._is_draining

    @property
    def is_closed(self) -> bool:
        return self._is_closed

    def num_inflight(self) -> int:
        """Requests submitted and not finished."""
        return len(self._inflight)

    def num_waiting(self) -> int:
        """Requests that do not run yet."""
        return len(self._arrived) + len(self._scheduler.waiting)

    # ---- called from the engine's thread -------------------------------------------------------

    def take(self) -> tuple[list[Sequence], list[Sequence]]:
        """Requests that arrived and requests to cancel, since the last call."""
        if not (self._arrived or self._cancels):  # nearly every step: the lock is for the others
            return [], []
        with self._wake:
            arrived, cancels = list(self._arrived), self._cancels
            self._arrived.clear()
            self._cancels = []
        return arrived, [s for i in cancels if (s := self._inflight.get(i)) is not None]

    def remove(self, request_id: str) -> None:
        """Forget a request that has finished."""
        self._inflight.pop(request_id, None)

    def inflight(self) -> list[Sequence]:
        """Requests submitted and not finished."""
        return list(self._inflight.values())

    def wait(self, timeout_s: float = 0.5) -> bool:
        """Sleep until there is something to do, or the timeout expires. Returns False if nothing
        has come."""
        with self._wake:
            if self._arrived or self._cancels or self._is_closed:
                return True
            return self._wake.wait(timeout_s)

    def _check(self, request: Request) -> None:
        limits = self.limits
        num_prompt, sampling = len(request.prompt_ids), request.sampling
        if num_prompt == 0:
            raise ValueError("prompt must hold at least one token")
        for token in min(request.prompt_ids), max(request.prompt_ids):
            if not 0 <= token < limits.vocab_size:
                raise ValueError(
                    f"prompt holds token id {token}, outside 0..{limits.vocab_size - 1}"
                )
        if len(sampling.logit_bias) > MOST_BIASES:
            raise ValueError(
                f"logit_bias holds {len(sampling.logit_bias)} tokens, at most {MOST_BIASES} are "
                f"allowed"
            )
        if sampling.logprobs is not None and sampling.logprobs > MOST_LOGPROBS:
            raise ValueError(f"logprobs is {sampling.logprobs}, at most {MOST_LOGPROBS}")
        total = num_prompt + sampling.max_tokens
        if total > limits.max_model_len:
            raise ValueError(
                f"prompt ({num_prompt} tokens) and max_tokens ({sampling.max_tokens}) make "
                f"{total}, more than max_model_len={limits.max_model_len}"
            )
        need = self._scheduler.num_pages_for(num_prompt, sampling.max_tokens)
        if need > self._scheduler.pool.num_usable:
            raise ValueError(
                f"max_tokens={sampling.max_tokens} needs {need} KV pages, the pool has "
                f"{self._scheduler.pool.num_usable}"
            )
