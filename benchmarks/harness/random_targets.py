"""Targets of published shapes with random weights, and drafters for them.

Used by ``engines.py``, and by ``side.py`` with older checkouts too: ``first`` imports what has
moved between versions under either name.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast

from benchmarks.harness.predictable import make_drafter_predictable, make_target_predictable
from benchmarks.harness.shapes import SHAPES, draft_vocab_size, draw_weights, random_weights


def first(*names: str) -> Any:
    """Import the first ``module:attribute`` that this checkout has."""
    for name in names:
        module, _, attribute = name.partition(":")
        with contextlib.suppress(ImportError, AttributeError):
            return getattr(importlib.import_module(module), attribute)
    raise ImportError(f"this checkout has none of {', '.join(names)}")


def random_target(
    shape: str,
    device: torch.device,
    dtype: torch.dtype | None = None,
    *,
    is_predictable: bool = False,
) -> Any:
    """A ``LoadedTarget`` of a published shape, with weights drawn on the device.

    Args:
        dtype: ``None``: bfloat16 on a GPU, float32 on a CPU.
        is_predictable: its tokens walk a cycle (``predictable.py``).
    """
    torch.manual_seed(0)
    config = SHAPES[shape]()
    model = random_weights(
        config, device, torch.bfloat16 if device.type == "cuda" else torch.float32
    )
    if is_predictable:
        make_target_predictable(model)
    kind = "predictable" if is_predictable else "random"
    return first("serving.build:LoadedTarget", "targets.load:LoadedTarget")(
        model=model if dtype is None else model.to(dtype),
        tokenizer=number_tokenizer(config.vocab_size),
        fingerprint=hashlib.sha256(f"{kind} {shape}".encode()).hexdigest(),
        name=f"{kind}-{shape}",
    )


def number_tokenizer(vocab_size: int) -> PreTrainedTokenizerFast:
    """A tokenizer in which every id is a word, so that random ids cost as much as real text."""
    words = {f" {token}": token for token in range(vocab_size)}
    tokenizer = Tokenizer(WordLevel(words, unk_token=" 0"))
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token=" 0")


def publisher_in(root: Path) -> Any:
    """The function that publishes (manifest, files) into the folder ``root``."""
    try:
        return first("buffer.folder_weights:FolderWeights")(root).publish
    except ImportError:
        return partial(first("buffer.weights:publish"), root)


def publish_drafters(
    root: Path, target: Any, num_versions: int = 1, *, is_predictable: bool = False
) -> int:
    """Publish EAGLE-3 versions 0, 1, ... of the target's layer shape; returns the bytes of one."""
    config = target.model.config
    make = first("drafters.eagle3.model:Eagle3", "drafters.eagle3:Eagle3")
    config_for = first(
        "drafters.eagle3.model:config_for_target", "drafters.eagle3:config_for_target"
    )
    with target.model.device:
        drafter = make(config_for(config, draft_vocab_size=draft_vocab_size(config.vocab_size)))
    drafter.to(target.model.dtype)
    for version in range(num_versions):
        draw_weights(drafter)
        tensors = drafter.bundle_tensors()
        if is_predictable:
            make_drafter_predictable(tensors, config.hidden_size)
        manifest = first("buffer.records:Manifest")(
            version,
            version - 1 if version else None,
            "eagle3",
            drafter.config.to_json(),
            target.fingerprint,
            {},
        )
        content = save({name: tensor.cpu() for name, tensor in tensors.items()})
        files = {first("buffer.manifest:TENSORS", "buffer.weights:TENSORS"): content}
        publisher_in(root)(manifest, files)
    return sum(p.numel() * p.element_size() for p in drafter.parameters())
