"""Write the target of a GGUF file as a folder: configuration, safetensors, tokenizer, template.

The package ``gguf`` reads the file and unpacks the weights. They are put into the model here:
``transformers`` (5.17) needs several times as long, because it parses the file three times and
makes the table of names anew for every module, and it passes over unknown metadata, tensors without
a place, weights of another shape and scaled rotary positions in silence. All of these are errors.
"""

from __future__ import annotations

import copy
import importlib.util
import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

DTYPE = torch.bfloat16
"""dtype of the converted weights: what a GPU computes in, so that the target is the same on every
device. It moves a weight of 4 bits by 0.03 of the distance between two of them at most."""
_SHAPE = {
    "block_count": "num_hidden_layers",
    "context_length": "max_position_embeddings",
    "embedding_length": "hidden_size",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "attention.key_length": "head_dim",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
    "attention.sliding_window": "sliding_window",
    "rope.freq_base": "rope_theta",
}
"""Metadata of an architecture -> field of its configuration."""
_FOLLOWS = frozenset({"vocab_size", "attention.value_length", "rope.dimension_count"})
"""Metadata that say again what the tensors' shapes say."""
_MODEL_TYPES = {"gemma3": "gemma3_text"}
"""Architectures that ``transformers`` calls otherwise."""
_END_TOKENS = ("eos", "eot", "eom")
"""Ends of a text, of a turn and of a message, as GGUF calls them."""
_FREQUENCIES = "rope_freqs.weight"
"""The one tensor that is no weight: what rotary frequencies are divided by, [head_dim / 2]."""
_LLAMA3_FACTORS = (8.0, 32.0)
"""Scalings of Llama 3.1 and 3.2; the other constants are the same in both."""


def _as_stored(_name: str, array: np.ndarray, _config: Any) -> np.ndarray:
    return array


def _halves(name: str, array: np.ndarray, config: Any) -> np.ndarray:
    """Llama: rows of a head's query and key as halves; the file has rotated pairs side by side."""
    if not name.endswith(("attn_q.weight", "attn_k.weight")):
        return array
    pairs = array.reshape(-1, config.head_dim // 2, 2, *array.shape[1:])
    return pairs.swapaxes(1, 2).reshape(array.shape)


def _norms_around_zero(name: str, array: np.ndarray, _config: Any) -> np.ndarray:
    """Gemma: norms multiply by one plus their weight; the file has the sum."""
    return array - 1 if name.endswith("norm.weight") else array


ARCHITECTURES: dict[str, Callable[[str, np.ndarray, Any], np.ndarray]] = {
    "llama": _halves,
    "qwen2": _as_stored,
    "qwen3": _as_stored,
    "gemma3": _norms_around_zero,
}
"""``general.architecture`` -> what undoes llama.cpp's change to a tensor of that name, float32.
Tests compare each architecture with its source."""


def convert(file: Path, folder: Path) -> None:
    """Write the target of a GGUF file into an empty folder, in ``DTYPE``.

    The same file always gives the same bytes of configuration and weights, from which a target's
    fingerprint is taken.

    Raises:
        ValueError: the package ``gguf`` is missing, the file is damaged, or it holds what we cannot
            convert; the text names the file and says what.
    """
    reader = _opened(file)
    metadata = {name: field.contents() for name, field in reader.fields.items()}
    try:
        tokenizer, model = _converted(reader, metadata)
    except (ValueError, NotImplementedError) as error:
        raise ValueError(f"cannot convert {file}: {error}") from error
    tokenizer.save_pretrained(folder)
    _save(model, folder)


def _opened(file: Path) -> Any:
    """A ``gguf.GGUFReader`` that has found every tensor within the file."""
    if importlib.util.find_spec("gguf") is None:
        raise ValueError(
            f"target {str(file)!r} is a GGUF file, and reading one needs the Python package gguf; "
            f"install it with pip install 'slipstream-serving[gguf]'"
        )
    from gguf import GGUFReader

    try:
        return GGUFReader(file)
    except (ValueError, IndexError, KeyError, OverflowError) as error:
        raise ValueError(
            f"{file} is cut short or damaged ({type(error).__name__}: {error}); fetch it again"
        ) from error


def _converted(reader: Any, metadata: Mapping[str, Any]) -> tuple[Any, Any]:
    """Tokenizer and model of an opened file."""
    from targets.gguf_tokenizer import tokenizer_of

    _refuse(metadata)
    tokenizer = tokenizer_of(metadata)
    config = _with_frequencies(_config(reader, metadata), reader)
    with torch.device("meta"):
        model: Any = AutoModelForCausalLM.from_config(config, dtype=DTYPE)  # type: ignore[no-untyped-call]
    weights = _weights(reader, model, metadata["general.architecture"])
    model.load_state_dict(weights, assign=True, strict=False)  # a head that is tied is not in them
    model.tie_weights()
    model.generation_config = _generation(metadata)
    return tokenizer, model


def _refuse(metadata: Mapping[str, Any]) -> None:
    """Raise ValueError for files that hold another model than their configuration would be of."""
    architecture = metadata.get("general.architecture")
    if architecture not in ARCHITECTURES:
        raise ValueError(
            f"it holds a model of architecture {architecture!r}, and only those of "
            f"{', '.join(ARCHITECTURES)} are converted; name a folder with its safetensors"
        )
    parts = metadata.get("split.count", 1)
    if parts > 1:
        raise ValueError(f"it is one of {parts} parts; join them with llama-gguf-split --merge")
    scaling = metadata.get(f"{architecture}.rope.scaling.type", "none")
    if scaling != "none":
        raise ValueError(
            f"it scales rotary positions by the rule {scaling!r}, which is not converted; name a "
            f"folder with its safetensors"
        )
    for name, value in metadata.items():
        of, _, field = name.partition(".")
        if of != architecture or field.startswith("rope.scaling."):
            continue
        if field not in _SHAPE and field not in _FOLLOWS:
            raise ValueError(
                f"it says {name} = {value!r}, which is not converted; name a folder with its "
                f"safetensors"
            )


def _config(reader: Any, metadata: Mapping[str, Any]) -> Any:
    """Configuration of the model, as ``transformers`` has it."""
    architecture = metadata["general.architecture"]
    said: dict[str, Any] = {
        field: metadata.get(f"{architecture}.{name}") for name, field in _SHAPE.items()
    }
    if said["head_dim"] is None:
        said["head_dim"] = said["hidden_size"] // said["num_attention_heads"]
    special = ("bos", "eos", "padding")
    ids = {name: metadata.get(f"tokenizer.ggml.{name}_token_id") for name in special}
    return AutoConfig.for_model(
        _MODEL_TYPES.get(architecture, architecture),
        **{field: value for field, value in said.items() if value is not None},
        vocab_size=len(metadata["tokenizer.ggml.tokens"]),
        tie_word_embeddings=all(tensor.name != "output.weight" for tensor in reader.tensors),
        bos_token_id=ids["bos"],
        eos_token_id=ids["eos"],
        pad_token_id=ids["padding"],
    )


def _with_frequencies(config: Any, reader: Any) -> Any:
    """The configuration with the scaling of rotary frequencies that the file has as a tensor."""
    found = [tensor.data for tensor in reader.tensors if tensor.name == _FREQUENCIES]
    if not found:
        return config
    theta = config.rope_parameters["rope_theta"]
    plain = theta ** -(torch.arange(0, config.head_dim, 2).double() / config.head_dim)
    divisors = torch.from_numpy(np.array(found[0], np.float64))
    for factor in _LLAMA3_FACTORS:
        scaled = copy.deepcopy(config)
        scaled.rope_parameters = {
            "rope_type": "llama3",
            "rope_theta": theta,
            "factor": factor,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        }
        frequencies, _ = ROPE_INIT_FUNCTIONS["llama3"](scaled, torch.device("cpu"))
        if torch.allclose(plain / frequencies.double(), divisors, rtol=1e-3):
            return scaled
    raise ValueError(
        f"its rotary frequencies ({_FREQUENCIES}) are scaled otherwise than in Llama 3; name a "
        f"folder with its safetensors"
    )


def _weights(reader: Any, model: Any, architecture: str) -> dict[str, Tensor]:
    """Every parameter of a model, unpacked from the file.

    Raises:
        ValueError: parameters and tensors do not correspond one to one, differ in shape, or a
            value is not finite.
        NotImplementedError: ``gguf`` cannot unpack a tensor's type.
    """
    places = dict(_places(model, architecture))
    wanted = dict(model.named_parameters())
    found: dict[str, Tensor] = {}
    for tensor in reader.tensors:
        if tensor.name == _FREQUENCIES:
            continue
        if tensor.name not in places:
            raise ValueError(f"{type(model).__name__} has no place for its tensor {tensor.name}")
        name = places[tensor.name]
        found[name] = _unpacked(tensor, model.config, architecture)
        if found[name].shape != wanted[name].shape:
            raise ValueError(
                f"its tensor {tensor.name} has shape {tuple(found[name].shape)}, and by its "
                f"metadata {tuple(wanted[name].shape)}"
            )
    missing = sorted(place for place, name in places.items() if name not in found)
    if missing:
        raise ValueError(f"it lacks {len(missing)} tensors, the first is {missing[0]}")
    return found


def _places(model: Any, architecture: str) -> Iterator[tuple[str, str]]:
    """Name of each parameter in a GGUF file, and in the model."""
    from gguf import MODEL_ARCH_NAMES, get_tensor_name_map

    (number,) = (key for key, name in MODEL_ARCH_NAMES.items() if name == architecture)
    names = get_tensor_name_map(number, model.config.num_hidden_layers)
    for name, _ in model.named_parameters():
        stem, _, ending = name.rpartition(".")
        yield f"{names.get_name(stem)}.{ending}", name


def _unpacked(tensor: Any, config: Any, architecture: str) -> Tensor:
    """One tensor of the file, as the model has it, in ``DTYPE``."""
    from gguf import dequantize

    array = dequantize(tensor.data, tensor.tensor_type)
    array = ARCHITECTURES[architecture](tensor.name, array, config)
    weight = torch.from_numpy(np.array(array)).to(DTYPE)
    if not weight.isfinite().all():
        raise ValueError(f"its tensor {tensor.name} has values that are NaN or infinite")
    return weight


def _generation(metadata: Mapping[str, Any]) -> Any:
    """Which tokens begin, end and pad a text."""
    keys = [f"tokenizer.ggml.{name}_token_id" for name in _END_TOKENS]
    return GenerationConfig(  # type: ignore[no-untyped-call]
        bos_token_id=metadata.get("tokenizer.ggml.bos_token_id"),
        eos_token_id=sorted({metadata[key] for key in keys if key in metadata}) or None,
        pad_token_id=metadata.get("tokenizer.ggml.padding_token_id"),
    )


def _save(model: Any, folder: Path) -> None:
    """Write configuration and weights; they are the same whatever version converted them."""
    model.save_pretrained(folder)
    for weights in folder.glob("*.safetensors"):
        weights.chmod(0o644)  # safetensors lets the owner alone read it
    path = folder / "config.json"
    fields = json.loads(path.read_text())
    del fields["transformers_version"]
    path.write_text(json.dumps(fields, indent=2, sort_keys=True) + "\n")
