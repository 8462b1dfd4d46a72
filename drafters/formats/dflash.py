"""DFlash in the two layouts that are published: its authors' (``DFlashDraftModel``), and that of
vLLM's ``speculators``.

Both name the tensors as our own module does. They count tapped layers differently: the authors'
``target_layer_ids`` name the layer whose output is read, counted from 0, and
``aux_hidden_state_layer_ids`` of ``speculators`` are layer ids as ours, one more. In that layout
rows of a block see each other in every layer without a window, and in the others if
``sliding_window_non_causal`` says so; otherwise those are causal.
"""

from __future__ import annotations

from collections.abc import Mapping, Set
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
    rope_theta_of,
)
from drafters.formats.published import EMBEDDING, Imported, TargetTable

_ARCHITECTURES = ["DFlashDraftModel"]
_COMPUTED: dict[str, Any] = {
    **WHOLE, "attention_sink_bias": False, "projector_type": None, "input_embedding_scale": 1.0,
    "output_multiplier": 1.0, "attention_bias": False, "use_aux_hidden_state": True,
}  # fmt: skip
"""Keys of published configs -> the only value that is computed here."""
_FULL, _SLIDING = "full_attention", "sliding_attention"


def is_published(checkpoint: Checkpoint) -> bool:
    """Whether a checkpoint is in the authors' layout."""
    given = checkpoint.config  # speculators writes the same architecture when it saves
    return given.get("architectures") == _ARCHITECTURES and not is_speculators(checkpoint)


def is_speculators(checkpoint: Checkpoint) -> bool:
    """Whether a folder is in the layout of ``speculators``."""
    return checkpoint.config.get("speculators_model_type") == "dflash"


def from_published(checkpoint: Checkpoint, target: TargetTable) -> Imported:
    """Read the authors' layout.

    Raises:
        FormatError: a key of the config or a tensor is missing, unknown or misshapen, or the
            drafter was made for another target or needs what is not computed here; it names the
            first that does not fit.
    """
    nested = checkpoint.table("dflash_config")
    inner = replace(checkpoint, config={**checkpoint.config, **nested})
    num_layers = checkpoint.size("num_target_layers", target.num_layers)
    if num_layers != target.num_layers:
        raise checkpoint.error(
            f"num_target_layers is {num_layers}, but the target has {target.num_layers}"
        )
    shape = _shape(checkpoint, inner, target)
    layer_ids = tuple(k + 1 for k in _layers(inner, "target_layer_ids", target.num_layers - 1))
    decides = next((n for n in ("is_causal", "causal") if inner.config.get(n) is not None), None)
    is_causal = None if decides is None else inner.flag(decides)
    windows, causal = _masks(inner, shape["block_size"], is_causal)
    config = DFlashConfig(**shape, layer_ids=layer_ids, windows=windows, causal=causal)
    return Imported("dflash", config.to_json(), _tensors(checkpoint, config))


def from_speculators(checkpoint: Checkpoint, target: TargetTable) -> Imported:
    """Read the layout of ``speculators``.

    Raises:
        FormatError: see ``from_published``.
    """
    inner = checkpoint.with_layer()
    shape = _shape(inner, inner, target)
    refuse_others(
        checkpoint, {"sample_from_anchor": False, "target_hidden_size": target.hidden_size}
    )
    draft_vocab = checkpoint.size("draft_vocab_size")
    if draft_vocab != target.vocab_size:
        raise checkpoint.error(
            f"draft_vocab_size is {draft_vocab}, the target has {target.vocab_size}: DFlash drafts "
            f"with the target's whole lm_head here"
        )
    layer_ids = _layers(checkpoint, "aux_hidden_state_layer_ids", target.num_layers)
    is_causal = False if checkpoint.flag("sliding_window_non_causal") else None
    windows, causal = _masks(inner, shape["block_size"], is_causal)
    config = DFlashConfig(**shape, layer_ids=layer_ids, windows=windows, causal=causal)
    target.check_embedding(checkpoint)
    return Imported("dflash", config.to_json(), _tensors(checkpoint, config, {EMBEDDING}))


def _tensors(
    checkpoint: Checkpoint, config: DFlashConfig, beside: Set[str] = frozenset()
) -> dict[str, Tensor]:
    """The tensors of a bundle; the file may also hold those ``beside``."""
    with torch.device("meta"):
        wanted = {name: tuple(p.shape) for name, p in DFlash(config).named_parameters()}
    for name, shape in wanted.items():
        checkpoint.expect(name, shape)
    if unknown := sorted(checkpoint.files.keys() - wanted.keys() - beside):
        raise checkpoint.error(f"{unknown[0]} is not a tensor of DFlash")
    return {name: checkpoint.read(name) for name in wanted}


def _shape(checkpoint: Checkpoint, inner: Checkpoint, target: TargetTable) -> dict[str, Any]:
    """Arguments of ``DFlashConfig`` that both layouts name alike, checked against the target.

    Args:
        checkpoint: with the keys of the layers' config at the top.
        inner: also with those of the drafter's own.
    """
    hidden, vocab = checkpoint.size("hidden_size"), checkpoint.size("vocab_size")
    if (hidden, vocab) != (target.hidden_size, target.vocab_size):
        raise checkpoint.error(
            f"hidden_size is {hidden} and vocab_size {vocab}, but the target has "
            f"{target.hidden_size} and {target.vocab_size}"
        )
    refuse_others(inner, _COMPUTED)
    if target.config.model_type.startswith("gemma"):
        raise checkpoint.error("the target's embedding is scaled, which is not computed here")
    block_size = inner.size("block_size", 16)
    if block_size < 2:
        raise checkpoint.error("block_size is 1, which leaves no token to draft")
    heads, kv_heads, head_dim = checkpoint.heads()
    refuse_partial_rotation(checkpoint, head_dim)
    return {
        "hidden_size": hidden,
        "target_vocab_size": vocab,
        "intermediate_size": checkpoint.size("intermediate_size"),
        "num_heads": heads,
        "num_kv_heads": kv_heads,
        "head_dim": head_dim,
        "block_size": block_size,
        "mask_token_id": _mask_token(inner, vocab),
        "rms_norm_eps": checkpoint.real("rms_norm_eps"),
        "rope_theta": rope_theta_of(checkpoint),
    }


def _mask_token(inner: Checkpoint, vocab_size: int) -> int:
    found = inner.setting("mask_token_id")
    if type(found) is not int or not 0 <= found < vocab_size:
        raise inner.error(f"mask_token_id is {found!r}, none of the target's {vocab_size} tokens")
    return found


def _layers(checkpoint: Checkpoint, name: str, most: int) -> tuple[int, ...]:
    """The list of numbers from 0 to ``most`` under a key."""
    found = checkpoint.setting(name)
    is_list = isinstance(found, list) and len(found) > 0
    if not is_list or any(type(k) is not int or not 0 <= k <= most for k in found):
        raise checkpoint.error(f"{name} is {found!r}, not a list of 0..{most}")
    return tuple(found)


def _masks(
    inner: Checkpoint, block_size: int, is_causal: bool | None
) -> tuple[tuple[int | None, ...], tuple[bool, ...]]:
    """Window and causality of each layer.

    Args:
        is_causal: of all layers, as far as the checkpoint says; ``None``: sliding layers are
            causal, unless ``use_swa`` makes them so.
    """
    own, num_layers = inner.config, inner.size("num_hidden_layers")
    if num_layers > len(inner.files):
        raise inner.error(f"num_hidden_layers is {num_layers}, for {len(inner.files)} tensors")
    kinds = own.get("layer_types") or [_FULL] * num_layers
    if not isinstance(kinds, list) or len(kinds) != num_layers:
        num = len(kinds) if isinstance(kinds, list) else "no"
        raise inner.error(f"layer_types has {num} entries for {num_layers} layers")
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
    """``config.json`` and tensors in the authors' layout.

    Raises:
        ValueError: the layout cannot describe the drafter's tapped layers or masks.
    """
    c = DFlashConfig.from_json(config)
    if 0 in c.layer_ids:
        raise ValueError("the drafter reads the target's embeddings, which the layout cannot name")
    return {
        **_layers_config(c, target),
        "architectures": _ARCHITECTURES,
        "num_target_layers": target.num_layers,
        "dtype": dtype_name(tensors),
        "block_size": c.block_size,
        "dflash_config": {
            "mask_token_id": c.mask_token_id,
            "target_layer_ids": [k - 1 for k in c.layer_ids],
            **_causality(c),
        },
    }, dict(tensors)


def to_speculators(
    config: Mapping[str, Any], tensors: Mapping[str, Tensor], target: TargetTable
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """``config.json`` and tensors in the layout of ``speculators``, which takes embedding and
    lm_head from the target that the config names.

    Raises:
        ValueError: the layout cannot describe the drafter's masks.
    """
    c = DFlashConfig.from_json(config)
    pairs = list(zip(c.windows, c.causal, strict=True))
    if any(causal for width, causal in pairs if width is None):
        raise ValueError(
            "a layer of the drafter that has no window is causal, which the layout cannot say"
        )
    sliding = {causal for width, causal in pairs if width is not None}
    if len(sliding) > 1:
        raise ValueError(
            "some layers of the drafter with a window are causal and some are not, which the "
            "layout cannot say"
        )
    return {
        "architectures": ["DFlashSpeculator"],
        "speculators_model_type": "dflash",
        "transformer_layer_config": _layers_config(c, target),
        "draft_vocab_size": c.target_vocab_size,
        "target_hidden_size": None,
        "dtype": dtype_name(tensors),
        "block_size": c.block_size,
        "aux_hidden_state_layer_ids": list(c.layer_ids),
        "mask_token_id": c.mask_token_id,
        "sliding_window_non_causal": sliding == {False},
        "sample_from_anchor": False,
        "speculators_config": target.speculators_config("dflash", c.block_size - 1),
    }, dict(tensors)


def _layers_config(config: DFlashConfig, target: TargetTable) -> dict[str, Any]:
    """Hugging Face's config of the drafter's layers.

    Raises:
        ValueError: the layers have windows of several widths.
    """
    c = config
    widths = sorted({width for width in c.windows if width is not None})
    if len(widths) > 1:
        raise ValueError(f"the drafter has windows of {widths}, and the layout holds one width")
    return {
        "model_type": "qwen3",
        "vocab_size": c.target_vocab_size,
        "hidden_size": c.hidden_size,
        "intermediate_size": c.intermediate_size,
        "num_hidden_layers": len(c.windows),
        "num_attention_heads": c.num_heads,
        "num_key_value_heads": c.num_kv_heads,
        "head_dim": c.head_dim,
        "hidden_act": "silu",
        "attention_bias": False,
        "attention_dropout": 0.0,
        "rms_norm_eps": c.rms_norm_eps,
        "rope_theta": c.rope_theta,
        "max_position_embeddings": target.max_positions,
        "tie_word_embeddings": False,
        "layer_types": [_FULL if width is None else _SLIDING for width in c.windows],
        "sliding_window": widths[0] if widths else None,
        "use_sliding_window": bool(widths),
    }


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
