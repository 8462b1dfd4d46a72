"""DFlash as its authors publish it: ``DFlashDraftModel``, with the names of our own module."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from drafters.dflash.paged import DFlash, DFlashConfig
from drafters.formats.checkpoint import Checkpoint
from drafters.formats.published import Imported, TargetTable

_ARCHITECTURES = ["DFlashDraftModel"]
_ROPES = (None, "default")
_COMPUTED: dict[str, Any] = {
    "attention_sink_bias": False, "projector_type": None, "input_embedding_scale": 1.0,
    "output_multiplier": 1.0, "final_logit_softcapping": None, "attention_bias": False,
    "hidden_act": "silu",
}  # fmt: skip
"""Keys of published configs -> the only value that is computed here."""


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
    own = {**given, **given.get("dflash_config", {})}
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
    for name, computed in _COMPUTED.items():
        if own.get(name) not in (computed, None):
            raise checkpoint.error(f"{name} is {own[name]}, which is not computed here")
    if target.config.model_type.startswith("gemma"):
        raise checkpoint.error("the target's embedding is scaled, which is not computed here")
    for name in ("mask_token_id", "target_layer_ids"):
        if name not in own:
            raise checkpoint.error(f"dflash_config of config.json has no {name}")
    block_size = own.get("block_size", 16)
    windows, causal = _masks(checkpoint, own, block_size)
    return DFlashConfig(
        hidden_size=hidden,
        target_vocab_size=vocab,
        intermediate_size=checkpoint.size("intermediate_size"),
        num_heads=checkpoint.size("num_attention_heads"),
        num_kv_heads=checkpoint.size("num_key_value_heads"),
        head_dim=checkpoint.size("head_dim"),
        layer_ids=tuple(k + 1 for k in own["target_layer_ids"]),
        block_size=block_size,
        mask_token_id=own["mask_token_id"],
        windows=windows,
        causal=causal,
        rms_norm_eps=float(checkpoint.setting("rms_norm_eps")),
        rope_theta=_rope_theta(checkpoint),
    )


def _rope_theta(checkpoint: Checkpoint) -> float:
    """Base of the rotary embedding, under its newer or its older name."""
    rope = checkpoint.config.get("rope_parameters") or {}
    scaling = checkpoint.config.get("rope_scaling") or rope
    if scaling.get("rope_type", scaling.get("type")) not in _ROPES:
        raise checkpoint.error(f"rope_scaling is {scaling}, which is not computed here")
    return float(rope["rope_theta"] if "rope_theta" in rope else checkpoint.setting("rope_theta"))


def _masks(
    checkpoint: Checkpoint, own: Mapping[str, Any], block_size: int
) -> tuple[tuple[int | None, ...], tuple[bool, ...]]:
    """Window and causality of each layer.

    Causality is ``is_causal``, else ``dflash_config.causal``; where neither is said, sliding layers
    are causal, unless ``use_swa`` makes them so.
    """
    given, num_layers = checkpoint.config, checkpoint.size("num_hidden_layers")
    kinds = given.get("layer_types") or ["full_attention"] * num_layers
    if len(kinds) != num_layers:
        raise checkpoint.error(f"layer_types has {len(kinds)} entries for {num_layers} layers")
    width = own.get("swa_window_size") or given.get("sliding_window")
    is_causal = given.get("is_causal", own.get("causal"))
    causal = [kind == "sliding_attention" if is_causal is None else is_causal for kind in kinds]
    if own.get("use_swa"):
        kinds = ["sliding_attention"] * num_layers
        causal = [bool(is_causal)] * num_layers
    sees = {"full_attention": None, "sliding_attention": width}
    unknown = [kind for kind in kinds if kind not in sees]
    if unknown:
        raise checkpoint.error(f"layer_types holds {unknown[0]!r}, which is not computed here")
    if "sliding_attention" in kinds and (width is None or width < block_size):
        raise checkpoint.error(f"sliding_window is {width} for blocks of {block_size}")
    return tuple(sees[kind] for kind in kinds), tuple(causal)
