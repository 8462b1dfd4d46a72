"""The Gemma 3 family (text): a norm before and behind each half of a layer, a scaled embedding,
norms of the heads, and layers with a window of attention between those without, each with rotary
embeddings of their own.

Its norms multiply by ``1 + weight``, in float32 and before they round.
"""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers.activations import ACT2FN
from transformers.models.gemma3 import modeling_gemma3
from transformers.models.gemma3.modeling_gemma3 import Gemma3ForCausalLM

from specops.linear import Norm
from targets.layers import Activation, Family, Layer, Rope, heads_of, joined, unknown_module

_ACTIVATION: Activation = "gelu_pytorch_tanh"
_PARTS = ("ForCausalLM", "TextModel", "DecoderLayer", "Attention", "MLP", "RMSNorm")
_CLASSES = {getattr(modeling_gemma3, "Gemma3" + part) for part in _PARTS} | {
    modeling_gemma3.Gemma3RotaryEmbedding,
    modeling_gemma3.Gemma3TextScaledWordEmbedding,
    nn.Linear,
    nn.ModuleList,
    type(ACT2FN[_ACTIVATION]),
}


def why_not(model: Any) -> str | None:
    """What ``FusedDecoder`` would compute differently; ``None`` if nothing."""
    config = model.config
    if config.use_bidirectional_attention:
        return "attention is bidirectional"
    if config.final_logit_softcapping is not None:
        return f"logits are capped at {config.final_logit_softcapping}"
    return unknown_module(model, _CLASSES)


def norm_of(module: Any) -> Norm:
    """Weight, plus 1 and in float32, and epsilon of a norm. It is a copy."""
    return Norm(1.0 + module.weight.detach().float(), module.eps)


def layer(module: Any, by_columns: bool) -> Layer:
    """The weights of a decoder layer."""
    attention, mlp = module.self_attn, module.mlp
    return Layer(
        norm_of(module.input_layernorm),
        joined(by_columns, attention.q_proj, attention.k_proj, attention.v_proj),
        heads_of(attention, norm_of),
        attention.o_proj.weight.detach(),
        norm_of(module.pre_feedforward_layernorm),
        joined(by_columns, mlp.gate_proj, mlp.up_proj),
        mlp.down_proj.weight.detach(),
        window=attention.sliding_window,
        rope=attention.layer_type,
        after_attention=norm_of(module.post_attention_layernorm),
        after_mlp=norm_of(module.post_feedforward_layernorm),
    )


def copies(module: Any, layer: Layer) -> list[tuple[Norm, Any]]:
    """All norms of a decoder layer, see ``norm_of``."""
    attention = module.self_attn
    made = (
        (layer.attention_norm, module.input_layernorm),
        (layer.after_attention, module.post_attention_layernorm),
        (layer.mlp_norm, module.pre_feedforward_layernorm),
        (layer.after_mlp, module.post_feedforward_layernorm),
        (layer.heads.query_norm, attention.q_norm),
        (layer.heads.key_norm, attention.k_norm),
    )
    return [(norm, made_from) for norm, made_from in made if norm is not None]


def ropes(rotary: Any) -> dict[str, Rope]:
    """The rotary embeddings of layers with a window and of those without."""
    return {
        name: Rope(
            kind,
            getattr(rotary, f"{name}_inv_freq"),
            getattr(rotary, f"{name}_attention_scaling"),
        )
        for name, kind in rotary.rope_type.items()
    }


def embed_scale(embedding: Any) -> float | None:
    """Factor of the embedding's rows."""
    scale: float = embedding.scalar_embed_scale
    return scale


FAMILY = Family(
    Gemma3ForCausalLM,
    norms=(),
    why_not=why_not,
    layer=layer,
    activation=_ACTIVATION,
    norm=norm_of,
    ropes=ropes,
    embed_scale=embed_scale,
    copies=copies,
)
