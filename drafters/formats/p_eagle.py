"""P-EAGLE in the layouts that are published: EAGLE-3's, with further layers and with what stands
for rows that are not known.

Beside EAGLE-3's tensors (``drafters.formats.eagle3``) there are ``layers.1.*`` and so on, and
``mask_hidden``, in place of tapped features. In place of a token's embedding there is the row of a
mask token in the embedding table; the other rows must be the target's. vLLM calls that token
``ptd_token_id`` or ``pard_token``, ``speculators`` calls it ``mask_token_id``.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from drafters.eagle3.model import Eagle3Config
from drafters.formats import eagle3
from drafters.formats.checkpoint import Checkpoint, joined_rows
from drafters.formats.published import EMBEDDING, Imported, TargetTable
from drafters.p_eagle import PEagleConfig

_MASK_HIDDEN = "mask_hidden"
_MASK_IDS = ("mask_token_id", "ptd_token_id", "pard_token")
_SPECULATIVE_TOKENS = 7
"""Draft length that an exported config suggests."""


def is_published(checkpoint: Checkpoint) -> bool:
    """Whether a folder holds a P-EAGLE drafter, by its tensors or by what it says."""
    given = checkpoint.config
    is_said = given.get("speculators_model_type") == "peagle" or given.get("parallel_drafting")
    return _MASK_HIDDEN in checkpoint.files or is_said is True


def from_published(checkpoint: Checkpoint, target: TargetTable) -> Imported:
    """Read either layout.

    Raises:
        FormatError: names the first key or shape that does not fit.
    """
    layer = checkpoint.table("transformer_layer_config")
    inner = replace(checkpoint, config={**layer, **checkpoint.config})
    num_layers = inner.size("num_hidden_layers", 1)
    mask_id = _mask_token(inner, target.vocab_size)
    numbers = {name: _number(name) or 0 for name in checkpoint.files}
    for name, number in sorted(numbers.items()):
        if number >= num_layers:
            raise checkpoint.error(f"there is {name}, but num_hidden_layers is {num_layers}")
    further = [name for name, number in numbers.items() if number > 0]
    left = checkpoint.files.keys() - {*further, _MASK_HIDDEN, EMBEDDING}
    first = _first_layer(replace(checkpoint, files={n: checkpoint.files[n] for n in left}), target)
    c = Eagle3Config.from_json(first.config)
    tensors = {**first.tensors, **_further(checkpoint, c, num_layers, set(further))}
    tensors |= _masks(checkpoint, target, c, mask_id)
    return Imported("p_eagle", PEagleConfig(c, num_layers, mask_id).to_json(), tensors)


def _number(name: str) -> int | None:
    """Layer that a tensor belongs to; ``None``: none with a number."""
    first, _, rest = name.partition(".")
    number = rest.partition(".")[0]
    return int(number) if first == "layers" and number.isdecimal() else None


def _first_layer(checkpoint: Checkpoint, target: TargetTable) -> Imported:
    """What is EAGLE-3's, read as such. ``norm_output`` means nothing without rows that read
    outputs."""
    single = {"num_hidden_layers": 1, "norm_output": False}
    layer = checkpoint.config.get("transformer_layer_config")
    if layer is not None:
        config = {**checkpoint.config, "transformer_layer_config": {**layer, **single}}
        return eagle3.from_speculators(
            replace(checkpoint, config={**config, "norm_output": False}), target
        )
    alone = replace(checkpoint, config={**checkpoint.config, **single})
    has_number = any(_number(name) == 0 for name in checkpoint.files)
    return eagle3.from_layer(alone, target, alone, "layers.0." if has_number else "midlayer.")


def _mask_token(checkpoint: Checkpoint, vocab_size: int) -> int:
    given = checkpoint.config
    found = next((given[name] for name in _MASK_IDS if given.get(name) is not None), None)
    if type(found) is not int or not 0 <= found < vocab_size:
        raise checkpoint.error(
            f"config.json must name a mask token of the target's {vocab_size} in one of "
            f"{', '.join(_MASK_IDS)}, got {found!r}"
        )
    return found


def _layer_shapes(config: Eagle3Config, number: int) -> dict[str, tuple[int, ...]]:
    """Shapes of the tensors of a layer behind the first."""
    c, prefix = config, f"layers.{number}."
    inner, kv = c.num_heads * c.head_dim, c.num_kv_heads * c.head_dim
    return {
        f"{prefix}input_layernorm.weight": (c.hidden_size,),
        f"{prefix}self_attn.q_proj.weight": (inner, c.hidden_size),
        f"{prefix}self_attn.k_proj.weight": (kv, c.hidden_size),
        f"{prefix}self_attn.v_proj.weight": (kv, c.hidden_size),
        f"{prefix}self_attn.o_proj.weight": (c.hidden_size, inner),
        f"{prefix}post_attention_layernorm.weight": (c.hidden_size,),
        f"{prefix}mlp.gate_proj.weight": (c.intermediate_size, c.hidden_size),
        f"{prefix}mlp.up_proj.weight": (c.intermediate_size, c.hidden_size),
        f"{prefix}mlp.down_proj.weight": (c.hidden_size, c.intermediate_size),
    }


_PLAIN = {
    "input_layernorm": "input_layernorm",
    "post_attention_layernorm": "post_attention_layernorm",
    "o_proj": "self_attn.o_proj",
    "down_proj": "mlp.down_proj",
}
"""Our name -> published name, within a layer."""


def _joined_names(number: int) -> Iterator[tuple[str, list[str]]]:
    """(Our name, published names of its parts) of the tensors that hold several."""
    ours, theirs = f"rest.{number - 1}.", f"layers.{number}."
    yield f"{ours}qkv_proj.weight", [f"{theirs}self_attn.{x}_proj.weight" for x in "qkv"]
    yield f"{ours}gate_up_proj.weight", [f"{theirs}mlp.{x}_proj.weight" for x in ("gate", "up")]


def _further(
    checkpoint: Checkpoint, config: Eagle3Config, num_layers: int, found: set[str]
) -> dict[str, Tensor]:
    """The layers behind the first."""
    tensors = {}
    for number in range(1, num_layers):
        for name, shape in _layer_shapes(config, number).items():
            checkpoint.expect(name, shape)
            found.discard(name)
        for ours, theirs in _PLAIN.items():
            name = f"layers.{number}.{theirs}.weight"
            tensors[f"rest.{number - 1}.{ours}.weight"] = checkpoint.read(name)
        for joined, parts in _joined_names(number):
            tensors[joined] = joined_rows(checkpoint, parts)
    if found:
        raise checkpoint.error(f"{min(found)} is not a tensor of P-EAGLE")
    return tensors


def _masks(
    checkpoint: Checkpoint, target: TargetTable, config: Eagle3Config, mask_id: int
) -> dict[str, Tensor]:
    """What stands for features and for an embedding."""
    width = len(config.layer_ids) * config.hidden_size
    found = checkpoint.shape(_MASK_HIDDEN)
    checkpoint.expect(_MASK_HIDDEN, (1, width) if found == (1, width) else (1, 1, width))
    hidden = checkpoint.read(_MASK_HIDDEN).view(1, 1, width)
    if EMBEDDING not in checkpoint.files:
        return {_MASK_HIDDEN: hidden, "mask_embed": target.embed_VH[mask_id].to(hidden.dtype)}
    target.check_embedding(checkpoint, but=mask_id)
    return {_MASK_HIDDEN: hidden, "mask_embed": checkpoint.read(EMBEDDING)[mask_id].clone()}


def to_published(
    config: Mapping[str, Any], tensors: Mapping[str, Tensor], target: TargetTable
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """``config.json`` and tensors as vLLM and Hugging Face read them."""
    c = PEagleConfig.from_json(config)
    given, out = eagle3.to_published(c.first.to_json(), tensors, target)
    ids = dict.fromkeys(_MASK_IDS, c.mask_token_id)
    more = {"num_hidden_layers": c.num_layers, "parallel_drafting": True}
    return {**given, **more, **ids}, {**out, **_beside(c, tensors, target)}


def to_speculators(
    config: Mapping[str, Any], tensors: Mapping[str, Tensor], target: TargetTable
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """``config.json`` and tensors in the layout of ``speculators``."""
    c = PEagleConfig.from_json(config)
    given, out = eagle3.to_speculators(c.first.to_json(), tensors, target)
    layer = {**given["transformer_layer_config"], "num_hidden_layers": c.num_layers}
    return {
        **given,
        "architectures": ["PEagleSpeculator"],
        "speculators_model_type": "peagle",
        "transformer_layer_config": layer,
        "mask_token_id": c.mask_token_id,
        "speculators_config": target.speculators_config("peagle", _SPECULATIVE_TOKENS),
    }, {**out, **_beside(c, tensors, target)}


def _beside(
    config: PEagleConfig, tensors: Mapping[str, Tensor], target: TargetTable
) -> dict[str, Tensor]:
    """The tensors that EAGLE-3 has not, and the embedding table with the mask's row."""
    c = config.first
    table = target.embed_VH.to(tensors["mask_embed"].dtype).clone()
    table[config.mask_token_id] = tensors["mask_embed"]
    out = {_MASK_HIDDEN: tensors[_MASK_HIDDEN], EMBEDDING: table}
    heads = [n * c.head_dim for n in (c.num_heads, c.num_kv_heads, c.num_kv_heads)]
    for number in range(1, config.num_layers):
        for ours, theirs in _PLAIN.items():
            name = f"layers.{number}.{theirs}.weight"
            out[name] = tensors[f"rest.{number - 1}.{ours}.weight"]
        for sizes, (joined, parts) in zip(
            (heads, [c.intermediate_size] * 2), _joined_names(number), strict=True
        ):
            out |= dict(zip(parts, torch.split(tensors[joined], sizes), strict=True))
    return out
