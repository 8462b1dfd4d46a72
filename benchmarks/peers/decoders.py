"""The decoders that ``benchmarks.peers.__main__`` compares, behind one interface.

A decoder is opened for one batch size, answers prompts of one length greedily, and is closed.
``open`` compiles, captures and allocates; any other one-time work happens while the warm-up prompts
are answered.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from transformers import (
    CompileConfig,
    ContinuousBatchingConfig,
    GenerationConfig,
    MuseGlimmerAssistantConfig,
    MuseGlimmerAssistantModel,
    StaticCache,
)
from transformers.utils.import_utils import is_flash_attn_2_available, is_flash_attn_3_available

from benchmarks.harness.engines import ONE_GPU, Built, engine_from, synchronize
from benchmarks.harness.loops import answer_all
from benchmarks.peers.compiled_loop import COMPILE_OPTIONS, CompiledLoop
from policies.interface import DraftPolicy
from targets.load import load_model, pick_dtype

Ids = list[list[int]]
"""Token ids of each request."""

LONGEST_WAIT_S = 60.0
"""Longest wait for answers from the thread of another library."""


@dataclass(frozen=True, slots=True)
class Work:
    """The workload that a decoder is opened for."""

    batch: int
    num_prompt: int
    num_new: int

    @property
    def num_positions(self) -> int:
        return self.num_prompt + self.num_new


class Decoder(Protocol):
    """One decoder."""

    about: str
    """Its settings, for the table."""
    num_warm_up: int | None
    """Tokens that its warm-up needs; ``None``: as many as a measured turn."""

    def open(self, work: Work) -> None: ...
    def generate(self, prompts: Ids, num_new: int) -> Ids: ...
    def close(self) -> None: ...


# Ours


@contextmanager
def our_engine(target: Path, drafter: Path | None, work: Work, device: str) -> Iterator[Built]:
    """The engine as the server builds it, without speculation if there is no ``drafter``.

    Nothing carries over between requests: there is no prefix cache, and the index sees only the
    request itself.
    """
    room = -(-(work.num_positions + 16) // 16) * 16
    chosen = [
        f"target={target}",
        f"engine.max_batch={work.batch}",
        f"engine.max_model_len={room}",
        "engine.prefix_cache=false",
        "drafter.suffix.recent_tokens=0",
        "swap.enabled=false",
        *([f"drafter.path={drafter}"] if drafter is not None else ["drafter.kind=none"]),
    ]
    with engine_from(ONE_GPU, chosen, device) as built:
        yield built


class Ours:
    """Our engine, driven in this thread, with its own policy."""

    num_warm_up = None

    def __init__(self, built: Callable[[], Built], policy: DraftPolicy | None, about: str) -> None:
        """
        Args:
            built: returns the engine, which is built at the first call.
            policy: used while this decoder answers; ``None``: the engine's own.
        """
        self.about = about
        self._built = built
        self._policy = policy

    def open(self, work: Work) -> None:
        self._built()

    def generate(self, prompts: Ids, num_new: int) -> Ids:
        built = self._built()
        built.policy.play(self._policy)
        turn = answer_all(built.engine, [tuple(ids) for ids in prompts], num_new, capture=True)
        return [answer.tokens for answer in turn.answers]

    def close(self) -> None:
        """Keeps the engine for the next batch size."""


# transformers


def peer_model(target: Path, device: torch.device) -> Any:
    """The target loaded with transformers, without an end-of-text token."""
    model: Any = load_model(target, pick_dtype("auto", device), device)
    return without_end(model)


def without_end(model: Any) -> Any:
    model.generation_config = GenerationConfig(do_sample=False, eos_token_id=None, pad_token_id=0)
    return model.eval().requires_grad_(False)


class Generate:
    """``model.generate`` with some options."""

    num_warm_up = 16  # enough to compile and to replay its graphs

    def __init__(self, model: Any, about: str, **options: Any) -> None:
        """
        Args:
            options: for ``model.generate``; a function is first called with the ``Work``.
        """
        self.about = about
        self._model = model
        self._makers = options
        self._options: dict[str, Any] = {}

    def open(self, work: Work) -> None:
        self._options = {
            name: option(work) if callable(option) and not isinstance(option, torch.nn.Module)
            else option
            for name, option in self._makers.items()
        }  # fmt: skip

    @torch.no_grad()
    def generate(self, prompts: Ids, num_new: int) -> Ids:
        ids = torch.tensor(prompts, device=self._model.device)
        cache = self._options.get("past_key_values")
        if cache is not None:
            cache.reset()
        out = self._model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=num_new,
            do_sample=False,
            **self._options,
        )
        found: Ids = out[:, ids.shape[1] :].tolist()
        return found

    def close(self) -> None:
        self._options = {}


def compiled_once() -> CompileConfig:
    """Compile once per shape; dynamic shapes would not be captured."""
    return CompileConfig(dynamic=False, mode="reduce-overhead")


def static_cache(model: Any) -> Callable[[Work], StaticCache]:
    """A cache that the decoder keeps, so that its graphs are recorded only once."""
    return lambda work: StaticCache(config=model.config, max_cache_len=work.num_positions)


def first_layers(model: Any, num_layers: int) -> Any:
    """An untrained drafter: the target's first layers with the target's norm and head."""
    config = copy.deepcopy(model.config)
    config.num_hidden_layers = num_layers
    config.layer_types = config.layer_types[:num_layers]
    with torch.device("meta"):
        small = type(model)(config)
    small.model.layers = model.model.layers[:num_layers]
    for name in ("embed_tokens", "norm", "rotary_emb"):
        setattr(small.model, name, getattr(model.model, name))
    small.lm_head = model.lm_head
    small.generation_config = copy.deepcopy(model.generation_config)
    return small.eval()


def random_block_drafter(model: Any, num_layers: int = 2, block_size: int = 8) -> Any:
    """A DFlash drafter of the target's shape with random weights: none was trained for it."""
    c = model.config
    config = MuseGlimmerAssistantConfig(
        hidden_size=c.hidden_size,
        intermediate_size=c.intermediate_size,
        num_hidden_layers=num_layers,
        num_attention_heads=c.num_attention_heads,
        num_key_value_heads=c.num_key_value_heads,
        head_dim=c.head_dim,
        layer_types=["full_attention"] * num_layers,
        rope_parameters=dict(c.rope_parameters),
        max_position_embeddings=c.max_position_embeddings,
        block_size=block_size,
        mask_token_id=0,
        target_layer_ids=[1, c.num_hidden_layers // 2, c.num_hidden_layers - 2],
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
    )
    drafter: Any = MuseGlimmerAssistantModel(config)
    return drafter.to(device=model.device, dtype=model.dtype).eval()


def best_paged_attention() -> str:
    """The best installed attention kernel for continuous batching in transformers."""
    if is_flash_attn_3_available():
        return "paged|flash_attention_3"
    return "paged|flash_attention_2" if is_flash_attn_2_available() else "paged|sdpa"


class Continuous:
    """transformers' continuous batching; its manager is kept for all turns of a batch size."""

    num_warm_up: int | None

    def __init__(self, model: Any, attention: str, about: str, **settings: Any) -> None:
        """
        Args:
            model: used by this decoder only, because its attention is replaced.
            settings: for ContinuousBatchingConfig; a function is called with the ``Work``.
        """
        self.about = f"{attention}, {about}"
        self.num_warm_up = None if settings else 16  # graphs are captured at every new length
        self._name = self.about
        self._model = model
        self._attention = attention
        self._settings = settings
        self._manager: Any = None

    def open(self, work: Work) -> None:
        chosen = {n: s(work) if callable(s) else s for n, s in self._settings.items()}
        block_size = 64
        blocks = work.batch * (-(-work.num_positions // block_size) + 2)
        self._model.set_attn_implementation(self._attention)
        config = ContinuousBatchingConfig(
            block_size=block_size,
            num_blocks=2 * blocks,
            max_batch_tokens=max(work.batch * work.num_prompt, 256),
            max_requests_per_batch=work.batch,
            allow_block_sharing=False,
            **chosen,
        )
        generation = GenerationConfig(
            do_sample=False, eos_token_id=-1, pad_token_id=0, max_new_tokens=work.num_new
        )
        manager: Any = self._model.init_continuous_batching(
            generation_config=generation, continuous_batching_config=config
        )
        self._manager = manager
        manager.warmup()
        manager.start()
        resolved = manager.continuous_batching_config
        self.about = (
            f"{self._name}: graphs {resolved.use_cuda_graph}, async {resolved.use_async_batching}"
        )

    def generate(self, prompts: Ids, num_new: int) -> Ids:
        names = self._manager.add_requests(inputs=prompts, max_new_tokens=num_new)
        answers: dict[str, list[int]] = {}
        deadline_s = time.monotonic() + LONGEST_WAIT_S
        while len(answers) < len(prompts):
            if time.monotonic() > deadline_s:
                raise RuntimeError(f"no answer within {LONGEST_WAIT_S:.0f} s")
            result = self._manager.get_result(timeout=1)
            if result is None:
                if not self._manager.is_running():
                    raise RuntimeError("the manager's thread ended before the answers came")
            elif result.error is not None:
                raise RuntimeError(result.error)
            elif result.is_finished():
                answers[result.request_id] = list(result.generated_tokens)
        return [answers[name] for name in names]

    def close(self) -> None:
        if self._manager is not None:
            self._manager.stop(block=True, timeout=10, hard_stop=True)
            self._manager.destroy()
            self._manager = None


# The simple loop


class Loop:
    """``CompiledLoop``, built for each batch size."""

    num_warm_up = 8

    def __init__(self, model: Any, is_compiled: bool) -> None:
        self._model = model
        self._options = COMPILE_OPTIONS if is_compiled else None
        self.about = f"compiled with {COMPILE_OPTIONS}" if is_compiled else "not compiled"
        self._loop: CompiledLoop | None = None

    def open(self, work: Work) -> None:
        self._loop = CompiledLoop(self._model, work.batch, work.num_positions, self._options)
        self._loop.prepare()

    def generate(self, prompts: Ids, num_new: int) -> Ids:
        assert self._loop is not None, "not opened"
        return self._loop.generate(torch.tensor(prompts, device=self._model.device), num_new)

    def close(self) -> None:
        self._loop = None


def seconds_of(work: Callable[[], Ids], device: torch.device) -> tuple[float, Ids]:
    """Run ``work``; returns the seconds until the device is done, and the answers."""
    synchronize(device)
    started = time.perf_counter()
    answers = work()
    synchronize(device)
    return time.perf_counter() - started, answers
