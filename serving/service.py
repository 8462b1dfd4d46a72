"""The running server without its HTTP face: engine, recorder and swapper under one roof."""

from __future__ import annotations

import gc
from dataclasses import replace
from typing import Any

from serving.capture.recorder import Recorder
from serving.engine.loop import Engine
from serving.requests import EngineFigures, OnOutput, Request
from serving.swap.swapper import Swapper

_FULL_COLLECTION = 1000
"""Collections of the middle generation from one full collection to the next: a quarter of an hour
at full load, where Python's own 10 make it 8 seconds."""


class Service:
    """What HTTP talks to. See ``serving.http.face.EngineFace``."""

    def __init__(self, engine: Engine, recorder: Recorder | None, swapper: Swapper | None) -> None:
        self.engine = engine
        self.recorder = recorder
        self.swapper = swapper
        self.tokenizer: Any = engine.tokenizer
        self.max_model_len = engine.max_model_len
        self.vocab_size = engine.vocab_size
        self.max_draft = engine.max_draft
        self.model_name = engine.model_name
        self.created_unix_s = engine.created_unix_s
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
        self.engine.submit(request, on_output)

    def cancel(self, request_id: str) -> None:
        """See ``Engine.cancel``."""
        self.engine.cancel(request_id)

    def figures(self) -> EngineFigures:
        """The engine's figures with those of swaps and traces."""
        return replace(
            self.engine.figures(),
            swaps=self.swapper.counts() if self.swapper else {},
            swap_seconds=self.swapper.swap_seconds if self.swapper else 0.0,
            traces=self.recorder.counts() if self.recorder else {},
        )

    def policy_figures(self) -> dict[str, Any]:
        """See ``Engine.policy_figures``."""
        return self.engine.policy_figures()

    def drafter_status(self) -> dict[str, Any]:
        """Kind, version, parent, staleness, state and history of the neural drafter."""
        if self.swapper:
            return self.swapper.status()
        kind = "suffix" if self.engine.drafting.suffix else "none"
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
        self.engine.drain()

    def num_inflight(self) -> int:
        """See ``Engine.num_inflight``."""
        return self.engine.num_inflight()

    def is_ready(self) -> bool:
        """See ``Engine.is_ready``."""
        return self.engine.is_ready()
