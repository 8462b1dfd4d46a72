"""Real engines over targets and drafters of published shapes with random weights.

Speed does not depend on the weights' values; what is accepted does, and is forced where it matters
(``forced.py``).
"""

from __future__ import annotations

import gc
import hashlib
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast, Qwen3Config

from benchmarks.ops.decoder import SHAPES as PUBLISHED
from benchmarks.ops.decoder import random_weights
from buffer.folder_weights import FolderWeights
from buffer.manifest import TENSORS
from buffer.records import Manifest
from configs.schema import Settings
from drafters.eagle3.model import Eagle3, config_for_target
from serving.build import LoadedTarget, build_engine
from serving.service import Service
from targets.load import pick_dtype


def _tiny() -> Qwen3Config:
    """For a try of every part on a CPU."""
    return Qwen3Config(
        vocab_size=512, hidden_size=64, intermediate_size=128, num_hidden_layers=4,
        num_attention_heads=4, num_key_value_heads=2, head_dim=16, tie_word_embeddings=True,
        max_position_embeddings=4096, rope_parameters={"rope_type": "default", "rope_theta": 1e6},
    )  # fmt: skip


SHAPES: dict[str, Callable[[], Any]] = {**PUBLISHED, "tiny": _tiny}
_DRAFT_VOCAB = 32_000
"""Tokens that an EAGLE-3 of a published shape drafts; at the 8B shape it has 0.8 GB then."""


@dataclass(frozen=True, slots=True)
class Place:
    """Where the engines of one run compute."""

    device: torch.device

    @property
    def dtype(self) -> torch.dtype:
        """bfloat16 on a GPU, float32 on a CPU."""
        return pick_dtype("auto", self.device)

    @property
    def is_gpu(self) -> bool:
        return self.device.type == "cuda"

    def synchronize(self) -> None:
        """Wait until the device is done."""
        if self.is_gpu:
            torch.cuda.synchronize()

    def held_bytes(self) -> int:
        """Bytes of the tensors on the device, those of graphs included; 0 on a CPU."""
        return torch.cuda.memory_allocated() if self.is_gpu else 0


@dataclass(frozen=True, slots=True)
class Made:
    """One engine and what it was made from."""

    service: Service
    config: Any
    """Of the target."""
    model: Any
    drafter_bytes: int
    """Of the neural drafter's weights on the device; 0 without one."""
    place: Place


def random_target(shape: str, place: Place) -> LoadedTarget:
    """A target of this shape, its weights drawn on the device."""
    torch.manual_seed(0)
    config = SHAPES[shape]()
    model = random_weights(config, place.device, place.dtype)
    fingerprint = hashlib.sha256(f"random {shape}".encode()).hexdigest()
    return LoadedTarget(model, number_tokenizer(config.vocab_size), fingerprint, f"random-{shape}")


def number_tokenizer(vocab_size: int) -> PreTrainedTokenizerFast:
    """Every id is a word: text of random ids costs what text costs."""
    words = {f" {token}": token for token in range(vocab_size)}
    tokenizer = Tokenizer(WordLevel(words, unk_token=" 0"))
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token=" 0")


def publish_drafters(root: Path, target: LoadedTarget, num_versions: int = 1) -> int:
    """Random EAGLE-3 versions 0, 1, ... of the target's layer shape; returns the bytes of one."""
    vocab_size = target.model.config.vocab_size
    draft_vocab = min(_DRAFT_VOCAB, vocab_size // 4)
    with target.model.device:
        module = Eagle3(config_for_target(target.model.config, draft_vocab_size=draft_vocab))
    module.to(target.model.dtype)
    num_bytes = sum(p.numel() * p.element_size() for p in module.parameters())
    for version in range(num_versions):
        with torch.no_grad():
            for parameter in module.parameters():
                if parameter.dim() == 1:
                    parameter.fill_(1.0)
                else:
                    parameter.normal_(std=0.02)
        tensors = {name: tensor.cpu() for name, tensor in module.bundle_tensors().items()}
        manifest = Manifest(
            version,
            version - 1 if version else None,
            "eagle3",
            module.config.to_json(),
            target.fingerprint,
            {},
        )
        FolderWeights(root).publish(manifest, {TENSORS: save(tensors)})
    return num_bytes


@contextmanager
def engine_of(
    shape: str, place: Place, chosen: dict[str, Any], num_versions: int = 0
) -> Iterator[Made]:
    """An engine that always runs programs (CUDA graphs on a GPU), in a run folder of its own.

    Args:
        chosen: settings by section, e.g. ``{"engine": {"max_batch": 8}}``.
        num_versions: drafter versions published before it starts; 0: it has no drafter.
    """
    release(place)  # of an engine before
    with tempfile.TemporaryDirectory() as folder:
        target = random_target(shape, place)
        drafter_bytes = 0
        if num_versions:
            drafter_bytes = publish_drafters(Path(folder) / "weights", target, num_versions)
        settings = settings_for(place, Path(folder), chosen, has_drafter=bool(num_versions))
        started = time.perf_counter()
        service = build_engine(settings, target)
        print(f"{shape}: engine built in {time.perf_counter() - started:.1f} s", flush=True)
        yield Made(service, target.model.config, target.model, drafter_bytes, place)


def settings_for(place: Place, folder: Path, chosen: dict[str, Any], has_drafter: bool) -> Settings:
    """What all engines here have in common, and what one part chose."""
    own: dict[str, Any] = {
        "run_dir": folder,
        "device": str(place.device),
        "engine": {"programs": "always", "max_queue": 4096, "prefill_chunk": 4096},
        "drafter": {"kind": "eagle3" if has_drafter else "none", "suffix": {"enabled": False}},
        "policy": {"kind": "fixed", "draft_k": 0},
        "capture": {"enabled": False},
        "swap": {"enabled": False},
    }
    if not has_drafter:
        own["drafter"]["max_draft"] = 0
    for section, values in chosen.items():
        own[section] = {**own.get(section, {}), **values}
    return Settings.model_validate(own)


def release(place: Place) -> None:
    """Give back the memory of an engine that nobody holds any more."""
    gc.collect()
    if place.is_gpu:
        torch.cuda.empty_cache()
