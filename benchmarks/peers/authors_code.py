"""The authors' own decoders of EAGLE-3 and DFlash, from checkouts that the user has.

Nothing of theirs is in this repository, and their files stay as they are. They were written for
older versions of ``transformers`` (4.53 and 4.57); what they lack in this one is provided in
memory, and is all that the functions at the end of this file do:

- ``transformers.utils.LossKwargs``, a name for types alone;
- the entry ``default`` of ``ROPE_INIT_FUNCTIONS``, rotary positions that are not scaled;
- ``_tied_weights_keys`` as a mapping;
- ``create_causal_mask`` with the argument's former name, for a mask that is made already;
- ``rope_scaling`` and ``rope_theta`` of the drafter's config, which are ``rope_parameters`` now;
- the weights of a target, put into their class by name: their ``from_pretrained`` is the library's;
- an index for a target of one file, as they look the embedding table up in one.

Decoding is greedy, one request at a time, which is all that they do.
"""

from __future__ import annotations

import importlib
import json
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig
from transformers import utils as transformers_utils
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.utils.generic import TransformersKwargs

_INDEX = "model.safetensors.index.json"
_MOST_POSITIONS = 2048
"""Positions that EAGLE's code reserves for a request."""


@dataclass(frozen=True, slots=True)
class Answer:
    """One greedy answer and how it was made."""

    tokens: list[int]
    """Completion tokens, possibly some behind the end."""
    accepted: list[int]
    """Draft tokens kept in each round."""

    def until(self, ends: frozenset[int], max_tokens: int) -> Answer:
        """The answer up to its end, and the rounds that it took."""
        tokens = self.tokens[:max_tokens]
        stop = next((n for n, token in enumerate(tokens, 1) if token in ends), len(tokens))
        made, rounds = 1, 0  # the first token comes with the prompt
        while made < stop and rounds < len(self.accepted):
            made += self.accepted[rounds] + 1
            rounds += 1
        return Answer(tokens[:stop], self.accepted[:rounds])


Ids = tuple[int, ...]


class Decoder(Protocol):
    """Answers one prompt greedily."""

    def answer(self, prompt: Ids, max_tokens: int) -> Answer: ...


@dataclass(frozen=True, slots=True)
class Loaded:
    """What their decoders are made of."""

    target: Path
    """Folder of the target."""
    drafter: Path
    """Folder of the drafter in the published layout."""
    scratch: Path
    """Folder for links to the target's files; it is not there yet."""
    dtype: torch.dtype
    device: torch.device
    num_draft: int
    """Draft tokens of a round."""
    ends: frozenset[int]
    """Tokens that end an answer."""


class Eagle:
    """EAGLE's ``EaModel`` with a tree that is a chain: one candidate for each position."""

    def __init__(self, checkout: Path, given: Loaded) -> None:
        self._device = given.device
        self._accepted: list[Any] = []
        with _as_before(checkout):
            module: Any = importlib.import_module("eagle.model.ea_model")
        _plain_positions(module.EConfig)
        base = _base_model(module, given.target, given.dtype, given.device)
        self._model = module.EaModel(
            True, base, str(_indexed(given.target, given.scratch)),
            str(given.drafter / "config.json"), total_token=given.num_draft + 1,
            depth=given.num_draft - 1, top_k=1, threshold=1.0,
            ea_layer_state_dict=load_file(given.drafter / "model.safetensors"),
        ).eval()  # fmt: skip
        decide = module.evaluate_posterior

        def counted(*given: Any) -> Any:
            found = decide(*given)
            self._accepted.append(found[1])
            return found

        module.evaluate_posterior = counted

    def answer(self, prompt: Ids, max_tokens: int) -> Answer:
        """Decode to the end or a little further than ``max_tokens``."""
        self._accepted.clear()
        ids = torch.tensor([list(prompt)], device=self._device)
        found = self._model.eagenerate(
            ids, temperature=0.0, max_new_tokens=max_tokens, max_length=_MOST_POSITIONS
        )
        tokens: list[int] = found[0, len(prompt) :].tolist()
        return Answer(tokens, [int(kept) for kept in self._accepted])


class DFlashCode:
    """DFlash's ``dflash_generate``, which ``DFlashDraftModel.spec_generate`` calls."""

    def __init__(self, checkout: Path, given: Loaded) -> None:
        """A block has one token more than a draft, the anchor's."""
        device, self._ends = given.device, sorted(given.ends)
        self._device, self._block_size = device, given.num_draft + 1
        with _as_before(checkout):
            module: Any = importlib.import_module("dflash.model")
        if device.type != "cuda":  # their clock waits for a GPU
            module._cuda_time = time.perf_counter
        self._generate = module.dflash_generate
        made: Any = module.DFlashDraftModel.from_pretrained(given.drafter, dtype=given.dtype)
        self._drafter = made.to(device).eval()
        loaded: Any = AutoModelForCausalLM.from_pretrained(given.target, dtype=given.dtype)
        self._target = loaded.to(device).eval()

    def answer(self, prompt: Ids, max_tokens: int) -> Answer:
        """Decode to the end, or ``max_tokens``."""
        found = self._generate(
            self._drafter,
            self._target,
            torch.tensor([list(prompt)], device=self._device),
            max_tokens,
            self._ends,
            0.0,
            block_size=self._block_size,
            return_stats=True,
        )
        tokens: list[int] = found.output_ids[0, len(prompt) :].tolist()
        return Answer(tokens, [length - 1 for length in found.acceptance_lengths])


def ends_of(target: Path) -> frozenset[int]:
    """Tokens that end an answer of the target in this folder."""
    found = None
    if (target / "generation_config.json").exists():
        found = GenerationConfig.from_pretrained(target).eos_token_id
    if found is None:
        found = AutoConfig.from_pretrained(target).get_text_config().eos_token_id
    return frozenset(found if isinstance(found, list) else [] if found is None else [found])


# What their code lacks


@contextmanager
def _as_before(checkout: Path) -> Iterator[None]:
    """Import from a checkout, beside names that ``transformers`` had before."""
    if not hasattr(transformers_utils, "LossKwargs"):
        transformers_utils.LossKwargs = TransformersKwargs  # type: ignore[attr-defined]
    ROPE_INIT_FUNCTIONS.setdefault("default", _unscaled)
    sys.path.insert(0, str(checkout.resolve()))
    try:
        yield
    finally:
        sys.path.pop(0)


def _unscaled(config: Any, device: Any = None, **_rest: Any) -> tuple[torch.Tensor, float]:
    """Inverse frequencies of rotary positions that are not scaled, and 1."""
    found = getattr(config, "head_dim", None)
    width = config.hidden_size // config.num_attention_heads if found is None else found
    places = torch.arange(0, width, 2, dtype=torch.int64).float().to(device)
    return 1.0 / config.rope_parameters["rope_theta"] ** (places / width), 1.0


def _plain_positions(config_class: Any) -> None:
    """Let configs say ``rope_scaling`` and ``rope_theta`` as before ``rope_parameters``."""

    def ignore(_config: Any, _value: Any) -> None:
        """``rope_parameters`` holds it already."""

    def theta(config: Any) -> float:
        base: float = (config.__dict__.get("rope_parameters") or config.__dict__)["rope_theta"]
        return base

    def keep(config: Any, value: float) -> None:
        config.__dict__["rope_theta"] = value

    config_class.rope_scaling = property(lambda _config: None, ignore)
    config_class.rope_theta = property(theta, keep)


def _base_model(module: Any, target: Path, dtype: torch.dtype, device: torch.device) -> Any:
    """Their class of a target with the target's weights.

    Raises:
        ValueError: they have no such class.
    """
    config = AutoConfig.from_pretrained(target)
    config._attn_implementation = "eager"
    config.pretraining_tp = 1
    name = (config.architectures or ["none"])[0]
    made = getattr(module, f"KV{name}", None)
    if made is None:
        raise ValueError(f"EAGLE's code has no class for targets of the architecture {name}")
    tied = {"lm_head.weight": "model.embed_tokens.weight"}
    made._tied_weights_keys = tied if config.tie_word_embeddings else {}
    own = sys.modules[made.__module__]
    if hasattr(own, "create_causal_mask"):
        own.create_causal_mask = lambda **given: given["attention_mask"]  # type: ignore[attr-defined]
    model = made(config)
    weights = {k: v for path in _weight_files(target) for k, v in load_file(path).items()}
    for name, source in tied.items():
        weights.setdefault(name, weights[source])
    lost = model.load_state_dict(weights, strict=False)
    missing = [key for key in lost.missing_keys if not key.endswith("rotary_emb.inv_freq")]
    if missing or lost.unexpected_keys:
        raise ValueError(f"{target} does not fit their {name}: {missing} {lost.unexpected_keys}")
    return model.to(dtype).to(device).eval()


def _weight_files(target: Path) -> list[Path]:
    return sorted(target.glob("*.safetensors"))


def _indexed(target: Path, scratch: Path) -> Path:
    """The target's folder, or one of links to its files with an index beside them."""
    if (target / _INDEX).exists():
        return target
    scratch.mkdir(parents=True, exist_ok=True)
    for path in target.iterdir():
        (scratch / path.name).symlink_to(path.resolve())
    files: dict[str, str] = {}
    for path in _weight_files(target):
        with safe_open(path, framework="pt") as opened:
            files |= dict.fromkeys(opened.keys(), path.name)
    (scratch / _INDEX).write_text(json.dumps({"weight_map": files}))
    return scratch
