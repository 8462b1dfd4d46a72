"""EAGLE-3 and 3.1 in the two layouts that are published: that of Hugging Face and SGLang
(``LlamaForCausalLMEagle3``), and that of vLLM's ``speculators``.

Both hold the same tensors; the layer is ``midlayer`` in the one and ``layers.0`` in the other.
They count tapped layers differently. ``eagle_aux_hidden_state_layer_ids`` at the top of a config is
what vLLM reads: a layer id k as ours, the residual stream that enters layer k. Within
``eagle_config`` it is what SGLang reads, and names the layer whose *output* that is, k - 1.

Shapes as in ``drafters.eagle3.model``; F = m * H.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from drafters.eagle3.model import Eagle3Config, default_layer_ids
from drafters.formats.checkpoint import (
    FLOATING,
    WHOLE,
    Checkpoint,
    dtype_name,
    joined_rows,
    refuse_others,
    refuse_partial_rotation,
    refuse_windows,
    rope_theta_of,
)
from drafters.formats.published import EMBEDDING, Imported, TargetTable, Wanted

ARCHITECTURE = "LlamaForCausalLMEagle3"
_IDS = "eagle_aux_hidden_state_layer_ids"
_VARIANTS = ("norm_before_residual", "fc_norm", "norm_output")
_UNSUPPORTED = ("norm_before_fc", "attention_bias", "mlp_bias")
_SPECULATIVE_TOKENS = 4
"""Draft length that an exported config suggests."""


def is_published(checkpoint: Checkpoint) -> bool:
    """Whether a folder is in Hugging Face's and SGLang's layout."""
    named = checkpoint.config.get("architectures")
    return isinstance(named, list) and ARCHITECTURE in named


def is_speculators(checkpoint: Checkpoint) -> bool:
    """Whether a folder is in the layout of ``speculators``."""
    return checkpoint.config.get("speculators_model_type") == "eagle3"


def from_published(checkpoint: Checkpoint, target: TargetTable) -> Imported:
    """Read Hugging Face's and SGLang's layout.

    Raises:
        FormatError: names the first key or shape that does not fit.
    """
    return from_layer(checkpoint, target, checkpoint, "midlayer.")


def from_speculators(checkpoint: Checkpoint, target: TargetTable) -> Imported:
    """Read the layout of ``speculators``.

    Raises:
        FormatError: names the first key or shape that does not fit.
    """
    inner = checkpoint.with_layer()
    if "norm_before_residual" not in checkpoint.config:
        # speculators takes False then, vLLM True
        raise checkpoint.error("config.json has no norm_before_residual")
    return from_layer(checkpoint, target, inner, "layers.0.")


def from_layer(
    checkpoint: Checkpoint, target: TargetTable, inner: Checkpoint, prefix: str
) -> Imported:
    """Read a checkpoint of one layer.

    Args:
        inner: the checkpoint with the keys of its layer's config at the top.
        prefix: of the names of the layer's tensors.

    Raises:
        FormatError: names the first key or shape that does not fit.
    """
    config = _config(inner, target)
    kept, ignored = _tensors_wanted(config, prefix)
    present = {name for name in ignored if name in checkpoint.files}
    for name, (shape, dtypes) in {**kept, **{n: ignored[n] for n in present}}.items():
        checkpoint.expect(name, shape, dtypes)
    if unknown := sorted(checkpoint.files.keys() - kept.keys() - ignored.keys()):
        raise checkpoint.error(f"{unknown[0]} is not a tensor of EAGLE-3")
    target.check_embedding(checkpoint)
    tensors = _renamed(checkpoint, config, prefix)
    d2t = _checked_vocabulary(checkpoint, config)
    if d2t is not None:
        tensors["d2t"] = d2t
    return Imported("eagle3", config.to_json(), tensors)


def _config(checkpoint: Checkpoint, target: TargetTable) -> Eagle3Config:
    """The drafter's shape, checked against the target's."""
    given = checkpoint.config
    for name in _UNSUPPORTED:
        if given.get(name):
            raise checkpoint.error(f"{name} is set in config.json, which is not supported")
    if given.get("num_hidden_layers", 1) != 1:
        raise checkpoint.error(f"num_hidden_layers is {given['num_hidden_layers']}, expected 1")
    refuse_others(checkpoint, WHOLE)
    refuse_windows(checkpoint)
    hidden, vocab = checkpoint.size("hidden_size"), checkpoint.size("vocab_size")
    heads, kv_heads, head_dim = checkpoint.heads()
    refuse_partial_rotation(checkpoint, head_dim)
    source = given.get("target_hidden_size") or hidden
    for name, found, wanted in (
        ("hidden_size", hidden, target.hidden_size),
        ("target_hidden_size", source, target.hidden_size),
        ("vocab_size", vocab, target.vocab_size),
    ):
        if found != wanted:
            raise checkpoint.error(f"{name} is {found}, the target has {wanted}")
    return Eagle3Config(
        hidden_size=hidden,
        target_vocab_size=vocab,
        draft_vocab_size=checkpoint.size("draft_vocab_size", vocab),
        intermediate_size=checkpoint.size("intermediate_size"),
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        layer_ids=_layer_ids(checkpoint, target),
        rms_norm_eps=checkpoint.real("rms_norm_eps", 1e-6),
        rope_theta=rope_theta_of(checkpoint),
        **{name: checkpoint.flag(name) for name in _VARIANTS},
    )


def _layer_ids(checkpoint: Checkpoint, target: TargetTable) -> tuple[int, ...]:
    eagle = replace(checkpoint, config=checkpoint.table("eagle_config"))
    if not eagle.flag("use_aux_hidden_state", default=True):
        raise checkpoint.error(
            "use_aux_hidden_state is false in eagle_config: a drafter that reads the last layer "
            "alone is not EAGLE-3"
        )
    above, nested = _ids(checkpoint, _IDS), _ids(eagle, f"{_IDS} of eagle_config")
    shifted = None if nested is None else [k + 1 for k in nested]
    if above is not None and nested is not None and above != shifted:
        raise checkpoint.error(
            f"{_IDS} is {above}, so that within eagle_config it should be one less, but that is "
            f"{nested}"
        )
    found = above if above is not None else shifted
    ids = default_layer_ids(target.num_layers) if found is None else tuple(found)
    if not ids or any(not 0 <= k <= target.num_layers for k in ids):
        raise checkpoint.error(f"tapped layers {list(ids)} are not among 0..{target.num_layers}")
    return ids


def _ids(checkpoint: Checkpoint, where: str) -> list[int] | None:
    found = checkpoint.config.get(_IDS)
    if found is None:
        return None
    if not isinstance(found, list) or any(type(k) is not int for k in found):
        raise checkpoint.error(f"{where} must be a list of layers, got {found!r}")
    return found


def _tensors_wanted(config: Eagle3Config, prefix: str) -> tuple[Wanted, Wanted]:
    """Shape and dtypes of the tensors that there must be, and of those that may be there too."""
    c, hidden = config, config.hidden_size
    shapes: dict[str, tuple[int, ...]] = {
        "fc.weight": (hidden, len(c.layer_ids) * hidden),
        f"{prefix}hidden_norm.weight": (hidden,),
        f"{prefix}input_layernorm.weight": (hidden,),
        f"{prefix}self_attn.q_proj.weight": (c.num_heads * c.head_dim, 2 * hidden),
        f"{prefix}self_attn.k_proj.weight": (c.num_kv_heads * c.head_dim, 2 * hidden),
        f"{prefix}self_attn.v_proj.weight": (c.num_kv_heads * c.head_dim, 2 * hidden),
        f"{prefix}self_attn.o_proj.weight": (hidden, c.num_heads * c.head_dim),
        f"{prefix}post_attention_layernorm.weight": (hidden,),
        f"{prefix}mlp.gate_proj.weight": (c.intermediate_size, hidden),
        f"{prefix}mlp.up_proj.weight": (c.intermediate_size, hidden),
        f"{prefix}mlp.down_proj.weight": (hidden, c.intermediate_size),
        "norm.weight": (hidden,),
        "lm_head.weight": (c.draft_vocab_size, hidden),
    }
    if c.fc_norm:
        shapes |= {f"fc_norm.{i}.weight": (hidden,) for i in range(len(c.layer_ids))}
    kept: Wanted = {name: (shape, FLOATING) for name, shape in shapes.items()}
    maps: Wanted = {
        "d2t": ((c.draft_vocab_size,), {"I64"}),
        "t2d": ((c.target_vocab_size,), {"BOOL"}),
    }
    ignored: Wanted = {EMBEDDING: ((c.target_vocab_size, hidden), FLOATING)}
    if c.draft_vocab_size != c.target_vocab_size:
        return {**kept, **maps}, ignored
    return kept, {**ignored, **maps}


def _renamed(checkpoint: Checkpoint, config: Eagle3Config, prefix: str) -> dict[str, Tensor]:
    """The tensors of a bundle, without ``d2t``."""
    read = checkpoint.read
    tensors = {ours: read(theirs) for ours, theirs in _plain_names(config, prefix)}
    for ours, theirs in _joined_names(prefix):
        tensors[ours] = joined_rows(checkpoint, theirs)
    return tensors


def _plain_names(config: Eagle3Config, prefix: str) -> list[tuple[str, str]]:
    """(Our name, published name) of the tensors that are the same."""
    in_layer = {
        "hidden_norm": "hidden_norm",
        "input_layernorm": "input_layernorm",
        "post_attention_layernorm": "post_attention_layernorm",
        "o_proj": "self_attn.o_proj",
        "down_proj": "mlp.down_proj",
    }
    names = [(f"{ours}.weight", f"{prefix}{theirs}.weight") for ours, theirs in in_layer.items()]
    names += [(f"{name}.weight", f"{name}.weight") for name in ("fc", "norm", "lm_head")]
    if config.fc_norm:
        names += [(f"fc_norm.{i}.weight",) * 2 for i in range(len(config.layer_ids))]
    return names


def _joined_names(prefix: str) -> list[tuple[str, list[str]]]:
    """(Our name, published names of its parts) of the tensors that hold several."""
    return [
        ("qkv_proj.weight", [f"{prefix}self_attn.{x}_proj.weight" for x in "qkv"]),
        ("gate_up_proj.weight", [f"{prefix}mlp.{x}_proj.weight" for x in ("gate", "up")]),
    ]


def _checked_vocabulary(checkpoint: Checkpoint, config: Eagle3Config) -> Tensor | None:
    """``d2t`` of a reduced vocabulary, after comparing it with ``t2d``; ``None`` of a whole one."""
    if not {"d2t", "t2d"} <= checkpoint.files.keys():
        return None
    d2t, t2d = checkpoint.read("d2t"), checkpoint.read("t2d")
    ids = torch.arange(len(d2t)) + d2t
    size = config.target_vocab_size
    if ids.min() < 0 or ids.max() >= size:
        raise checkpoint.error(f"d2t maps a draft token outside the target's {size} tokens")
    if bool((ids.diff() <= 0).any()):
        raise checkpoint.error("d2t maps draft tokens to target tokens that do not ascend")
    if int(t2d.sum()) != len(ids) or not bool(t2d[ids].all()):
        raise checkpoint.error("t2d does not mark exactly the target tokens that d2t maps to")
    return d2t if config.draft_vocab_size != size else None


def to_published(
    config: Mapping[str, Any], tensors: Mapping[str, Tensor], target: TargetTable
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """``config.json`` and tensors in Hugging Face's and SGLang's layout.

    There is no ``target_hidden_size``: where a config has one, the authors' code takes the drafter
    to have an embedding table of its own and leaves it random if the checkpoint lacks it.
    """
    c = Eagle3Config.from_json(config)
    out = _published_tensors(c, tensors, "midlayer.")
    out |= _vocabulary_maps(c, tensors.get("d2t"))
    return {
        **_layer_config(c, target),
        "architectures": [ARCHITECTURE],
        "draft_vocab_size": c.draft_vocab_size,
        "tie_word_embeddings": False,
        "dtype": dtype_name(tensors),
        _IDS: list(c.layer_ids),
        "eagle_config": {_IDS: [k - 1 for k in c.layer_ids], "use_aux_hidden_state": True},
        **{name: getattr(c, name) for name in _VARIANTS},
    }, out


def to_speculators(
    config: Mapping[str, Any], tensors: Mapping[str, Tensor], target: TargetTable
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """``config.json`` and tensors in the layout of ``speculators``.

    The target's embedding table is among them: without it, speculators 0.9.0 under transformers 5
    leaves its own uninitialised.
    """
    c = Eagle3Config.from_json(config)
    out = _published_tensors(c, tensors, "layers.0.")
    out[EMBEDDING] = target.embed_VH.to(out["norm.weight"].dtype)
    if c.draft_vocab_size != c.target_vocab_size:
        out |= _vocabulary_maps(c, tensors.get("d2t"))
    return {
        "architectures": ["Eagle3Speculator"],
        "speculators_model_type": "eagle3",
        "transformer_layer_config": _layer_config(c, target),
        "draft_vocab_size": c.draft_vocab_size,
        "target_hidden_size": None,
        "dtype": dtype_name(tensors),
        _IDS: list(c.layer_ids),
        "embed_requires_grad": False,
        "norm_before_fc": False,
        **{name: getattr(c, name) for name in _VARIANTS},
        "speculators_config": target.speculators_config("eagle3", _SPECULATIVE_TOKENS),
    }, out


def _layer_config(config: Eagle3Config, target: TargetTable) -> dict[str, Any]:
    """Hugging Face's config of the drafter's layer."""
    c = config
    return {
        "model_type": "llama",
        "vocab_size": c.target_vocab_size,
        "hidden_size": c.hidden_size,
        "intermediate_size": c.intermediate_size,
        "num_hidden_layers": 1,
        "num_attention_heads": c.num_heads,
        "num_key_value_heads": c.num_kv_heads,
        "head_dim": c.head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": target.max_positions,
        "rms_norm_eps": c.rms_norm_eps,
        "rope_theta": c.rope_theta,
        "attention_bias": False,
        "mlp_bias": False,
    }


def _published_tensors(
    config: Eagle3Config, tensors: Mapping[str, Tensor], prefix: str
) -> dict[str, Tensor]:
    c = config
    out = {theirs: tensors[ours] for ours, theirs in _plain_names(c, prefix)}
    sizes = {
        "qkv_proj.weight": [n * c.head_dim for n in (c.num_heads, c.num_kv_heads, c.num_kv_heads)],
        "gate_up_proj.weight": [c.intermediate_size] * 2,
    }
    for ours, theirs in _joined_names(prefix):
        out |= dict(zip(theirs, torch.split(tensors[ours], sizes[ours]), strict=True))
    return out


def _vocabulary_maps(config: Eagle3Config, d2t: Tensor | None) -> dict[str, Tensor]:
    """``d2t`` and ``t2d``, which SGLang needs for a whole vocabulary, too."""
    if d2t is None:
        d2t = torch.zeros(config.draft_vocab_size, dtype=torch.int64)
    t2d = torch.zeros(config.target_vocab_size, dtype=torch.bool)
    t2d[torch.arange(len(d2t)) + d2t] = True
    return {"d2t": d2t, "t2d": t2d}
