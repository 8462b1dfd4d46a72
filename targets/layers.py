"""A target family: how the layers of some Hugging Face models map to ours.

A family is one file and one line in ``targets.families``. ``llama_like`` makes one from the
modelling module of any architecture whose layers are Llama's.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from typing import Any, Literal

import torch
from torch import Tensor, nn

from specops.linear import Norm
from specops.rope import Heads

Activation = Literal["silu", "gelu_pytorch_tanh"]
"""Names as in Hugging Face's configs."""


@dataclass(frozen=True, slots=True)
class Layer:
    """Weights of one decoder layer, as ``targets.fused.FusedDecoder`` computes it."""

    attention_norm: Norm
    qkv: Tensor
    """[(Hq + 2 Hkv) * D, H]: rows of the queries, the keys, the values."""
    heads: Heads
    o: Tensor
    mlp_norm: Norm
    gate_up: Tensor
    """[2 * intermediate size, H]: rows of the gate, then of ``up``."""
    down: Tensor
    window: int | None = None
    """Attention sees the keys of so many last positions only; ``None``: all."""
    rope: str = ""
    """Which of the family's rotary embeddings turns its heads."""
    after_attention: Norm | None = None
    """Applied to the output of attention before it is added to the residual stream (Gemma)."""
    after_mlp: Norm | None = None
    """The same after the MLP; given if and only if ``after_attention`` is."""


@dataclass(frozen=True, slots=True)
class Rope:
    """Frequencies of a rotary embedding, as ``specops.rope.rope_table`` takes them."""

    kind: str
    """Hugging Face's ``rope_type``."""
    inv_freq: Tensor
    scaling: float


def one_rope(rotary: Any) -> dict[str, Rope]:
    """The rotary embedding of models that use one for all layers."""
    return {"": Rope(rotary.rope_type, rotary.inv_freq, rotary.attention_scaling)}


def norm_of(module: Any) -> Norm:
    """The weight and epsilon of a Hugging Face RMSNorm; the weight is read in place."""
    return Norm(module.weight.detach(), module.variance_epsilon)


@dataclass(frozen=True, slots=True)
class Family:
    """Models of one Hugging Face class that ``FusedDecoder`` can compute."""

    model: type[nn.Module]
    """Exactly this class; a subclass may compute something else."""
    norms: tuple[type[nn.Module], ...]
    """Its RMSNorms of the form ``weight * x / rms(x)``."""
    why_not: Callable[[Any], str | None]
    """What in a model of this class ``FusedDecoder`` would compute differently; ``None`` if
    nothing."""
    layer: Callable[[Any, bool], Layer]
    """The weights of one of its decoder layers, laid out by columns or by rows. The module's own
    weights become views of them."""
    activation: Activation = "silu"
    """Of the MLP's gate."""
    norm: Callable[[Any], Norm] = norm_of
    """Weight and epsilon of its final norm."""
    ropes: Callable[[Any], dict[str, Rope]] = one_rope
    """Its rotary embeddings, by the name in ``Layer.rope``."""
    embed_scale: Callable[[Any], float | None] = lambda _embedding: None
    """Factor of the rows of its embedding; ``None``: 1."""
    copies: Callable[[Any, Layer], list[tuple[Norm, Any]]] = lambda _module, _layer: []
    """Norms of one of its layers whose weights are copies, each with the module that ``norm`` made
    it from: they are made again when the module's weights are overwritten."""


def llama_like(modelling: ModuleType, name: str) -> Family:
    """The family of a modelling module with Llama's layers, with or without biases of queries, keys
    and values, norms of heads, and windows of attention.

    Args:
        modelling: e.g. ``transformers.models.llama.modeling_llama``.
        name: what the module's classes begin with, e.g. "Llama".
    """
    from transformers.activations import ACT2FN

    kinds = ("ForCausalLM", "Model", "DecoderLayer", "Attention", "MLP", "RMSNorm")
    classes = {getattr(modelling, name + kind) for kind in (*kinds, "RotaryEmbedding")}
    classes |= {nn.Linear, nn.Embedding, nn.ModuleList, type(ACT2FN["silu"])}

    def why_not(model: Any) -> str | None:
        return unknown_module(model, classes)

    model, norm = (getattr(modelling, name + kind) for kind in ("ForCausalLM", "RMSNorm"))
    return Family(model, (norm,), why_not, llama_layer)


def unknown_module(model: Any, classes: set[type[nn.Module]]) -> str | None:
    """Describe the first module that Llama's layers do not have; ``None`` if there is none."""
    for path, module in model.named_modules():
        if type(module) not in classes:
            return f"{path} is a {type(module).__name__}"
        if isinstance(module, nn.Linear) and module.bias is not None and not _is_qkv(path):
            return f"{path} has a bias"
        if isinstance(module, nn.Embedding) and module.max_norm is not None:
            return f"{path} has a max_norm"
    return None


def _is_qkv(path: str) -> bool:
    return path.rsplit(".", 1)[-1] in ("q_proj", "k_proj", "v_proj")


def llama_layer(module: Any, by_columns: bool) -> Layer:
    """The weights of a decoder layer of Llama, of Qwen2, which has biases, or of Qwen3, which has
    norms of the heads.

    Args:
        by_columns: lay out joined weights as ``targets.target.by_columns`` does, for a CPU.
    """
    attention, mlp = module.self_attn, module.mlp
    return Layer(
        norm_of(module.input_layernorm),
        joined(by_columns, attention.q_proj, attention.k_proj, attention.v_proj),
        heads_of(attention, norm_of),
        attention.o_proj.weight.detach(),
        norm_of(module.post_attention_layernorm),
        joined(by_columns, mlp.gate_proj, mlp.up_proj),
        mlp.down_proj.weight.detach(),
        window=getattr(attention, "sliding_window", None),
    )


def heads_of(attention: Any, norm: Callable[[Any], Norm]) -> Heads:
    """Numbers, norms and biases of the heads of an attention module.

    Args:
        norm: weight and epsilon of a head's norm module.
    """
    has_norms = hasattr(attention, "q_norm")
    return Heads(
        attention.q_proj.out_features // attention.head_dim,
        attention.k_proj.out_features // attention.head_dim,
        norm(attention.q_norm) if has_norms else None,
        norm(attention.k_norm) if has_norms else None,
        _joined_bias(attention.q_proj, attention.k_proj, attention.v_proj),
    )


_PADDING = 16


def columns_of(weight_NK: Tensor) -> Tensor:
    """A copy laid out by columns, [N, K] with strides (1, N + 16).

    A CPU multiplies one token faster with it: on one core, a head of 49,152 by 576 takes 13.6 ms by
    rows and 6.3 ms by columns. The padding keeps the elements of a row out of the same cache sets:
    seven tokens take 37.7 ms with it and 59.2 ms without.
    """
    num_rows, width = weight_NK.shape
    columns = weight_NK.new_zeros(width, num_rows + _PADDING)
    columns[:, :num_rows] = weight_NK.t()
    return columns[:, :num_rows].t()


def are_adjacent(weights: list[Tensor]) -> bool:
    """Whether weights laid out by rows follow each other in one memory."""
    if len({w.untyped_storage().data_ptr() for w in weights}) > 1:
        return False
    ends = [w.storage_offset() + w.numel() for w in weights]
    starts = [w.storage_offset() for w in weights[1:]]
    return all(w.is_contiguous() for w in weights) and starts == ends[:-1]


def joined(by_columns: bool, *linears: Any) -> Tensor:
    """One weight with the rows of all modules, whose weights become views of it to save memory.

    Weights that lie behind each other already, as those that swaps overwrite do, stay where they
    are."""
    own: list[Tensor] = [module.weight.detach() for module in linears]
    if not by_columns and are_adjacent(own):
        return own[0].as_strided((sum(map(len, own)), own[0].shape[1]), own[0].stride())
    whole = torch.cat(own)
    if by_columns:
        whole = columns_of(whole)
    start = 0
    for module in linears:
        end = start + module.weight.shape[0]
        module.weight.data = whole[start:end]
        start = end
    return whole


def _joined_bias(*linears: Any) -> Tensor | None:
    """One vector of the biases of all modules, which become views of it; ``None`` without."""
    if all(module.bias is None for module in linears):
        return None
    bias = torch.cat([module.bias.detach() for module in linears])
    parts = torch.split(bias, [len(module.bias) for module in linears])
    for module, part in zip(linears, parts, strict=True):
        module.bias.data = part
    return bias
