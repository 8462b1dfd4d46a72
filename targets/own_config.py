"""The config of a target that our own modules can hold, read without ``transformers``.

Importing ``transformers`` takes seconds of a core. A config.json of Llama, Qwen2 or Qwen3 in which
every key is known, and none asks for what our modules lack, yields the values that the library's
config has. With any other file, and with one that the library would refuse, there is no such
config, and the library reads the file.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from buffer.files import read_regular

EMBED, LM_HEAD = "model.embed_tokens.weight", "lm_head.weight"
"""Names of two weights in the files of all families here."""
_MOST_BYTES = 1 << 20
_GENERATION = "generation_config.json"


class OwnConfig(SimpleNamespace):
    """Values by the names of Hugging Face's text configs."""

    def get_text_config(self) -> OwnConfig:
        """The config itself: these targets read text only."""
        return self


@dataclass(frozen=True, slots=True)
class OwnFamily:
    """What a model type of Hugging Face computes, where that differs between Llama's likes."""

    model_class: str
    """Name of its causal LM."""
    defaults: Mapping[str, Any]
    """Values of keys that a config.json may leave out."""
    has_qkv_bias: bool = False
    has_head_norms: bool = False
    may_slide: bool = False
    """Its config describes windows of attention."""


_LIKE_QWEN = {"max_window_layers": 28, "use_sliding_window": False, "eos_token_id": None}
FAMILIES = {
    "llama": OwnFamily(
        "LlamaForCausalLM",
        {"num_key_value_heads": None, "head_dim": None, "bos_token_id": 1, "eos_token_id": 2},
    ),
    "qwen2": OwnFamily("Qwen2ForCausalLM", _LIKE_QWEN, has_qkv_bias=True, may_slide=True),
    "qwen3": OwnFamily("Qwen3ForCausalLM", _LIKE_QWEN, has_head_norms=True, may_slide=True),
}
"""By Hugging Face's ``model_type``."""

_COUNTS = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "num_key_value_heads", "head_dim", "max_position_embeddings",
)  # fmt: skip
"""Values that must be positive integers."""
_SWITCHED_OFF = {
    "attention_bias": False,
    "mlp_bias": False,
    "pretraining_tp": 1,
    "rope_interleaved": False,
    "use_sliding_window": False,
}
"""Keys that must have this value, null or be absent: our modules know no other."""
_IGNORED = frozenset(
    (
        "_name_or_path", "architectures", "attention_dropout", "bos_token_id", "dtype",
        "eos_token_id", "hidden_act", "initializer_range", "is_llama_config", "layer_types",
        "max_window_layers", "model_type", "pad_token_id", "rms_norm_eps", "rope_parameters",
        "rope_scaling", "rope_theta", "sliding_window", "tie_word_embeddings", "torch_dtype",
        "transformers.js_config", "transformers_version", "use_cache",
    )
)  # fmt: skip
"""Other keys that may stand in a file: described below, or of no consequence for inference."""
_ROPE_KEYS = {
    "default": frozenset(("rope_type", "type", "rope_theta")),
    "llama3": frozenset(
        ("rope_type", "type", "rope_theta", "factor", "low_freq_factor", "high_freq_factor",
         "original_max_position_embeddings")
    ),
}  # fmt: skip
"""Keys of ``rope_parameters`` by the type of rotary embedding; other types are the library's."""


def read_own_config(folder: Path) -> OwnConfig | None:
    """The config in a folder; ``None`` if it must be left to ``transformers``."""
    raw = _read(folder / "config.json")
    family = None if raw is None else FAMILIES.get(str(raw.get("model_type")))
    if raw is None or family is None or raw.get("architectures") != [family.model_class]:
        return None
    if not raw.keys() <= {*_COUNTS, *_SWITCHED_OFF, *_IGNORED}:
        return None
    if any(raw.get(key) not in (None, wanted) for key, wanted in _SWITCHED_OFF.items()):
        return None
    values = {**family.defaults, **raw}
    if values.get("layer_types") not in (None, ["full_attention"] * _length(values)):
        return None
    rope = _rope_of(values)
    if rope is None:
        return None
    for key in ("rope_theta", "rope_scaling", "dtype", "torch_dtype"):
        values.pop(key, None)
    values |= {"rope_parameters": rope, **_heads_of(values, family)}
    if family.may_slide:
        values |= {"sliding_window": None, "layer_types": ["full_attention"] * _length(values)}
    values |= {"tie_word_embeddings": values.get("tie_word_embeddings", False)}
    return OwnConfig(**values) if _is_sound(values, family) else None


def own_eos_ids(folder: Path, config: OwnConfig) -> Any:
    """``eos_token_id`` of the generation config in a folder, or of its config: an integer, a list
    of them, or ``None``.

    Raises:
        ValueError: there is a generation config that cannot be read.
    """
    path = folder / _GENERATION
    if not path.exists():
        return config.eos_token_id
    found = _read(path)
    if found is None:
        raise ValueError(f"{path} cannot be read: it must hold a JSON object")
    eos = found.get("eos_token_id")
    return config.eos_token_id if eos is None else eos


def computed(config: OwnConfig) -> dict[str, Any]:
    """The values of a config that say what its model computes for a token, each complete: two files
    that say the same thing differently have the same. Whether embedding and lm_head are tied is not
    among them."""
    values = vars(config)
    rope = {name: value for name, value in values["rope_parameters"].items() if name != "type"}
    return {
        "model_type": values["model_type"],
        **{name: values[name] for name in _COUNTS if name != "head_dim"},
        "head_dim": values.get("head_dim") or config.hidden_size // config.num_attention_heads,
        "hidden_act": values["hidden_act"],
        "rms_norm_eps": values["rms_norm_eps"],
        "rope_parameters": rope,
    }


def shapes_of(config: OwnConfig) -> dict[str, tuple[int, ...]]:
    """Shape of each weight of a config's causal LM, by its name in Hugging Face's files; a head
    that is tied to the embedding is not among them."""
    family = FAMILIES[config.model_type]
    size, inner, vocab = config.hidden_size, config.intermediate_size, config.vocab_size
    head_dim = getattr(config, "head_dim", None) or size // config.num_attention_heads
    width, narrow = (
        heads * head_dim for heads in (config.num_attention_heads, config.num_key_value_heads)
    )
    linear = {
        "self_attn.q_proj": (width, size), "self_attn.k_proj": (narrow, size),
        "self_attn.v_proj": (narrow, size), "self_attn.o_proj": (size, width),
        "mlp.gate_proj": (inner, size), "mlp.up_proj": (inner, size),
        "mlp.down_proj": (size, inner),
    }  # fmt: skip
    norms = {"input_layernorm": size, "post_attention_layernorm": size}
    if family.has_head_norms:
        norms |= {"self_attn.q_norm": head_dim, "self_attn.k_norm": head_dim}
    layer: dict[str, tuple[int, ...]] = {f"{name}.weight": at for name, at in linear.items()}
    layer |= {f"{name}.weight": (num,) for name, num in norms.items()}
    if family.has_qkv_bias:
        layer |= {f"self_attn.{x}_proj.bias": linear[f"self_attn.{x}_proj"][:1] for x in "qkv"}
    shapes: dict[str, tuple[int, ...]] = {EMBED: (vocab, size)}
    for n in range(config.num_hidden_layers):
        shapes |= {f"model.layers.{n}.{name}": shape for name, shape in layer.items()}
    shapes["model.norm.weight"] = (size,)
    return shapes if config.tie_word_embeddings else shapes | {LM_HEAD: (vocab, size)}


def _read(path: Path) -> dict[str, Any] | None:
    """The JSON object in a file; ``None`` if there is none."""
    try:
        found = json.loads(read_regular(path, _MOST_BYTES, follow=True))
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) else None


def _length(values: Mapping[str, Any]) -> int:
    length = values.get("num_hidden_layers")
    return length if isinstance(length, int) else 0


def _heads_of(values: Mapping[str, Any], family: OwnFamily) -> dict[str, Any]:
    """Numbers of heads and their size, where a file leaves them to the library."""
    found: dict[str, Any] = {}
    if family.model_class == "LlamaForCausalLM":
        hidden, heads = values.get("hidden_size"), values.get("num_attention_heads")
        if values.get("head_dim") is None and isinstance(hidden, int) and isinstance(heads, int):
            found["head_dim"] = hidden // max(heads, 1)
        if values.get("num_key_value_heads") is None:
            found["num_key_value_heads"] = heads
    return found


def _rope_of(values: Mapping[str, Any]) -> dict[str, Any] | None:
    """``rope_parameters`` as the library completes them; ``None`` if they are its own business."""
    given = values.get("rope_scaling") or values.get("rope_parameters") or {}
    if not isinstance(given, dict):
        return None
    rope = dict(given)
    theta = values.get("rope_theta", 10_000.0)
    rope.setdefault("rope_theta", theta)
    rope.setdefault("rope_type", rope.get("type", "default"))
    known = _ROPE_KEYS.get(rope["rope_type"])
    if known is None or not rope.keys() <= known:
        return None
    if rope["rope_type"] == "llama3":
        rope.setdefault("original_max_position_embeddings", values.get("max_position_embeddings"))
        if not all(_is_positive(rope.get(key)) for key in known - {"type", "rope_type"}):
            return None
    return rope if _is_positive(rope["rope_theta"]) else None


def _is_sound(values: Mapping[str, Any], family: OwnFamily) -> bool:
    """Whether no value is missing or would be refused by the library."""
    needed = [key for key in _COUNTS if key != "head_dim" or family.model_class[:5] != "Qwen2"]
    if not all(type(values.get(key)) is int and values[key] > 0 for key in needed):
        return False
    hidden, heads, groups = (
        values[key] for key in ("hidden_size", "num_attention_heads", "num_key_value_heads")
    )
    return (
        hidden % heads == 0
        and heads % groups == 0
        and values.get("hidden_act") == "silu"
        and _is_positive(values.get("rms_norm_eps"))
        and isinstance(values["tie_word_embeddings"], bool)
    )


def _is_positive(value: object) -> bool:
    return type(value) in (int, float) and value > 0  # type: ignore[operator]
