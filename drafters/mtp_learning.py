"""Learning side of MTP heads, and how they are read from and written as parts of a checkpoint of
the target.

They learn by the training-time test of EAGLE-3: row p of step i is what serving computes when it
drafts token i + 1 after the anchor p - i.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from drafters.eagle3.trainable import LearnsByChains
from drafters.formats.checkpoint import (
    CONFIG,
    LAYER,
    Checkpoint,
    joined_rows,
    read_checkpoint,
    read_config,
    refuse_others,
    refuse_windows,
    rope_theta_of,
    rotated,
)
from drafters.formats.published import Imported, TargetTable
from drafters.mtp import ORDERS, Mtp, MtpConfig, Order, config_for_target
from drafters.stored_module import StoredModule
from targets.last_layer import LastLayer

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class MtpTrainable(StoredModule[Mtp], LearnsByChains):
    """MTP's ``drafters.trainable.Trainable``, which describes every method, and a
    ``CarriedByTarget``."""

    config_class: ClassVar = MtpConfig
    module_class: ClassVar = Mtp
    kind: str = "mtp"
    takes_reward: bool = True
    """See ``Eagle3Trainable``."""

    def new_model(
        self,
        target_config: Any,
        lm_head_VH: Tensor,
        layer_ids: tuple[int, ...] | None,
        seed: int,
        draft_ids: Tensor | None = None,
        last_layer: LastLayer | None = None,
    ) -> Mtp:
        """The target's layer shape, in the order of new heads."""
        size = None if draft_ids is None else draft_ids.numel()
        model = Mtp(config_for_target(target_config, layer_ids, size))
        model.initialise(seed)
        _set_vocabulary(model, draft_ids)
        if last_layer is not None:
            imitate(model, last_layer)
        return model

    def carried_model(self, folder: Path, draft_ids: Tensor | None) -> Mtp | None:
        """The head that the target's own checkpoint holds."""
        checkpoint = read_checkpoint(folder)
        if order_of(checkpoint) is None:
            return None
        found = _read(checkpoint)
        model = self.load_model(found.config, found.tensors)
        if draft_ids is None:
            return model
        config = replace(model.config, draft_vocab_size=draft_ids.numel())
        reduced = Mtp(config)
        reduced.load_state_dict({**model.state_dict(), "d2t": torch.zeros_like(draft_ids)})
        _set_vocabulary(reduced, draft_ids)
        return reduced

    def matrices(self, model: Mtp) -> list[Tensor]:
        """All products."""
        return [module.weight for module in model.modules() if isinstance(module, nn.Linear)]


def _set_vocabulary(model: Mtp, draft_ids: Tensor | None) -> None:
    if model.d2t is not None and draft_ids is not None:
        model.d2t.copy_(draft_ids - torch.arange(draft_ids.numel()))


@torch.no_grad()
def imitate(model: Mtp, last: LastLayer) -> None:
    """Overwrite a new head's layer with the target's last one, and its norms with the final one.

    Queries and keys stay random if the target normalises them per head.
    """
    c = model.config
    sizes = [n * c.head_dim for n in (c.num_heads, c.num_kv_heads, c.num_kv_heads)]
    q, k, v = torch.split(model.attention.qkv_proj.weight, sizes)
    if last.qk is not None:
        q.copy_(last.qk[0])
        k.copy_(last.qk[1])
    v.copy_(last.v)
    model.attention.o_proj.weight.copy_(last.o)
    model.gate_up_proj.weight.copy_(last.gate_up)
    model.down_proj.weight.copy_(last.down)
    model.input_layernorm.weight.copy_(last.attention_norm_H)
    model.post_attention_layernorm.weight.copy_(last.mlp_norm_H)
    model.norm.weight.copy_(last.final_norm_H)
    model.target_norm.weight.copy_(last.final_norm_H)


# ---- heads within a checkpoint of the target ---------------------------------------------------

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
    found = _read(checkpoint)
    for name, theirs, wanted in (
        ("hidden size", found.config["hidden_size"], target.hidden_size),
        ("vocabulary", found.config["target_vocab_size"], target.vocab_size),
        ("number of layers", found.config["layer_ids"][0], target.num_layers),
    ):
        if theirs != wanted:
            raise checkpoint.error(f"its {name} is {theirs}, the target's {wanted}")
    return found


def _text(checkpoint: Checkpoint) -> Checkpoint:
    """The checkpoint with the part of its config that describes the language model."""
    return replace(checkpoint, config=checkpoint.table("text_config") or checkpoint.config)


def _read(checkpoint: Checkpoint) -> Imported:
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


_SHARED = ("shared_head.head.weight", "embed_tokens.weight")
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
    order, dtype = _numbered(ORDERS[c.order], target.num_layers), tensors["proj.weight"].dtype
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
    given = read_config(target.folder)
    _check_said(c, Checkpoint(target.folder, given, {}))
    text = given.get("text_config") or given
    text[order.count] = 1
    return given, out


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
