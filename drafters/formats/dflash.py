"""DFlash as its authors publish it: ``DFlashDraftModel``, with the names of our own module."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from drafters.dflash.model import DFlash, DFlashConfig
from drafters.formats.checkpoint import (
    WHOLE,
    Checkpoint,
    dtype_name,
    refuse_others,
    refuse_partial_rotation,
)
from drafters.formats.published import Imported, TargetTable
from targets.fits import num_positions

_ARCHITECTURES = ["DFlashDraftModel"]
_COMPUTED: dict[str, Any] = {
    **WHOLE, "attention_sink_bias": False, "projector_type": None, "input_embedding_scale": 1.0,
    "output_multiplier": 1.0, "attention_bias": False, "use_aux_hidden_state": True,
}  # fmt: skip
"""Keys of published configs -> the only value that is computed here."""
_MAX_POSITIONS = 32_768
"""What an exported config says of a target that does not say."""
_FULL, _SLIDING = "full_attention", "sliding_attention"


def is_published(checkpoint: Checkpoint) -> bool:
    """Whether a checkpoint is in this layout."""
    return checkpoint.config.get("architectures") == _ARCHITECTURES


def from_published(checkpoint: Checkpoint, target: TargetTable) -> Imported:
    """Read the layout.

    Raises:
        FormatError: a key of the config or a tensor is missing, unknown or misshapen, or the
            drafter was made for another target or needs what is not computed here; it names the
            first that does not fit.
    """
    config = _config(checkpoint, target)
    with torch.device("meta"):
        wanted = {name: tuple(p.shape) for name, p in DFlash(config).named_parameters()}
    for name, shape in wanted.items():
        checkpoint.expect(name, shape)
    if unknown := sorted(checkpoint.files.keys() - wanted.keys()):
        raise checkpoint.error(f"{unknown[0]} is not a tensor of DFlash")
    return Imported("dflash", config.to_json(), {name: checkpoint.read(name) for name in wanted})


def _config(checkpoint: Checkpoint, target: TargetTable) -> DFlashConfig:
    """The drafter's shape, checked against the target's."""
    given = checkpoint.config
    nested = checkpoint.table("dflash_config")
    inner = replace(checkpoint, config={**given, **nested})
    hidden, vocab = checkpoint.size("hidden_size"), checkpoint.size("vocab_size")
    if (hidden, vocab) != (target.hidden_size, target.vocab_size):
        raise checkpoint.error(
            f"hidden_size is {hidden} and vocab_size {vocab}, but the target has "
            f"{target.hidden_size} and {target.vocab_size}"
        )
    num_layers = checkpoint.size("num_target_layers", target.num_layers)
    if num_layers != target.num_layers:
        raise checkpoint.error(
            f"num_target_layers is {num_layers}, but the target has {target.num_layers}"
        )
    refuse_others(inner, _COMPUTED)
    if target.config.model_type.startswith("gemma"):
        raise checkpoint.error("the target's embedding is scaled, which is not computed here")
    block_size = inner.size("block_size", 16)
    if block_size < 2:
        raise checkpoint.error("block_size is 1, which leaves no token to draft")
    windows, causal = _masks(inner, block_size)
    heads, kv_heads, head_dim = checkpoint.heads()
    refuse_partial_rotation(checkpoint, head_dim)
    return DFlashConfig(
        hidden_size=hidden,
        target_vocab_size=vocab,
        intermediate_size=checkpoint.size("intermediate_size"),
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        layer_ids=_layer_ids(inner, target.num_layers),
        block_size=block_size,
        mask_token_id=_mask_token(inner, vocab),
        windows=windows,
        causal=causal,
        rms_norm_eps=checkpoint.real("rms_norm_eps"),
        rope_theta=_rope_theta(checkpoint),
    )


def _mask_token(inner: Checkpoint, vocab_size: int) -> int:
    found = inner.setting("mask_token_id")
    if type(found) is not int or not 0 <= found < vocab_size:
        raise inner.error(f"mask_token_id is {found!r}, none of the target's {vocab_size} tokens")
    return found


def _layer_ids(inner: Checkpoint, num_layers: int) -> tuple[int, ...]:
    """Tapped layers; published ids name the layer whose output is read, counted from 0."""
    found = inner.setting("target_layer_ids")
    is_list = isinstance(found, list) and len(found) > 0
    if not is_list or any(type(k) is not int or not 0 <= k < num_layers for k in found):
        raise inner.error(f"target_layer_ids is {found!r}, not a list of 0..{num_layers - 1}")
    return tuple(k + 1 for k in found)


def _rope_theta(checkpoint: Checkpoint) -> float:
    """Base of the rotary embedding, under its newer or its older name."""
    rope = checkpoint.table("rope_parameters")
    scaling = checkpoint.table("rope_scaling") or rope
    if scaling.get("rope_type", scaling.get("type")) not in (None, "default"):
        raise checkpoint.error(f"rope_scaling is {scaling}, which is not computed here")
    nested = rope.get("rope_theta")
    given = checkpoint.setting("rope_theta") if nested is None else nested
    return checkpoint.checked_real("rope_theta", given)


def _masks(inner: Checkpoint, block_size: int) -> tuple[tuple[int | None, ...], tuple[bool, ...]]:
    """Window and causality of each layer.

    Causality is ``is_causal``, else ``dflash_config.causal``; where neither is said, sliding layers
    are causal, unless ``use_swa`` makes them so.
    """
    own, num_layers = inner.config, inner.size("num_hidden_layers")
    if num_layers > len(inner.files):
        raise inner.error(f"num_hidden_layers is {num_layers}, for {len(inner.files)} tensors")
    kinds = own.get("layer_types") or [_FULL] * num_layers
    if not isinstance(kinds, list) or len(kinds) != num_layers:
        num = len(kinds) if isinstance(kinds, list) else "no"
        raise inner.error(f"layer_types has {num} entries for {num_layers} layers")
    decides = next((n for n in ("is_causal", "causal") if own.get(n) is not None), None)
    is_causal = None if decides is None else inner.flag(decides)
    causal = [kind == _SLIDING if is_causal is None else is_causal for kind in kinds]
    if inner.flag("use_swa"):
        kinds = [_SLIDING] * num_layers
        causal = [bool(is_causal)] * num_layers
    unknown = [kind for kind in kinds if kind not in (_FULL, _SLIDING)]
    if unknown:
        raise inner.error(f"layer_types holds {unknown[0]!r}, which is not computed here")
    width = None
    if _SLIDING in kinds:
        name = "swa_window_size" if own.get("swa_window_size") else "sliding_window"
        width = inner.size(name)
        if width < block_size:
            raise inner.error(f"{name} is {width} for blocks of {block_size}")
    return tuple(None if kind == _FULL else width for kind in kinds), tuple(causal)


def to_published(
    config: Mapping[str, Any], tensors: Mapping[str, Tensor], target: TargetTable
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """``config.json`` and tensors in the layout, whose names are ours.

    Raises:
        ValueError: the layout cannot describe the drafter's tapped layers or masks.
    """
    c = DFlashConfig.from_json(config)
    if 0 in c.layer_ids:
        raise ValueError("the drafter reads the target's embeddings, which the layout cannot name")
    widths = sorted({width for width in c.windows if width is not None})
    if len(widths) > 1:
        raise ValueError(f"the drafter has windows of {widths}, and the layout holds one width")
    return {
        "architectures": _ARCHITECTURES,
        "model_type": "qwen3",
        "vocab_size": c.target_vocab_size,
        "hidden_size": c.hidden_size,
        "intermediate_size": c.intermediate_size,
        "num_hidden_layers": len(c.windows),
        "num_target_layers": target.num_layers,
        "num_attention_heads": c.num_heads,
        "num_key_value_heads": c.num_kv_heads,
        "head_dim": c.head_dim,
        "hidden_act": "silu",
        "attention_bias": False,
        "attention_dropout": 0.0,
        "rms_norm_eps": c.rms_norm_eps,
        "rope_theta": c.rope_theta,
        "max_position_embeddings": num_positions(target.config) or _MAX_POSITIONS,
        "tie_word_embeddings": False,
        "dtype": dtype_name(tensors),
        "block_size": c.block_size,
        "layer_types": [_FULL if width is None else _SLIDING for width in c.windows],
        "sliding_window": widths[0] if widths else None,
        "use_sliding_window": bool(widths),
        "dflash_config": {
            "mask_token_id": c.mask_token_id,
            "target_layer_ids": [k - 1 for k in c.layer_ids],
            **_causality(c),
        },
    }, dict(tensors)


def _causality(config: DFlashConfig) -> dict[str, bool]:
    """What ``dflash_config`` says of it: nothing where exactly the sliding layers are causal."""
    pairs = zip(config.windows, config.causal, strict=True)
    if all((width is not None) == causal for width, causal in pairs):
        return {}
    if len(set(config.causal)) > 1:
        raise ValueError(
            "some layers of the drafter are causal, but not exactly those with a window, which the "
            "layout cannot say"
        )
    return {"causal": config.causal[0]}
