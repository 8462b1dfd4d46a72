"""Small real engines for tests: random targets of five architectures, real drafters, no threads.

``step`` is called by the test, so every run is deterministic.
"""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from transformers import (
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from configs.schema import DrafterSettings
from drafters.catalog import JOINED, kind_of, mixes_of
from drafters.eagle3.model import Eagle3, config_for_target
from drafters.eagle3.paged import PagedEagle3
from drafters.mtp import Mtp, PagedMtp
from drafters.protocol import DrafterContext, HostDrafter, TextDrafter, Weights
from drafters.suffix.index import SuffixIndex
from drafters.trainable import trainable
from oracles.support import tiny_tokenizer
from policies.interface import Decision, Outcome, Pick, StepObs
from serving.engine.assembly import Choices, assemble
from serving.engine.capture_ring import CaptureRing
from serving.engine.captured_rows import StoredDtype
from serving.engine.inbox import Sequences
from serving.engine.loop import Engine, Listeners
from serving.engine.programs import Sizes, fuse
from serving.requests import Output, Request, SamplingParams
from specops.verify_logits import Rule
from targets.target import Target

SHAPE: dict[str, Any] = {
    "hidden_size": 48,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 12,
    "max_position_embeddings": 512,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
GEMMA = {"sliding_window": 16, "layer_types": ["sliding_attention"] * 3 + ["full_attention"]}
ARCHITECTURES = {
    "qwen3": (Qwen3ForCausalLM, lambda v: Qwen3Config(vocab_size=v, **SHAPE)),
    "llama": (LlamaForCausalLM, lambda v: LlamaConfig(vocab_size=v, **SHAPE)),
    "qwen2": (Qwen2ForCausalLM, lambda v: Qwen2Config(vocab_size=v, **SHAPE)),
    "mistral": (
        MistralForCausalLM,
        lambda v: MistralConfig(vocab_size=v, sliding_window=16, **SHAPE),
    ),
    "gemma3": (
        Gemma3ForCausalLM,
        lambda v: Gemma3TextConfig(vocab_size=v, query_pre_attn_scalar=12, **GEMMA, **SHAPE),
    ),
}


def random_model(architecture: str, vocab_size: int = 96, seed: int = 0, head_dim: int = 12) -> Any:
    """A model with random weights, large enough that the two best tokens are far apart."""
    make, make_config = ARCHITECTURES[architecture]
    config = make_config(vocab_size)
    config.head_dim = head_dim
    torch.manual_seed(seed)
    model = make(config).float().eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" not in name:
                parameter.normal_(std=0.25)
    return model


@dataclass
class RandomPolicy:
    """Draws any drafter and any K for every step; the output must not depend on them."""

    numbers: random.Random = field(default_factory=lambda: random.Random(0))
    wants_profile = False

    def rest(self) -> Decision | None:
        return None

    def wants_matches(self) -> bool:
        return True

    def plan(self, obs: StepObs) -> Decision:
        k = min(self.numbers.randint(0, 8), obs.max_draft)
        drafter = self.numbers.choice(obs.drafters) if k else "none"
        return Decision(drafter, k, 1.0, False, "random", picks=self.picks(drafter, obs.batch))

    def picks(self, drafter: str, batch: int) -> tuple[Pick, ...] | None:
        """Any member of a mix for each request."""
        members = drafter.split(JOINED)
        if len(members) == 1:
            return None
        chance = 1 / len(members)
        return tuple(Pick(self.numbers.choice(members), chance, "try") for _ in range(batch))

    def observe(self, outcome: Outcome) -> None: ...
    def calibrate(self, samples: Any) -> None: ...
    def on_swap(self, drafter: str, version: int, calibration: dict[str, Any]) -> None: ...
    def figures(self) -> dict[str, Any]:
        return {}


@dataclass
class Collected:
    """All outputs of one request."""

    token_ids: list[int] = field(default_factory=list)
    text: str = ""
    logprobs: list[Any] = field(default_factory=list)
    last: Output | None = None

    def take(self, output: Output) -> None:
        assert self.last is None or self.last.finish_reason is None, "output after the end"
        self.token_ids += output.token_ids
        self.text += output.text
        self.logprobs += output.logprobs or ()
        self.last = output


class SecondEagle3(PagedEagle3):
    """A second neural drafter for one engine."""

    kind = "second"


def new_weights(kind: str, model: Any, seed: int = 1) -> Weights:
    """Random weights of any kind of drafter that learns, for ``model`` as target."""
    learns = trainable(kind)
    head = model.get_output_embeddings().weight.detach()
    made = learns.new_model(model.config, head, None, seed)
    return Weights(0, learns.config_to_json(made), learns.bundle_tensors(made))


def make_engine(
    model: Any,
    *,
    kind: str | None = None,
    weights: Weights | None = None,
    beside: Mapping[str, Weights | None] | None = None,
    policy: Any = None,
    max_batch: int = 5,
    page_size: int = 4,
    num_pages: int = 400,
    prefill_chunk: int = 16,
    prefix_cache: bool = True,
    max_draft: int = 8,
    suffix: bool = True,
    texts: tuple[TextDrafter, ...] = (),
    mixes_index: bool = False,
    on_request: tuple[HostDrafter, ...] = (),
    drafter: Eagle3 | Mtp | None = None,
    second: Eagle3 | None = None,
    ring_rows: int = 4096,
    ring_dtype: StoredDtype = "bfloat16",
    seed: int = 1,
    eos_ids: frozenset[int] = frozenset(),
    rule: Rule = Rule.BLOCK,
    overlaps: bool = True,
    fused: bool = False,
    fused_drafter: bool = False,
    max_queue: int = 100_000,
    listeners: Listeners | None = None,
) -> Engine:
    """An engine over ``model`` with a random EAGLE-3 drafter unless one is given.

    Args:
        kind: take a drafter of this kind of the catalog instead, with ``weights`` or random ones.
        beside: further neural drafters by kind, likewise; all may draft in one round.
        texts: drafters that read text on the device, instead of the suffix index on the host.
        mixes_index: the suffix index may draft in one round with all of them.
        overlaps: launch each round before the last one is read, as a server on a GPU does.
        fused: compute target and drafter with our fused operations.
        on_request: further host drafters, which draft only for requests that name them.
        fused_drafter: compute only the drafter with them.
        second: another neural drafter, of kind "second".
    """
    if drafter is None:
        drafter = Eagle3(config_for_target(model.config))
        drafter.initialise(seed, model.get_output_embeddings().weight)
    drafter.eval().requires_grad_(False)
    kinds = {} if kind is None else {kind: weights, **(beside or {})}
    made = {name: own or new_weights(name, model, seed) for name, own in kinds.items()}
    modules = [drafter] if second is None else [drafter, second.eval().requires_grad_(False)]
    taps = dict.fromkeys(layer for module in modules for layer in module.config.layer_ids)
    if made:
        taps = dict.fromkeys(x for name, own in made.items() for x in kind_of(name).layer_ids(own))
    target = Target(model, tuple(taps))
    sizes = Sizes(max_batch, 256, prefill_chunk, page_size, num_pages, max_draft)
    neural: list[Any] = [
        PagedMtp(module, target.embed, num_pages * page_size, target.lm_head.weight)
        if isinstance(module, Mtp)
        else paged(module, target.embed, num_pages * page_size)
        for paged, module in zip((PagedEagle3, SecondEagle3), modules, strict=False)
    ]
    for number, (name, own) in enumerate(made.items()):
        context = DrafterContext(
            settings=DrafterSettings(kind=name, max_draft=max_draft),
            embed=target.embed,
            hidden_size=target.config.hidden_size,
            vocab_size=target.vocab_size,
            num_slots=num_pages * page_size,
            lm_head=target.lm_head,
            logits=partial(target.logits, widen=False),
            device=target.device,
            dtype=target.dtype,
            weights=own,
        )
        neural = [*(neural if number else ()), kind_of(name).build(context)]
    if fused:
        fuse(target, neural, sizes.pages_each * page_size, pinned=False)
    elif fused_drafter:
        assert neural[0].fuse(num_positions=512) is None
    index = SuffixIndex(2, 8, 10_000)
    layers, hidden_size = len(target.layer_ids), target.config.hidden_size
    ring = CaptureRing(ring_rows, layers, hidden_size, target.device, ring_dtype)
    parts = assemble(
        target,
        [*([index] if suffix and not texts else []), *on_request],
        neural,
        sizes,
        Sequences(tiny_tokenizer(), eos_ids, seed),
        Choices(
            rule=rule,
            prefix_cache=prefix_cache,
            max_queue=max_queue,
            overlaps=overlaps,
            on_request=tuple(one.kind for one in on_request),
            mixes=mixes_of(
                *([tuple(made)] if len(made) > 1 else []),
                *([(*made, index.kind)] if mixes_index else []),
            ),
        ),
        ring,
        texts,
    )
    return Engine(parts, policy or RandomPolicy(), listeners)


def run(
    engine: Engine,
    requests: list[Request],
    between: Callable[[Engine, int], None] = lambda _engine, _step: None,
    most: Callable[[int], int | None] = lambda _step: None,
    until: Callable[[dict[str, Collected]], bool] = lambda _collected: False,
) -> dict[str, Collected]:
    """Decode all requests.

    Args:
        between: called before every step with the engine and the step number.
        most: step number -> maximum number of in-flight requests; ``None``: no limit.
        until: told the outputs after every step; ``True`` ends the run early.
    """
    collected = {r.id: Collected() for r in requests}
    waiting = deque(requests)
    step = 0
    with torch.inference_mode():
        while waiting or engine.inbox.num_inflight():
            limit = most(step)
            while waiting and (limit is None or engine.inbox.num_inflight() < limit):
                request = waiting.popleft()
                engine.inbox.submit(request, collected[request.id].take)
            between(engine, step)
            assert engine.step(), "requests in flight, but nothing to do"
            step += 1
            if until(collected):
                break
    return collected


def request_of(request_id: str, prompt: list[int], max_tokens: int, **params: Any) -> Request:
    """A greedy request unless ``params`` (of sampling or of the request) say otherwise."""
    names = ("max_draft", "capture", "tenant", "drafters")
    own = {k: params.pop(k) for k in names if k in params}
    sampling = SamplingParams(**{"temperature": 0.0, "max_tokens": max_tokens, **params})
    return Request(request_id, tuple(prompt), sampling, **own)
