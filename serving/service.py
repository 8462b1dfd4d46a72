"""The running server without its HTTP face: engine, recorder and swapper under one roof."""

from __future__ import annotations

import gc
from dataclasses import dataclass, replace
from typing import Any

from serving.capture.recorder import Recorder
from serving.capture.traces import TraceMaker
from serving.engine.inbox import Limits
from serving.engine.loop import Engine
from serving.requests import EngineFigures, OnOutput, Request
from serving.swap.swapper import Swapper

_FULL_COLLECTION = 1000
"""Collections of the middle generation from one full collection to the next: a quarter of an hour
at full load, where Python's own 10 make it 8 seconds."""


@dataclass(frozen=True, slots=True)
class ServedModel:
    """What clients may know about the target."""

    name: str
    tokenizer: Any
    """The target's ``transformers`` tokenizer."""
    max_draft: int
    """Largest K that may be planned."""
    limits: Limits
    created_unix_s: int


class Service:
    """What HTTP talks to. See ``serving.http.face.EngineFace``."""

    def __init__(
        self,
        model: ServedModel,
        engine: Engine,
        recorder: Recorder | None,
        maker: TraceMaker | None,
        swapper: Swapper | None,
    ) -> None:
        self.model = model
        self.engine = engine
        self.recorder = recorder
        self.maker = maker
        self.swapper = swapper
        self.tokenizer: Any = model.tokenizer
        self.max_model_len = model.limits.max_model_len
        self.vocab_size = model.limits.vocab_size
        self.max_draft = model.max_draft
        self.model_name = model.name
        self.created_unix_s = model.created_unix_s
        self._thresholds = gc.get_threshold()

    def start(self) -> None:
        """Begin decoding, recording and watching for new versions.

        First it takes what was made so far out of the garbage collector's sight, until ``stop``:
        400,000 objects of torch, transformers and the engine that live as long as the server, over
        which a full collection walks for 0.16 s, on whatever thread it begins, while no other runs
        any Python and so no step begins. The rounds of the requests in flight are 100,000 more, 40
        ms: full collections, which find next to nothing, become rare.
        """
        gc.collect()
        gc.freeze()
        youngest, middle, _ = self._thresholds
        gc.set_threshold(youngest, middle, _FULL_COLLECTION)
        if self.recorder:
            self.recorder.start()
        self.engine.start()
        if self.swapper:
            self.swapper.start()

    def stop(self) -> None:
        """End everything; traces that are queued are written first."""
        if self.swapper:
            self.swapper.stop()
        self.engine.stop()
        if self.recorder:
            self.recorder.close(timeout_s=10.0)
        gc.unfreeze()  # the engine is garbage once its last user is gone
        gc.set_threshold(*self._thresholds)

    def submit(self, request: Request, on_output: OnOutput) -> None:
        """See ``Engine.submit``."""
        self.engine.inbox.submit(request, on_output)

    def cancel(self, request_id: str) -> None:
        """See ``Engine.cancel``."""
        self.engine.inbox.cancel(request_id)

    def figures(self) -> EngineFigures:
        """The engine's figures with those of swaps and traces."""
        return replace(
            self.engine.figures(),
            swaps=self.swapper.counts() if self.swapper else {},
            swap_seconds=self.swapper.swap_seconds if self.swapper else 0.0,
            traces=self.recorder.counts() if self.recorder else {},
            capture_rows_dropped=self.maker.num_lost_rows if self.maker else 0,
        )

    def policy_figures(self) -> dict[str, Any]:
        """See ``Engine.policy_figures``."""
        return self.engine.policy.figures()

    def drafter_status(self) -> dict[str, Any]:
        """Kind, version, parent, staleness, state and history of the neural drafter."""
        if self.swapper:
            return self.swapper.status()
        kind = next(iter(self.engine.drafting.hosts), "none")
        return {
            "kind": kind,
            "version": 0,
            "parent": None,
            "staleness": 0,
            "state": "steady",
            "versions": [],
            "former": None,
            "last_error": None,
        }

    def swap(self, version: int | None) -> dict[str, Any]:
        """See ``Swapper.swap``."""
        return self._swapper().swap(version)

    def rollback(self) -> dict[str, Any]:
        """See ``Swapper.rollback``."""
        return self._swapper().rollback()

    def _swapper(self) -> Swapper:
        if self.swapper is None:
            raise ValueError("this server runs no neural drafter; there is nothing to swap")
        return self.swapper

    def drain(self) -> None:
        """See ``Engine.drain``."""
        self.engine.inbox.drain()

    def num_inflight(self) -> int:
        """See ``Engine.num_inflight``."""
        return self.engine.inbox.num_inflight()

    def is_ready(self) -> bool:
        """See ``Engine.is_ready``."""
        return self.engine.is_ready()
