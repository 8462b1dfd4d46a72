"""A causal LM as data: its Hugging Face config as JSON, and its tensors by name.

A drafter that is a language model of its own is stored, trained and served in this form, and runs
the modelling code and the fused families of ``targets``. Embedding table and lm_head are two
tensors, also where the model ties them: each is then learnt and swapped by itself.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor
from transformers import AttentionInterface, AutoConfig, AutoModelForCausalLM
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING
from transformers.utils.logging import disable_progress_bar

from specops.attention import masked_attention
from targets.config import their_config
from targets.head import read_tensor, tensor_files
from targets.own_config import OwnConfig

PACKED = "slipstream_packed"
"""Hugging Face's name of the attention that ``packed_hidden`` runs."""
_OF_A_FILE = (
    "_name_or_path", "architectures", "auto_map", "dtype", "torch_dtype", "transformers_version",
)  # fmt: skip
"""Keys of a config that say where it came from, not what the model computes."""


@dataclass(frozen=True, slots=True)
class CausalWeights:
    """A causal LM that is not yet a module."""

    config: dict[str, Any]
    """Hugging Face text config as JSON."""
    tensors: dict[str, Tensor]
    """By the names of its module, on the CPU; any floating dtype."""


def config_json(config: Any, num_layers: int | None = None) -> dict[str, Any]:
    """A Hugging Face config as JSON: what the model computes, and nothing of its files.

    Args:
        num_layers: of a model that ends after so many layers; ``None``: all.

    Raises:
        ValueError: the model has fewer layers.
    """
    text = config.get_text_config()
    if isinstance(text, OwnConfig):
        text = _as_config(vars(text))
    found = {k: v for k, v in text.to_dict().items() if k not in _OF_A_FILE}
    has = text.num_hidden_layers
    count = has if num_layers is None else num_layers
    if not 1 <= count <= has:
        raise ValueError(f"a model of {has} layers has no first {count}")
    found |= {"num_hidden_layers": count, "tie_word_embeddings": False}
    if found.get("layer_types"):
        found["layer_types"] = list(found["layer_types"])[:count]
    return found


def read_causal(folder: Path, num_layers: int | None = None) -> CausalWeights:
    """The causal LM in ``folder``, or its first layers with its final norm and lm_head.

    Reads only the tensors of these layers.

    Raises:
        ValueError: the model has fewer layers, its safetensors files lack a tensor, or one has
            another shape than its config says or holds NaN or infinity.
    """
    config = their_config(folder)
    found = config_json(config, num_layers)
    is_tied = config.get_text_config().tie_word_embeddings
    files = tensor_files(folder)
    model = empty_causal(found)
    inside = next(n for n, m in model.named_modules() if m is model.get_input_embeddings())
    tensors = {}
    for name, wanted in model.state_dict().items():
        source = f"{inside}.weight" if is_tied and name == "lm_head.weight" else name
        tensor = read_tensor(files, source, folder)
        if tensor.shape != wanted.shape:
            raise ValueError(
                f"{folder}: {source} has the shape {tuple(tensor.shape)}, but by config.json the "
                f"model needs {tuple(wanted.shape)}"
            )
        if not tensor.isfinite().all():
            raise ValueError(f"{folder}: {source} holds NaN or infinity")
        tensors[name] = tensor
    return CausalWeights(found, tensors)


def empty_causal(config: Mapping[str, Any]) -> Any:
    """The module of a config on the meta device, without weights.

    Raises:
        ValueError: ``transformers`` has no causal LM with this config.
    """
    with torch.device("meta"):
        made: Any = AutoModelForCausalLM.from_config(  # type: ignore[no-untyped-call]
            _as_config(config), trust_remote_code=False
        )
    return made


def make_causal(
    config: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    dtype: torch.dtype,
    device: torch.device,
) -> Any:
    """The module of a config with these weights, copied.

    Raises:
        ValueError: ``transformers`` has no causal LM with this config.
    """
    disable_progress_bar()  # type: ignore[no-untyped-call]
    found = _as_config(config)
    cast = {name: t.detach().to(device, dtype, copy=True) for name, t in tensors.items()}
    # Unlike ``to(dtype)`` of a module, this leaves the angles of RoPE in float32.
    kind: Any = MODEL_FOR_CAUSAL_LM_MAPPING[type(found)]
    model: Any = kind.from_pretrained(None, config=found, state_dict=cast, dtype=dtype)
    return model.to(device).eval()


def packed_hidden(model: Any, ids_T: Tensor, positions_T: Tensor, mask_TT: Tensor) -> Tensor:
    """The lm_head's input at every position of texts that lie behind each other, with a gradient.

    Launches depend on shapes only. ``model`` must have been made for ``PACKED`` attention.

    Args:
        ids_T, positions_T: [T] int64.
        mask_TT: [T, T] bool from ``packed_mask``.

    Returns:
        [T, H].
    """
    hidden: Tensor = model.get_decoder()(
        input_ids=ids_T[None], position_ids=positions_T[None], use_cache=False, packed=mask_TT
    ).last_hidden_state[0]
    return hidden


def packed_mask(segment_T: Tensor) -> Tensor:
    """[T, T] bool: the query sees the key, which is in its text and not behind it."""
    at = torch.arange(len(segment_T), device=segment_T.device)
    return (segment_T[:, None] == segment_T) & (at[:, None] >= at)


def _packed_attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    *,
    packed: Tensor,
    **_: Any,
) -> tuple[Tensor, None]:
    """The function Hugging Face calls in every layer: q, k, v are [1, heads, T, D]."""
    if sliding_window is not None:
        at = torch.arange(packed.shape[0], device=packed.device)
        packed = packed & (at[:, None] - at < sliding_window)
    out = masked_attention(query, key, value, packed[None, None], scaling, softcap)
    return out.transpose(1, 2), None


AttentionInterface.register(PACKED, _packed_attention)


def _as_config(config: Mapping[str, Any]) -> Any:
    try:
        found = AutoConfig.for_model(**config)
    except (KeyError, TypeError, ValueError, StrictDataclassError) as error:
        raise ValueError(f"not the config of a causal LM: {error}") from error
    if type(found) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise ValueError(f"{type(found).__name__} is not the config of a causal LM")
    return found
