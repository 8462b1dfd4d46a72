"""MTP heads in the layouts that are published: parts of a checkpoint of the target, under the keys
of a family, and that of vLLM's ``speculators``.

``speculators`` has one layout for all: the names of ``_SPECULATORS``, around a layer of Qwen3 or of
Qwen3.5. Both norm query and key heads; only that of Qwen3.5 has a gate, and stores norms around 0.
Embedding and lm_head are the target's.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from drafters.formats.checkpoint import (
    CONFIG,
    LAYER,
    Checkpoint,
    dtype_name,
    joined_rows,
    read_checkpoint,
    read_config,
    refuse_others,
    refuse_windows,
    rope_theta_of,
    rotated,
)
from drafters.formats.published import EMBEDDING, Imported, TargetTable
from drafters.mtp import NEW_ORDER, ORDERS, MtpConfig, Order

TARGET_NORM = "slipstream.target_norm.weight"
"""Where an exported head keeps its own copy of the target's final norm, which it has learnt; the
families' keys have no place for it."""


_FINAL_NORM = re.compile(r"(.+\.)?(model|language_model)\.norm\.weight")


def order_of(checkpoint: Checkpoint) -> str | None:
    """The family whose head a checkpoint holds; ``None`` if there is none."""
    num_layers = _text(checkpoint).config.get("num_hidden_layers")
    for name, order in ORDERS.items():
        if f"{order.proj.format(n=num_layers)}.weight" in checkpoint.files:
            return name
    return None


def is_carrier(checkpoint: Checkpoint) -> bool:
    """Whether a folder holds an MTP head."""
    return order_of(checkpoint) is not None


def from_carrier(checkpoint: Checkpoint, target: TargetTable) -> Imported:
    """Read the head in a checkpoint of the target.

    Raises:
        FormatError: names the first key or shape that does not fit.
    """
    found = carried(checkpoint)
    _check_fits(checkpoint, MtpConfig.from_json(found.config), target)
    return found


def _check_fits(checkpoint: Checkpoint, config: MtpConfig, target: TargetTable) -> None:
    """Refuse the head of another target."""
    for name, theirs, wanted in (
        ("hidden size", config.hidden_size, target.hidden_size),
        ("vocabulary", config.target_vocab_size, target.vocab_size),
        ("number of layers", config.layer_ids[0], target.num_layers),
    ):
        if theirs != wanted:
            raise checkpoint.error(f"its {name} is {theirs}, the target's {wanted}")


def _text(checkpoint: Checkpoint) -> Checkpoint:
    """The checkpoint with the part of its config that describes the language model."""
    return replace(checkpoint, config=checkpoint.table("text_config") or checkpoint.config)


def carried(checkpoint: Checkpoint) -> Imported:
    """The head in a checkpoint whose ``order_of`` is known.

    Raises:
        FormatError: names the first key or shape that does not fit.
    """
    name = order_of(checkpoint)
    assert name is not None
    order = _numbered(ORDERS[name], _text(checkpoint).size("num_hidden_layers"))
    config = _config(checkpoint, name, order)
    wanted = _wanted(config, order)
    for tensor, shape in wanted.items():
        checkpoint.expect(tensor, shape)
    _check_rest(checkpoint, order, wanted)
    tensors = _tensors(checkpoint, config, order)
    if TARGET_NORM in checkpoint.files:
        checkpoint.expect(TARGET_NORM, (config.hidden_size,))
        tensors["target_norm.weight"] = checkpoint.read(TARGET_NORM)
    else:
        theirs = _final_norm(checkpoint, config.hidden_size)
        tensors["target_norm.weight"] = _off_zero(theirs, order)
    return Imported("mtp", config.to_json(), tensors)


def _numbered(order: Order, num_layers: int) -> Order:
    names = ("proj", "embed_norm", "hidden_norm", "final_norm", "layer", "owned")
    return replace(order, **{name: getattr(order, name).format(n=num_layers) for name in names})


def _final_norm(checkpoint: Checkpoint, hidden_size: int) -> Tensor:
    """Weight of the target's norm before its lm_head, in the text model of a wrapped one."""
    name, *others = sorted(n for n in checkpoint.files if _FINAL_NORM.fullmatch(n)) or [
        "model.norm.weight"
    ]
    if others:
        raise checkpoint.error(f"{name} and {others[0]} may both be the target's final norm")
    checkpoint.expect(name, (hidden_size,))
    return checkpoint.read(name)


def _config(checkpoint: Checkpoint, name: str, order: Order) -> MtpConfig:
    said = _said(_text(checkpoint))
    inner = said["num_heads"] * said["head_dim"]
    attention = f"{order.layer}self_attn."
    q_rows = checkpoint.shape(f"{attention}q_proj.weight")[0]
    return MtpConfig(
        **said,
        order=name,
        has_bias=f"{attention}q_proj.bias" in checkpoint.files,
        has_head_norms=f"{attention}q_norm.weight" in checkpoint.files,
        has_output_gate=q_rows == 2 * inner,
    )


def _said(text: Checkpoint) -> dict[str, Any]:
    """What the target's config says of a head: arguments of ``MtpConfig``."""
    refuse_others(text, LAYER)
    refuse_windows(text)
    heads, kv_heads, head_dim = text.heads()
    return {
        "hidden_size": text.size("hidden_size"),
        "target_vocab_size": text.size("vocab_size"),
        "draft_vocab_size": text.size("vocab_size"),
        "intermediate_size": text.size("intermediate_size"),
        "num_heads": heads,
        "num_kv_heads": kv_heads,
        "head_dim": head_dim,
        "layer_ids": (text.size("num_hidden_layers"),),
        "rms_norm_eps": text.real("rms_norm_eps", 1e-6),
        "rope_theta": rope_theta_of(text),
        "rotary_dim": rotated(text, head_dim),
    }


def _wanted(config: MtpConfig, order: Order) -> dict[str, tuple[int, ...]]:
    """Shapes of the tensors of a head."""
    c, hidden, layer = config, config.hidden_size, order.layer
    inner, kv = c.num_heads * c.head_dim, c.num_kv_heads * c.head_dim
    shapes: dict[str, tuple[int, ...]] = {
        f"{order.proj}.weight": (hidden, 2 * hidden),
        f"{order.embed_norm}.weight": (hidden,),
        f"{order.hidden_norm}.weight": (hidden,),
        f"{order.final_norm}.weight": (hidden,),
        f"{layer}input_layernorm.weight": (hidden,),
        f"{layer}self_attn.q_proj.weight": (inner * (1 + c.has_output_gate), hidden),
        f"{layer}self_attn.k_proj.weight": (kv, hidden),
        f"{layer}self_attn.v_proj.weight": (kv, hidden),
        f"{layer}self_attn.o_proj.weight": (hidden, inner),
        f"{layer}post_attention_layernorm.weight": (hidden,),
        f"{layer}mlp.gate_proj.weight": (c.intermediate_size, hidden),
        f"{layer}mlp.up_proj.weight": (c.intermediate_size, hidden),
        f"{layer}mlp.down_proj.weight": (hidden, c.intermediate_size),
    }
    if c.has_bias:
        sizes = {"q": inner, "k": kv, "v": kv}
        shapes |= {f"{layer}self_attn.{x}_proj.bias": (rows,) for x, rows in sizes.items()}
    if c.has_head_norms:
        shapes |= {f"{layer}self_attn.{x}_norm.weight": (c.head_dim,) for x in "qk"}
    return shapes


_SHARED = ("shared_head.head.weight", EMBEDDING)
"""Copies of the target's tables, which heads share here."""


def _check_rest(
    checkpoint: Checkpoint, order: Order, wanted: Mapping[str, tuple[int, ...]]
) -> None:
    """Refuse a head with parts that ours has not."""
    rest = [name for name in sorted(checkpoint.files) if name.startswith(order.owned)]
    for name in rest:
        if name not in wanted and not name.endswith(_SHARED):
            raise checkpoint.error(f"{name} is not a tensor of an MTP head that can run here")


def _tensors(checkpoint: Checkpoint, config: MtpConfig, order: Order) -> dict[str, Tensor]:
    """The tensors of a bundle, without ``target_norm``."""
    layer, attention, read = order.layer, f"{order.layer}self_attn.", checkpoint.read
    norms = _norm_names(config, order)
    tensors = {f"{k}.weight": _off_zero(read(f"{v}.weight"), order) for k, v in norms.items()}
    products = _product_names(order)
    tensors |= {f"{ours}.weight": read(f"{theirs}.weight") for ours, theirs in products.items()}
    names = [f"{layer}mlp.{x}_proj.weight" for x in ("gate", "up")]
    tensors["gate_up_proj.weight"] = joined_rows(checkpoint, names)
    qkv = joined_rows(checkpoint, [f"{attention}{x}_proj.weight" for x in "qkv"])
    if config.has_output_gate:
        inner = config.num_heads * config.head_dim
        # Each head's queries are followed by its gate.
        pairs = qkv[: 2 * inner].view(config.num_heads, 2, config.head_dim, -1)
        tensors["attention.output_gate.weight"] = pairs[:, 1].flatten(0, 1).contiguous()
        qkv = torch.cat((pairs[:, 0].flatten(0, 1), qkv[2 * inner :]))
    tensors["attention.qkv_proj.weight"] = qkv
    if config.has_bias:
        biases = [f"{attention}{x}_proj.bias" for x in "qkv"]
        tensors["attention.qkv_proj.bias"] = joined_rows(checkpoint, biases)
    return tensors


def _off_zero(weight: Tensor, order: Order) -> Tensor:
    """A norm's weight as it multiplies. In bfloat16, 1 + weight would lose most of the weight."""
    return weight.float() + order.norm_offset if order.norm_offset else weight


def _around_zero(weight: Tensor, order: Order, dtype: torch.dtype) -> Tensor:
    """Inverse of ``_off_zero``, for a file of ``dtype``."""
    return (weight.float() - order.norm_offset).to(dtype) if order.norm_offset else weight


def _norm_names(config: MtpConfig, order: Order) -> dict[str, str]:
    """Our name -> the family's, of norms."""
    layer = order.layer
    names = {
        "embed_norm": order.embed_norm,
        "hidden_norm": order.hidden_norm,
        "norm": order.final_norm,
        "input_layernorm": f"{layer}input_layernorm",
        "post_attention_layernorm": f"{layer}post_attention_layernorm",
    }
    if config.has_head_norms:
        names |= {f"attention.{x}_norm": f"{layer}self_attn.{x}_norm" for x in "qk"}
    return names


def _product_names(order: Order) -> dict[str, str]:
    """Our name -> the family's, of the products that are the same in both."""
    return {
        "proj": order.proj,
        "attention.o_proj": f"{order.layer}self_attn.o_proj",
        "down_proj": f"{order.layer}mlp.down_proj",
    }


def to_carrier(
    config: Mapping[str, Any], tensors: Mapping[str, Tensor], target: TargetTable
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The target's ``config.json`` with the head counted, and the head's tensors under the keys of
    its family, with ``TARGET_NORM``.

    A reduced vocabulary is left out: it is no part of a head in these layouts.

    Raises:
        ValueError: the target's config says something else of the head's layer than its own.
    """
    c = MtpConfig.from_json(config)
    out = _named_parts(c, tensors, _numbered(ORDERS[c.order], target.num_layers))
    given = read_config(target.folder)
    _check_said(c, Checkpoint(target.folder, given, {}))
    text = given.get("text_config") or given
    text[ORDERS[c.order].count] = 1
    return given, out


def _named_parts(
    config: MtpConfig, tensors: Mapping[str, Tensor], order: Order
) -> dict[str, Tensor]:
    """The head's tensors under the names of a layout, with ``TARGET_NORM``."""
    c, dtype = config, tensors["proj.weight"].dtype
    out = {
        f"{theirs}.weight": _around_zero(tensors[f"{ours}.weight"], order, dtype)
        for ours, theirs in _norm_names(c, order).items()
    }
    products = _product_names(order)
    out |= {f"{theirs}.weight": tensors[f"{ours}.weight"] for ours, theirs in products.items()}
    gate_up = tensors["gate_up_proj.weight"].chunk(2)
    names = [f"{order.layer}mlp.{x}_proj.weight" for x in ("gate", "up")]
    out |= dict(zip(names, gate_up, strict=True))
    out |= _attention_parts(c, tensors, f"{order.layer}self_attn.")
    out[TARGET_NORM] = tensors["target_norm.weight"]
    return out


def _check_said(config: MtpConfig, target: Checkpoint) -> None:
    """Refuse a head whose layer the target's config does not describe: readers have only that."""
    for name, theirs in _said(_text(target)).items():
        ours = getattr(config, name)
        if theirs != ours and name != "draft_vocab_size":
            raise ValueError(
                f"the head cannot be written: its {name} is {ours}, and {target.folder / CONFIG}, "
                f"from which a reader takes it, says {theirs}"
            )


def _attention_parts(
    config: MtpConfig, tensors: Mapping[str, Tensor], prefix: str
) -> dict[str, Tensor]:
    """Queries, with the gate of each head behind them if there is one, keys and values."""
    c = config
    sizes = [n * c.head_dim for n in (c.num_heads, c.num_kv_heads, c.num_kv_heads)]
    q, k, v = torch.split(tensors["attention.qkv_proj.weight"], sizes)
    if c.has_output_gate:
        gate = tensors["attention.output_gate.weight"]
        pair = [rows.view(c.num_heads, c.head_dim, -1) for rows in (q, gate)]
        q = torch.stack(pair, dim=1).flatten(0, 2)
    parts = {f"{prefix}{x}_proj.weight": rows for x, rows in zip("qkv", (q, k, v), strict=True)}
    if c.has_bias:
        biases = torch.split(tensors["attention.qkv_proj.bias"], sizes)
        parts |= {f"{prefix}{x}_proj.bias": rows for x, rows in zip("qkv", biases, strict=True)}
    return parts


# ---- speculators -------------------------------------------------------------------------------

_SPECULATORS = Order(
    False,
    proj="mtp_layers.0.input_proj",
    embed_norm="mtp_layers.0.token_layernorm",
    hidden_norm="mtp_layers.0.hidden_layernorm",
    final_norm="mtp_layers.0.final_layernorm",
    layer="mtp_layers.0.",
    count="num_nextn_predict_layers",
    owned="mtp_layers.",
)
_PLAIN, _GATED = "qwen3", "qwen3_5_text"
_ORDER_OF = {_PLAIN: NEW_ORDER, _GATED: "qwen3_5"}
"""Type of layer that ``speculators`` puts a head around -> our order of the same halves."""
_SPECULATIVE_TOKENS = 3
"""Draft length that an exported config suggests."""


def is_speculators(checkpoint: Checkpoint) -> bool:
    """Whether a folder is in the layout of ``speculators``."""
    return checkpoint.config.get("speculators_model_type") == "mtp"


def from_speculators(checkpoint: Checkpoint, target: TargetTable) -> Imported:
    """Read the layout of ``speculators``.

    Raises:
        FormatError: names the first key or shape that does not fit.
    """
    layer = checkpoint.table("transformer_layer_config")
    kind = layer.get("model_type")
    if not isinstance(kind, str) or kind not in _ORDER_OF:
        raise checkpoint.error(
            f"model_type of transformer_layer_config is {kind!r}; MTP heads of speculators are "
            f"read around layers of {' and '.join(_ORDER_OF)}"
        )
    refuse_others(checkpoint, {_SPECULATORS.count: 1})
    inner = replace(checkpoint, config=layer)
    order = _stored_as(kind)
    config = MtpConfig(
        **_said(inner), order=_ORDER_OF[kind], has_head_norms=True, has_output_gate=kind == _GATED
    )
    _check_fits(checkpoint, config, target)
    wanted = _wanted(config, order)
    for tensor, shape in wanted.items():
        checkpoint.expect(tensor, shape)
    if unknown := sorted(checkpoint.files.keys() - wanted.keys() - {TARGET_NORM, EMBEDDING}):
        raise checkpoint.error(f"{unknown[0]} is not a tensor of an MTP head that can run here")
    target.check_embedding(checkpoint)
    tensors = _tensors(checkpoint, config, order)
    tensors["target_norm.weight"] = _norm_of_target(checkpoint, target)
    return Imported("mtp", config.to_json(), tensors)


def _stored_as(kind: str) -> Order:
    """Names around a type of layer."""
    return replace(_SPECULATORS, norm_offset=ORDERS[_ORDER_OF[kind]].norm_offset)


def _norm_of_target(checkpoint: Checkpoint, target: TargetTable) -> Tensor:
    """The head's copy of the target's final norm, or that itself."""
    shape = (target.hidden_size,)
    if TARGET_NORM in checkpoint.files:
        checkpoint.expect(TARGET_NORM, shape)
        return checkpoint.read(TARGET_NORM)
    theirs = _final_norm(read_checkpoint(target.folder), target.hidden_size)
    is_around_0 = target.config.model_type.startswith("qwen3_5")
    return _off_zero(theirs, ORDERS["qwen3_5"]) if is_around_0 else theirs


def to_speculators(
    config: Mapping[str, Any], tensors: Mapping[str, Tensor], target: TargetTable
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """``config.json`` and tensors in the layout of ``speculators``, with ``TARGET_NORM``, which it
    does not know.

    A reduced vocabulary is left out: heads have none there.

    Raises:
        ValueError: the head's layer is none of those that ``speculators`` computes.
    """
    c = MtpConfig.from_json(config)
    kind = _GATED if c.has_output_gate else _PLAIN
    for is_so, what in (
        (ORDERS[c.order].hidden_first, "reads the hidden state before the embedding"),
        (not c.has_head_norms, "does not norm query and key heads"),
        (c.has_bias, "has a bias in its queries, keys and values"),
        (kind == _PLAIN and c.rotary_dim != c.head_dim, "rotates a part of each head, ungated"),
    ):
        if is_so:
            raise ValueError(
                f"the head {what}: MTP layers of speculators 0.9.0 are those of Qwen3 and Qwen3.5 "
                f"alone, which do otherwise. Write it with --format hf"
            )
    return {
        "architectures": ["MTPDraftModel"],
        "speculators_model_type": "mtp",
        "transformer_layer_config": _layer_config(c, kind, target),
        _SPECULATORS.count: 1,
        "dtype": dtype_name(tensors),
        "speculators_config": target.speculators_config("mtp", _SPECULATIVE_TOKENS),
    }, _named_parts(c, tensors, _stored_as(kind))


def _layer_config(config: MtpConfig, kind: str, target: TargetTable) -> dict[str, Any]:
    """Hugging Face's config of a target whose layers are the head's."""
    c, num_layers = config, config.layer_ids[0]
    given = {
        "model_type": kind,
        "vocab_size": c.target_vocab_size,
        "hidden_size": c.hidden_size,
        "intermediate_size": c.intermediate_size,
        "num_hidden_layers": num_layers,
        "num_attention_heads": c.num_heads,
        "num_key_value_heads": c.num_kv_heads,
        "head_dim": c.head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": target.max_positions,
        "rms_norm_eps": c.rms_norm_eps,
        "attention_bias": False,
        "layer_types": ["full_attention"] * num_layers,
    }
    # Qwen3.5's config has a factor of its own at the top, unless it is said.
    share = {"partial_rotary_factor": c.rotary_dim / c.head_dim} if kind == _GATED else {}
    rope = {"rope_type": "default", "rope_theta": c.rope_theta, **share}
    return {**given, **share, "rope_parameters": rope}
