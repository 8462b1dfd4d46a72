"""The two tensors of the target that training needs: embedding table and lm_head.

They are read directly from the safetensors files, so the trainer of an 8B target holds 2.5 GB of it
instead of 16. Where our own config does not say their names, they come from the target's modelling
code, built on the meta device.

Shapes: V vocabulary, H hidden.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from specops.distill import FrozenHead
from targets.config import their_config
from targets.own_config import EMBED, LM_HEAD, read_own_config


@dataclass(frozen=True, slots=True)
class TargetHead:
    """Frozen tensors of the target."""

    config: Any
    """Hugging Face text config of the target, or an ``OwnConfig``."""
    embed_VH: Tensor
    """Embedding table, scaled as the target scales it."""
    lm_head: FrozenHead
    embed_scale: float | None = None
    """Factor that ``embed_VH`` includes; ``None``: 1."""

    def tensors(self) -> dict[str, Tensor]:
        """What other weights of the same target change, [V, H] each, by name; one where the lm_head
        is the embedding."""
        lm_head = self.lm_head.weight_VH
        shared = lm_head is self.embed_VH
        return {"embed": self.embed_VH} if shared else {"embed": self.embed_VH, "lm_head": lm_head}


def load_target_head(folder: Path, device: torch.device, dtype: torch.dtype) -> TargetHead:
    """Read embedding table and lm_head of the target in ``folder``.

    Raises:
        ValueError: there are no safetensors files, the tensors are not in them, or the lm_head has
            a bias.
    """
    files = tensor_files(folder)
    config = read_own_config(folder)
    if config is None:
        return _by_its_code(files, folder, device, dtype)
    embed = read_tensor(files, EMBED, folder).to(device, dtype)
    tied = config.tie_word_embeddings
    lm_head = embed if tied else read_tensor(files, LM_HEAD, folder).to(device, dtype)
    return TargetHead(config, embed, FrozenHead(lm_head))


def _by_its_code(
    files: dict[str, Path], folder: Path, device: torch.device, dtype: torch.dtype
) -> TargetHead:
    """The head of a target that only ``transformers`` can describe."""
    from transformers import AutoModelForCausalLM

    config = their_config(folder)
    with torch.device("meta"):
        model: Any = AutoModelForCausalLM.from_config(  # type: ignore[no-untyped-call]
            config, trust_remote_code=False
        )
    names = {id(p): name for name, p in model.named_parameters(remove_duplicate=True)}
    inside, out = model.get_input_embeddings(), model.get_output_embeddings()
    if getattr(out, "bias", None) is not None:
        raise ValueError(f"{folder}: an lm_head with a bias is not supported")
    tied = out.weight is inside.weight or model.config.get_text_config().tie_word_embeddings
    embed = read_tensor(files, names[id(inside.weight)], folder).to(device, dtype)
    lm_head = embed if tied else read_tensor(files, names[id(out.weight)], folder).to(device, dtype)
    scale = getattr(inside, "scalar_embed_scale", None)
    text = config.get_text_config()
    return TargetHead(
        text,
        embed if scale is None else embed * torch.tensor(scale, dtype=dtype, device=device),
        FrozenHead(lm_head, getattr(text, "final_logit_softcapping", None)),
        scale,
    )


def tensor_files(folder: Path) -> dict[str, Path]:
    """File of each tensor, by name."""
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise ValueError(
            f"{folder} has no *.safetensors weights; pickle files are not loaded, because loading "
            f"one can run code. Convert the target to safetensors"
        )
    found: dict[str, Path] = {}
    for path in files:
        with safe_open(path, framework="pt") as opened:
            found.update(dict.fromkeys(opened.keys(), path))
    return found


def read_tensor(files: dict[str, Path], name: str, folder: Path) -> Tensor:
    """Tensor ``name``, or the only one with the same last two parts (wrapped checkpoints)."""
    ending = ".".join(name.split(".")[-2:])
    names = [name] if name in files else [n for n in files if n.endswith(ending)]
    if len(names) != 1:
        raise ValueError(f"{folder}: expected one tensor {name!r}, found {names}")
    with safe_open(files[names[0]], framework="pt") as opened:
        tensor: Tensor = opened.get_tensor(names[0])
    return tensor
