"""One checkout's half of a paired measurement (``benchmarks/house.py``): a process that builds an
engine from the checkout it is started in and measures it on command.

Run as a file, with the checkout on PYTHONPATH, so that the same script can measure an older commit.
The engine and everything below it come from that checkout; the ``benchmarks`` package is the one
this file belongs to, and only the parts of it that work with both versions are used.

Reads one JSON command per line and answers each with one line that starts with ``ANSWER``.
"""

from __future__ import annotations

import contextlib
import gc
import hashlib
import importlib.util
import inspect
import json
import statistics
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

ANSWER = "ANSWER "
_PATIENCE_S = 300.0
"""Longest wait for the next answer of a turn."""


def use_own_benchmarks() -> None:
    """Import ``benchmarks`` from this file's tree, whichever checkout comes first on the path."""
    folder = Path(__file__).resolve().parent.parent
    spec = importlib.util.spec_from_file_location(
        "benchmarks", folder / "__init__.py", submodule_search_locations=[str(folder)]
    )
    assert spec is not None
    sys.modules["benchmarks"] = importlib.util.module_from_spec(spec)


if __name__ == "__main__":
    use_own_benchmarks()

from benchmarks.harness import predictable  # noqa: E402
from benchmarks.harness.policy import PolicySwitch  # noqa: E402
from benchmarks.harness.random_targets import first, publish_drafters, random_target  # noqa: E402


class Side:
    """The engine under test; built once per shape."""

    def __init__(self) -> None:
        self._open = contextlib.ExitStack()
        self._service: Any = None
        self._fixed = first("policies.fixed:FixedPolicy")
        self._policy = PolicySwitch(self._fixed("none", 0))
        self._vocab_size = 0
        self._is_predictable = False
        self._lookup: str | None = None
        self._num_asked = 0

    # ---- building ------------------------------------------------------------------------------

    def build(
        self,
        shape: str,
        device: str,
        max_batch: int,
        max_draft: int,
        max_model_len: int,
        threads: int | None,
        lookup: str | None = None,
    ) -> dict[str, Any]:
        """Build and start an engine.

        Args:
            shape: ``bundled`` or a key of ``shapes.SHAPES``.
            lookup: kind of a drafter that follows the requests' text, too.
        """
        self.close()
        started = time.perf_counter()
        folder = Path(self._open.enter_context(tempfile.TemporaryDirectory()))
        is_gpu = device.startswith("cuda")
        engine = {
            "max_batch": max_batch,
            "max_queue": 4096,
            "max_model_len": max_model_len,
            "num_pages": (max_batch + 1) * (max_model_len // 16 + 2),
            "prefill_chunk": 4096 if is_gpu else 256,
            "prefix_cache": False,
            "cpu_threads": threads,
        }
        chosen: dict[str, Any] = {
            "run_dir": folder,
            "device": device,
            "engine": engine,
            "drafter": {
                "kind": "eagle3",
                "max_draft": max_draft,
                "suffix": {"enabled": lookup is not None},
            },
            "policy": {"kind": "fixed", "draft_k": 0},
            "capture": {"enabled": not is_gpu},  # on a GPU it would write 0.5 GB a turn
            "swap": {"enabled": False},
        }
        loaded = None
        if shape == "bundled":
            chosen["target"] = "examples/target"
            chosen["drafter"]["path"] = "examples/drafter/0"
        else:
            loaded = random_target(shape, torch.device(device), is_predictable=True)
            publish_drafters(folder / "weights", loaded, is_predictable=True)
            self._vocab_size = loaded.model.config.vocab_size
        self._is_predictable, self._lookup = shape != "bundled", lookup
        settings = first("configs.schema:Settings").model_validate(chosen)
        self._service = self._built(settings, loaded)
        self._service.start()
        return {"built_s": time.perf_counter() - started}

    def _built(self, settings: Any, loaded: Any) -> Any:
        build = first("serving.build:build_service", "serving.build:build_engine")
        if "wrap" in inspect.signature(build).parameters:
            return build(settings, loaded, wrap=lambda _own: self._policy)
        service = build(settings, loaded)
        service.engine.policy = self._policy
        return service

    def close(self) -> dict[str, Any]:
        """Stop the engine and free its memory."""
        if self._service is not None:
            self._service.stop()
        self._service = None
        self._open.close()
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        return {}

    # ---- measuring -----------------------------------------------------------------------------

    def _request(
        self, ids: Sequence[int], max_tokens: int, temperature: float = 0.0, seed: int | None = None
    ) -> Any:
        names = "serving.requests", "serving.types"
        sampling = first(*(f"{module}:SamplingParams" for module in names))(
            temperature=temperature, seed=seed, max_tokens=max_tokens, ignore_eos=True
        )
        self._num_asked += 1
        make = first(*(f"{module}:Request" for module in names))
        return make(f"house-{self._num_asked}", tuple(ids), sampling)

    def _submit(self, request: Any, take: Any) -> None:
        engine = self._service.engine
        getattr(engine, "inbox", engine).submit(request, take)

    def turn(
        self,
        drafter: str,
        draft_k: int,
        prompts: list[list[int]],
        max_tokens: int,
        temperature: float = 0.0,
    ) -> dict[str, Any]:
        """Answer all prompts as one batch, each with a seed that follows from the prompt.

        Returns:
            ``tokens_per_s`` from submission to the last token; CPU time of all threads per token,
            which is less sensitive to other processes on the host; the median time of a step
            without prefill; tokens emitted per such step and request; a digest of the answers.
        """
        self._arm(drafter, draft_k)
        answers: list[list[int]] = [[] for _ in prompts]
        left = threading.Semaphore(0)
        errors: list[str] = []

        def ask(number: int, ids: list[int]) -> None:
            def take(output: Any) -> None:
                answers[number] += output.token_ids
                if output.error:
                    errors.append(output.error)
                if output.finish_reason is not None:
                    left.release()

            seed = sum(ids) if temperature else None
            self._submit(self._request(ids, max_tokens, temperature, seed), take)

        started, cpu_started = time.perf_counter(), time.process_time()
        for number, ids in enumerate(prompts):
            ask(number, ids)
        for _ in prompts:
            if not left.acquire(timeout=_PATIENCE_S):
                raise TimeoutError("the engine does not answer")
        seconds, cpu_s = time.perf_counter() - started, time.process_time() - cpu_started
        if errors:
            raise RuntimeError(errors[0])
        self._check(prompts, answers)
        return {
            "tokens_per_s": len(prompts) * max_tokens / seconds,
            "cpu_ms_per_token": cpu_s / (len(prompts) * max_tokens) * 1e3,
            **self._step_figures(len(prompts)),
            "digest": hashlib.sha256(json.dumps(answers).encode()).hexdigest()[:16],
        }

    def full(
        self, drafter: str, draft_k: int, prompts: list[list[int]], max_tokens: int, batch: int,
        seconds: float, temperature: float = 0.0,
    ) -> dict[str, Any]:  # fmt: skip
        """Keep ``batch`` requests in flight: whenever one ends, another starts.

        Answer lengths range from half of ``max_tokens`` to all of it, so that requests end one at a
        time.
        """
        self._arm(drafter, draft_k)
        num_tokens = 0
        is_over = False
        left = threading.Semaphore(0)

        def ask(number: int) -> None:
            length = max_tokens - (number * 37) % (max_tokens // 2)

            def take(output: Any) -> None:
                nonlocal num_tokens
                num_tokens += len(output.token_ids)
                if output.finish_reason is None:
                    return
                if is_over or output.error:
                    left.release()
                else:
                    ask(number + batch)

            ids = prompts[number % len(prompts)]
            self._submit(self._request(ids, length, temperature), take)

        for number in range(batch):
            ask(number)
        time.sleep(min(1.0, seconds / 2))  # until all decode
        self._policy.steps.clear()
        before, started = num_tokens, time.perf_counter()
        time.sleep(seconds)
        tokens, spent = num_tokens - before, time.perf_counter() - started
        found = {"tokens_per_s": tokens / spent, **self._step_figures(batch)}
        is_over = True
        for _ in range(batch):
            if not left.acquire(timeout=_PATIENCE_S):
                raise TimeoutError("the engine does not answer")
        return found

    def _arm(self, drafter: str, draft_k: int) -> None:
        # Beside a drafter that looks up matches, the others must not pay for looking.
        looks = {} if self._lookup is None else {"needs_match": drafter == self._lookup}
        self._policy.play(self._fixed(drafter, draft_k, **looks))

    def _step_figures(self, batch: int) -> dict[str, Any]:
        steps = [step for step in list(self._policy.steps) if step.batch == batch]
        if not steps:
            return {"step_ms": None, "tokens_per_step": None}
        return {
            "step_ms": statistics.median(step.seconds for step in steps) * 1e3,
            "tokens_per_step": statistics.fmean(step.tokens_per_request for step in steps),
        }

    def _check(self, prompts: list[list[int]], answers: list[list[int]]) -> None:
        if not self._is_predictable:
            return
        walks = predictable.is_continuation
        wrong = sum(not walks(p[-1], a) for p, a in zip(prompts, answers, strict=True))
        if wrong:
            raise RuntimeError(f"{wrong} of {len(prompts)} answers are not the target's own")

    def prompts(self, batch: int, length: int, seed: int) -> dict[str, Any]:
        """Random prompts that end with a token of the cycle; for predictable shapes."""
        return {"prompts": predictable.prompts(batch, length, self._vocab_size, seed)}


def main() -> None:
    """Serve commands until the input ends."""
    side = Side()
    for line in sys.stdin:
        command = json.loads(line)
        name = command.pop("do")
        try:
            found = getattr(side, name)(**command)
        except Exception as error:  # the other side's figures are still useful
            traceback.print_exc()
            found = {"error": f"{type(error).__name__}: {error}"[:2000]}
        print(ANSWER + json.dumps(found), flush=True)
    side.close()


if __name__ == "__main__":
    main()
