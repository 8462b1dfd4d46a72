"""Decode steps at a published shape with random weights: our decoder against other decoders.

Called by ``benchmarks.peers --shape``. Weights, keys and values are drawn on the device and are the
same for all decoders, so nothing is loaded and no prompt is prefilled. Each decoder starts with a
filled cache, ``num_new`` positions before the end of the context, and decodes greedily to that end.
Ours is the engine's decoder step in a CUDA graph that feeds its tokens back, like the simple loop;
its time excludes the engine's host work, while that of ``generate`` includes its own.
"""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers import DynamicCache, StaticCache

from benchmarks.harness.engines import release
from benchmarks.harness.results import Report
from benchmarks.harness.shapes import SHAPES, random_weights
from benchmarks.peers.compiled_loop import COMPILE_OPTIONS, CompiledLoop
from benchmarks.peers.decoders import Ids, compiled_once, seconds_of, without_end
from specops.attention import DecodePass, decode_slots
from targets.device import pick_device
from targets.load import pick_dtype
from targets.target import Target

_PAGE = 16
_WARM_UPS = 3
OURS = "ours, decoder step"


def random_model(config: Any, device: torch.device) -> Any:
    """A causal LM with weights drawn on the device; bfloat16, or float32 on a CPU."""
    return without_end(random_weights(config, device, pick_dtype("auto", device)))


class Past:
    """Keys and values of the positions before the measured ones; the same for all decoders."""

    def __init__(self, config: Any, batch: int, context: int, num_new: int, like: Tensor) -> None:
        self.batch = batch
        self.context = context
        self.num_new = num_new
        self.num_filled = context - num_new
        self._shape = (batch, config.num_key_value_heads, self.num_filled, config.head_dim)
        self._num_layers = config.num_hidden_layers
        self._like = like
        self.first_ids_B = torch.arange(batch, device=like.device) * 7 % config.vocab_size

    def layers(self) -> list[tuple[Tensor, Tensor]]:
        """Keys and values [B, Hkv, num_filled, D] of each layer, drawn at each call."""
        generator = torch.Generator(self._like.device).manual_seed(0)
        options: Any = {
            "generator": generator, "device": self._like.device, "dtype": self._like.dtype,
        }  # fmt: skip
        return [
            (torch.randn(self._shape, **options), torch.randn(self._shape, **options))
            for _ in range(self._num_layers)
        ]


class Steps(Protocol):
    """A decoder that runs decode steps."""

    about: str

    def open(self, past: Past) -> None: ...
    def rewind(self) -> None:
        """Go back to the filled cache; not timed."""

    def run(self) -> Ids:
        """Decode ``num_new`` tokens of every request."""

    def close(self) -> None: ...


class OurSteps:
    """``Target.decode`` and its logits, fused on a GPU, in a graph that feeds its tokens back."""

    about = "the engine's decoder over pages in a CUDA graph, without the engine's host"

    def __init__(self, model: Any) -> None:
        self._target = Target(copy.deepcopy(model), ())

    @torch.inference_mode()
    def open(self, past: Past) -> None:
        target, batch = self._target, past.batch
        if target.device.type == "cuda" and not target.is_fused:
            reason = target.fuse(target.config.max_position_embeddings)
            if reason is not None:
                raise ValueError(reason)
        num_pages = -(-past.context // _PAGE)
        self._past = past
        self._pool = target.make_pool((batch * num_pages + 1) * _PAGE)
        pages = torch.randperm(batch * num_pages, device=target.device) + 1
        pages_BP = pages.view(batch, num_pages).int()
        at = torch.arange(past.num_filled, device=target.device)
        slots_BF = pages_BP.long()[:, at // _PAGE] * _PAGE + at % _PAGE
        for layer, (keys, values) in enumerate(past.layers()):
            self._pool.keys[layer][slots_BF] = keys.transpose(1, 2)
            self._pool.values[layer][slots_BF] = values.transpose(1, 2)
        self._at = DecodePass(
            pages_BP, torch.zeros(batch, dtype=torch.int32, device=target.device), _PAGE
        )
        self._ids = torch.zeros(batch, dtype=torch.int64, device=target.device)
        self._column = torch.zeros(1, dtype=torch.int64, device=target.device)
        self._answer = self._ids.new_zeros(batch, past.num_new + _WARM_UPS)
        self.rewind()
        self._step: Callable[[], None] = self._take
        if target.device.type == "cuda":
            self._step = self._captured()

    def _captured(self) -> Callable[[], None]:
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(_WARM_UPS):
                self._take()
        torch.cuda.current_stream().wait_stream(side)
        self.rewind()
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph):
            self._take()
        return self._graph.replay

    def _take(self) -> None:
        positions, slots = self._at.positions(1).flatten(), decode_slots(self._at, 1)
        rows = self._target.decode(self._ids, positions, slots, self._at, self._pool)
        self._ids.copy_(self._target.logits(rows.hidden_TH).argmax(dim=-1))
        self._answer.index_copy_(1, self._column, self._ids[:, None])
        self._at.first_R.add_(1)
        self._column.add_(1)

    @torch.inference_mode()
    def rewind(self) -> None:
        self._at.first_R.fill_(self._past.num_filled)
        self._ids.copy_(self._past.first_ids_B)
        self._column.zero_()

    @torch.inference_mode()
    def run(self) -> Ids:
        for _ in range(self._past.num_new):
            self._step()
        found: Ids = self._answer[:, : self._past.num_new].tolist()
        return found

    def close(self) -> None:
        for name in ("_pool", "_graph", "_step", "_answer", "_at"):
            vars(self).pop(name, None)


class LoopSteps:
    """The simple loop."""

    def __init__(self, model: Any, is_compiled: bool) -> None:
        self.about = f"simple loop, {'' if is_compiled else 'not '}compiled"
        self._model = model
        self._options = COMPILE_OPTIONS if is_compiled else None

    @torch.no_grad()
    def open(self, past: Past) -> None:
        self._past = past
        self._loop = CompiledLoop(self._model, past.batch, past.context, self._options)
        self._loop.prepare()
        for layer, (keys, values) in zip(self._loop.layers, past.layers(), strict=True):
            layer.keys[:, :, : past.num_filled] = keys  # type: ignore[operator]
            layer.values[:, :, : past.num_filled] = values  # type: ignore[operator]
        self.rewind()

    @torch.no_grad()
    def rewind(self) -> None:
        self._loop.ids.copy_(self._past.first_ids_B[:, None])
        self._loop.position.fill_(self._past.num_filled)

    def run(self) -> Ids:
        self._loop.decode(self._past.num_new)
        found: Ids = self._loop.answer[:, self._past.num_filled : self._past.context].tolist()
        return found

    def close(self) -> None:
        vars(self).pop("_loop", None)


class GenerateSteps:
    """transformers' ``generate`` on a filled cache."""

    def __init__(self, model: Any, is_static: bool, is_compiled: bool) -> None:
        how = "compiled, reduce-overhead" if is_compiled else "not compiled"
        self.about = f"generate, StaticCache, {how}" if is_static else "generate, dynamic cache"
        self._model = model
        self._is_static = is_static
        self._options = {"compile_config": compiled_once()} if is_static and is_compiled else {}

    def open(self, past: Past) -> None:
        self._past = past
        ids = torch.zeros(past.batch, past.num_filled + 1, dtype=torch.int64)
        self._ids = ids.to(past.first_ids_B.device)
        self._ids[:, -1] = past.first_ids_B
        self._cache: Any = None
        self.rewind()

    @torch.no_grad()
    def rewind(self) -> None:
        if self._cache is None or not self._is_static:
            config = self._model.config
            self._cache = None
            self._cache = (
                StaticCache(config=config, max_cache_len=self._past.context)
                if self._is_static
                else DynamicCache(config=config)
            )
        else:
            self._cache.reset()
        for layer, (keys, values) in enumerate(self._past.layers()):
            self._cache.update(keys, values, layer)

    @torch.no_grad()
    def run(self) -> Ids:
        out = self._model.generate(
            self._ids,
            attention_mask=torch.ones_like(self._ids),
            past_key_values=self._cache,
            max_new_tokens=self._past.num_new,
            do_sample=False,
            **self._options,
        )
        found: Ids = out[:, self._ids.shape[1] :].tolist()
        return found

    def close(self) -> None:
        for name in ("_cache", "_ids"):
            vars(self).pop(name, None)


def compare_steps(
    shape: str,
    cells: str,
    decoders: str,
    num_new: int,
    turns: int,
    budget_s: float,
    device_name: str,
    is_compiled: bool,
    out: Path,
) -> None:
    """Measure every decoder at every cell; each row is written as soon as it is measured.

    Args:
        cells: ``BATCHxCONTEXT``, comma-separated.
        decoders: names separated by semicolons, or ``all``.
    """
    device = pick_device(device_name)
    config = SHAPES[shape]()
    torch.manual_seed(0)
    model = random_model(config, device)
    make: dict[str, Callable[[], Steps]] = {
        OURS: lambda: OurSteps(model),
        "loop": lambda: LoopSteps(model, is_compiled),
        "generate, static": lambda: GenerateSteps(model, True, is_compiled),
        "generate, eager": lambda: GenerateSteps(model, False, is_compiled),
    }
    if decoders != "all":
        make = {name: make[name.strip()] for name in decoders.split(";")}
    report = Report(out, budget_s, {"shape": shape, "weights": "random", "num_new": num_new})
    for cell in cells.split(","):
        batch, context = (int(part) for part in cell.split("x"))
        past = Past(config, batch, context, num_new, model.lm_head.weight)
        answers: dict[str, Ids] = {}
        for name, make_one in make.items():
            row = partial(_row, name, make_one, past, turns, device, answers)
            report.attempt("steps", {"variant": name, "batch": batch, "context": context}, 0.0, row)
            torch.compiler.reset()
            release(device)


def _row(
    name: str,
    make: Callable[[], Steps],
    past: Past,
    turns: int,
    device: torch.device,
    answers: dict[str, Ids],
) -> dict[str, Any]:
    """Figures of one decoder; its answers are kept and compared with ours."""
    found, answers[name] = _measured(make(), past, turns, device)
    if OURS in answers:
        pairs = list(zip(answers[OURS], answers[name], strict=True))
        found["equal_prompts"] = sum(a == b for a, b in pairs) / len(pairs)
    return found


def _measured(
    steps: Steps, past: Past, turns: int, device: torch.device
) -> tuple[dict[str, Any], Ids]:
    """Figures of one decoder, and its answers."""
    try:
        started = time.perf_counter()
        steps.open(past)
        steps.run()
        prepare_s = time.perf_counter() - started
        seconds: list[float] = []
        for _ in range(turns):
            steps.rewind()
            spent, answers = seconds_of(steps.run, device)
            seconds.append(spent)
    finally:
        steps.close()
    median = statistics.median(seconds)
    figures = {
        "about": steps.about,
        "prepare_s": prepare_s,
        "seconds": seconds,
        "step_ms": median / past.num_new * 1e3,
        "decode_tokens_per_s": past.batch * past.num_new / median,
    }
    return figures, answers
