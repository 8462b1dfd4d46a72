"""One checkout's half of a paired measurement (``benchmarks/house.py``): a process that builds an
engine of the checkout it is started in and measures on command.

Started as a file, with the checkout as PYTHONPATH, so that one script measures an older commit as
well. From that checkout it imports what every version has, under either of its names; from its own
folder only ``shapes.py`` and ``predictable.py``, which import nothing of the project.

Reads one JSON command per line and answers each with one line that begins with ``ANSWER``.
"""

from __future__ import annotations

import contextlib
import gc
import hashlib
import importlib
import importlib.util
import inspect
import json
import statistics
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

ANSWER = "ANSWER "
_PATIENCE_S = 300.0
"""Longest wait for the answers of one turn."""


def _beside(name: str) -> ModuleType:
    """A module of this file's folder, loaded by its path."""
    spec = importlib.util.spec_from_file_location(name, Path(__file__).with_name(f"{name}.py"))
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def _first(*names: str) -> Any:
    """The first of ``module:attribute`` that this checkout has."""
    for name in names:
        module, _, attribute = name.partition(":")
        with contextlib.suppress(ImportError, AttributeError):
            return getattr(importlib.import_module(module), attribute)
    raise ImportError(f"this checkout has none of {', '.join(names)}")


class Chosen:
    """A policy that plays the arm set by the measurement, and keeps what steps took.

    Has the methods of both versions of ``DraftPolicy``.
    """

    def __init__(self, decision: Any) -> None:
        self._decision = decision
        self.arm = ("none", 0)
        self.steps: list[tuple[float, int, int]] = []
        """Seconds, requests and accepted tokens of each step without prefill."""

    def rest(self) -> None:
        """Never decide without an observation, as ``FixedPolicy``."""

    def plan(self, obs: Any) -> Any:
        """The arm, limited as ``FixedPolicy`` limits it."""
        drafter, wanted = self.arm
        k = min(wanted, obs.max_draft, max(obs.caps))
        if k == 0 or drafter not in obs.drafters:
            return self._decision("none", 0, 1.0, False, "plain")
        return self._decision(drafter, k, 1.0, False, "fixed")

    def observe(self, outcome: Any) -> None:
        if not outcome.has_prefill:
            accepted = sum(row.num_accepted for row in outcome.rows)
            self.steps.append((outcome.step_s, outcome.batch, accepted))

    def on_swap(self, *_: Any) -> None: ...

    def calibrate(self, *_: Any) -> None: ...

    def figures(self) -> dict[str, Any]:
        return {}


class Side:
    """The engine that is measured; built once per shape."""

    def __init__(self) -> None:
        self._open = contextlib.ExitStack()
        self._service: Any = None
        self._policy = Chosen(_first("policies.interface:Decision"))
        self._vocab_size = 0
        self._is_predictable = False
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
        programs: str = "auto",
    ) -> dict[str, Any]:
        """Build and start an engine.

        Args:
            shape: ``bundled`` or a key of ``shapes.SHAPES``.
            programs: ``engine.programs``, where this checkout has that setting.
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
        engine_settings = _first("configs.schema:EngineSettings").model_fields
        if "programs" in engine_settings:
            engine["programs"] = programs
        chosen: dict[str, Any] = {
            "run_dir": folder,
            "device": device,
            "engine": engine,
            "drafter": {"kind": "eagle3", "max_draft": max_draft, "suffix": {"enabled": False}},
            "policy": {"kind": "fixed", "draft_k": 0},
            "capture": {"enabled": True},
            "swap": {"enabled": False},
        }
        loaded = None
        if shape == "bundled":
            chosen["target"] = "examples/target"
            chosen["drafter"]["path"] = "examples/drafter/0"
            self._vocab_size = json.loads(Path("examples/target/config.json").read_text())[
                "vocab_size"
            ]
        else:
            loaded = self._predictable(shape, torch.device(device), folder / "weights")
        self._is_predictable = shape != "bundled"
        settings = _first("configs.schema:Settings").model_validate(chosen)
        self._service = self._built(settings, loaded)
        self._service.start()
        return {"built_s": time.perf_counter() - started}

    def _built(self, settings: Any, loaded: Any) -> Any:
        build = _first("serving.build:build_service", "serving.build:build_engine")
        if "policy" in inspect.signature(build).parameters:
            return build(settings, loaded, policy=self._policy)
        service = build(settings, loaded)
        service.engine.policy = self._policy
        return service

    def _predictable(self, shape: str, device: torch.device, root: Path) -> Any:
        """A target that walks a cycle, and its drafter published as version 0."""
        shapes, predictable = _beside("shapes"), _beside("predictable")
        torch.manual_seed(0)
        config = shapes.SHAPES[shape]()
        dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        model = shapes.random_weights(config, device, dtype)
        predictable.make_target_predictable(model)
        fingerprint = hashlib.sha256(f"predictable {shape}".encode()).hexdigest()
        self._vocab_size = config.vocab_size

        eagle3 = "drafters.eagle3.model", "drafters.eagle3"
        config_for = _first(*(f"{module}:config_for_target" for module in eagle3))
        make = _first(*(f"{module}:Eagle3" for module in eagle3))
        with device:
            drafter = make(
                config_for(config, draft_vocab_size=shapes.draft_vocab_size(config.vocab_size))
            )
        drafter.to(dtype)
        shapes.draw_weights(drafter)
        tensors = drafter.bundle_tensors()
        predictable.make_drafter_predictable(tensors, config.hidden_size)
        self._publish(root, drafter.config.to_json(), fingerprint, tensors)

        tokenizer = number_tokenizer(config.vocab_size)
        make_loaded = _first("serving.build:LoadedTarget", "targets.load:LoadedTarget")
        return make_loaded(
            model=model, tokenizer=tokenizer, fingerprint=fingerprint, name=f"predictable-{shape}"
        )

    def _publish(
        self, root: Path, config: dict[str, Any], fingerprint: str, tensors: dict[str, Any]
    ) -> None:
        from safetensors.torch import save

        manifest = _first("buffer.records:Manifest")(0, None, "eagle3", config, fingerprint, {})
        content = save({name: tensor.cpu() for name, tensor in tensors.items()})
        _first("buffer.weights:publish")(
            root, manifest, {_first("buffer.weights:TENSORS"): content}
        )

    def close(self) -> dict[str, Any]:
        """Stop the engine and give back its memory."""
        if self._service is not None:
            self._service.stop()
        self._service = None
        self._open.close()
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        return {}

    # ---- measuring -----------------------------------------------------------------------------

    def _request(self, ids: Sequence[int], max_tokens: int) -> Any:
        names = "serving.requests", "serving.types"
        sampling = _first(*(f"{module}:SamplingParams" for module in names))(
            temperature=0.0, max_tokens=max_tokens, ignore_eos=True
        )
        self._num_asked += 1
        make = _first(*(f"{module}:Request" for module in names))
        return make(f"house-{self._num_asked}", tuple(ids), sampling)

    def turn(
        self, drafter: str, draft_k: int, prompts: list[list[int]], max_tokens: int
    ) -> dict[str, Any]:
        """Answer all prompts as one batch.

        Returns:
            ``tokens_per_s`` from submission to the last token; processor time of all threads per
            token, which other processes on the host disturb less; the median time of a step
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

            self._service.engine.submit(self._request(ids, max_tokens), take)

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
        seconds: float,
    ) -> dict[str, Any]:  # fmt: skip
        """Keep ``batch`` requests in flight: whenever one ends, another begins.

        Lengths of answers are spread over half to all of ``max_tokens``, so that requests end one
        at a time.
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
            self._service.engine.submit(self._request(ids, length), take)

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
        self._policy.arm = (drafter, draft_k)
        self._policy.steps.clear()

    def _step_figures(self, batch: int) -> dict[str, Any]:
        steps = [step for step in list(self._policy.steps) if step[1] == batch]
        if not steps:
            return {"step_ms": None, "tokens_per_step": None}
        return {
            "step_ms": statistics.median(s for s, _, _ in steps) * 1e3,
            "tokens_per_step": 1 + sum(a for _, _, a in steps) / sum(b for _, b, _ in steps),
        }

    def _check(self, prompts: list[list[int]], answers: list[list[int]]) -> None:
        if not self._is_predictable:
            return
        walks = _beside("predictable").is_continuation
        wrong = sum(not walks(p[-1], a) for p, a in zip(prompts, answers, strict=True))
        if wrong:
            raise RuntimeError(f"{wrong} of {len(prompts)} answers are not the target's own")

    def prompts(self, batch: int, length: int, seed: int) -> dict[str, Any]:
        """Random prompts that end on a token of the cycle; for predictable shapes."""
        made = _beside("predictable").prompts(batch, length, self._vocab_size, seed)
        return {"prompts": made}


def number_tokenizer(vocab_size: int) -> Any:
    """A tokenizer in which every id is a word: text of random ids costs what text costs."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast

    words = {f" {token}": token for token in range(vocab_size)}
    tokenizer = Tokenizer(WordLevel(words, unk_token=" 0"))
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token=" 0")


def _commands() -> Iterator[dict[str, Any]]:
    for line in sys.stdin:
        yield json.loads(line)


def main() -> None:
    """Serve commands until the input ends."""
    side = Side()
    for command in _commands():
        name = command.pop("do")
        try:
            found = getattr(side, name)(**command)
        except Exception as error:  # the other side's figures are worth having
            traceback.print_exc()
            found = {"error": f"{type(error).__name__}: {error}"[:2000]}
        print(ANSWER + json.dumps(found), flush=True)
    side.close()


if __name__ == "__main__":
    main()
