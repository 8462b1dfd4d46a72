"""Write the target of a GGUF file as a folder: configuration, safetensors, tokenizer, template.

The package ``gguf`` reads the file and unpacks the weights, a block of rows at a time, and several
at once; they go to the disk as they come, in the order of a safetensors file. Neither torch nor
``transformers`` (5.17) is imported for families that ``gguf_config`` describes itself. The library
would also parse the file three times, and passes over unknown metadata, tensors without a place,
weights of another shape and scaled rotary positions in silence. All of these are errors here.
"""

from __future__ import annotations

import importlib.util
import json
import math
import os
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from targets.gguf_config import SHAPE, Described, described
from targets.gguf_metadata import refuse_nonsense
from targets.gguf_tokenizer import save_tokenizer, tokenizer_of

DTYPE = "bfloat16"
"""dtype of the converted weights: what a GPU computes in, so that the target is the same on every
device. It moves a weight of 4 bits by 0.03 of the distance between two of them at most."""
_FOLLOWS = frozenset({"vocab_size", "attention.value_length", "rope.dimension_count"})
"""Metadata that say again what the tensors' shapes say."""
_END_TOKENS = ("eos", "eot", "eom")
"""Ends of a text, of a turn and of a message, as GGUF calls them."""
_FREQUENCIES = "rope_freqs.weight"
"""The one tensor that is no weight: what rotary frequencies are divided by, [head_dim / 2]."""
_BLOCK = 1 << 18
"""Weights that are unpacked together, about: their float32 copies fit in a core's cache."""
_MOST_THREADS = 8
_AHEAD = 2
"""Tensors that each thread may be ahead of the disk."""


def _as_stored(_name: str, array: np.ndarray, _head_dim: int) -> np.ndarray:
    return array


def _halves(name: str, array: np.ndarray, head_dim: int) -> np.ndarray:
    """Llama: rows of a head's query and key as halves; the file has rotated pairs side by side."""
    if not name.endswith(("attn_q.weight", "attn_k.weight")):
        return array
    pairs = array.reshape(-1, head_dim // 2, 2, *array.shape[1:])
    return pairs.swapaxes(1, 2).reshape(array.shape)


def _norms_around_zero(name: str, array: np.ndarray, _head_dim: int) -> np.ndarray:
    """Gemma: norms multiply by one plus their weight; the file has the sum."""
    return array - 1 if name.endswith("norm.weight") else array


ARCHITECTURES: dict[str, Callable[[str, np.ndarray, int], np.ndarray]] = {
    "llama": _halves,
    "qwen2": _as_stored,
    "qwen3": _as_stored,
    "gemma3": _norms_around_zero,
}
"""``general.architecture`` -> what undoes llama.cpp's change to some heads' rows of a tensor of
that name, float32, given the size of a head. Tests compare each architecture with its source."""


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
        _refuse(metadata)
        refuse_nonsense(metadata, len(reader.tensors))
        tokenizer = tokenizer_of(metadata)
        model = described(metadata, _divisors(reader), is_tied=_is_tied(reader))
        sources = _sources(reader, model, metadata["general.architecture"])
        _write_weights(folder / "model.safetensors", sources, model, metadata)
    except (ValueError, NotImplementedError) as error:
        raise ValueError(f"cannot convert {file}: {error}") from error
    except (ArithmeticError, AttributeError, LookupError, TypeError) as error:
        raise ValueError(
            f"cannot convert {file}: its metadata do not fit together "
            f"({type(error).__name__}: {error}); fetch it again"
        ) from error
    save_tokenizer(tokenizer, folder)
    _write_json(folder / "config.json", model.config)
    _write_json(folder / "generation_config.json", _generation(metadata))


def _opened(file: Path) -> Any:
    """A ``gguf.GGUFReader`` that has found every tensor within the file."""
    if importlib.util.find_spec("gguf") is None:
        raise ValueError(
            f"target {str(file)!r} is a GGUF file, and reading one needs the Python package gguf; "
            f"install it with pip install 'slipstream-serving[gguf]'"
        )
    from targets.gguf_reader import Reader

    try:
        return Reader(file)
    except (ValueError, IndexError, KeyError, OverflowError) as error:
        raise ValueError(
            f"{file} is cut short or damaged ({type(error).__name__}: {error}); fetch it again"
        ) from error


def _refuse(metadata: Mapping[str, Any]) -> None:
    """Raise ValueError for files that hold another model than their configuration would be of."""
    architecture = metadata.get("general.architecture")
    if architecture not in ARCHITECTURES:
        raise ValueError(
            f"it holds a model of architecture {architecture!r}, and only those of "
            f"{', '.join(ARCHITECTURES)} are converted; name a folder with its safetensors"
        )
    parts = metadata.get("split.count", 1)
    if parts not in (0, 1):
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
        if field not in SHAPE and field not in _FOLLOWS:
            raise ValueError(
                f"it says {name} = {value!r}, which is not converted; name a folder with its "
                f"safetensors"
            )


def _is_tied(reader: Any) -> bool:
    """The lm_head is the embedding."""
    return all(tensor.name != "output.weight" for tensor in reader.tensors)


def _divisors(reader: Any) -> np.ndarray | None:
    """[head_dim / 2] float64, what rotary frequencies are divided by, if the file has it."""
    for tensor in reader.tensors:
        if tensor.name == _FREQUENCIES:
            return np.array(tensor.data, np.float64)
    return None


def _sources(reader: Any, model: Described, architecture: str) -> dict[str, Any]:
    """Tensor of the file for every weight of a model.

    Raises:
        ValueError: weights and tensors do not correspond one to one, or differ in shape.
    """
    places = dict(_places(model, architecture))
    found: dict[str, Any] = {}
    for tensor in reader.tensors:
        if tensor.name == _FREQUENCIES:
            continue
        if tensor.name not in places:
            raise ValueError(f"{model.model_class} has no place for its tensor {tensor.name}")
        name = places[tensor.name]
        shape = tuple(int(size) for size in reversed(tensor.shape))
        if shape != model.shapes[name]:
            raise ValueError(
                f"its tensor {tensor.name} has shape {shape}, and by its metadata "
                f"{model.shapes[name]}"
            )
        found[name] = tensor
    missing = sorted(place for place, name in places.items() if name not in found)
    if missing:
        raise ValueError(f"it lacks {len(missing)} tensors, the first is {missing[0]}")
    return found


def _places(model: Described, architecture: str) -> Iterator[tuple[str, str]]:
    """Name of each weight in a GGUF file, and in the model."""
    from gguf import MODEL_ARCH_NAMES, get_tensor_name_map

    (number,) = (key for key, name in MODEL_ARCH_NAMES.items() if name == architecture)
    names = get_tensor_name_map(number, model.config["num_hidden_layers"])
    for name in model.shapes:
        stem, _, ending = name.rpartition(".")
        yield f"{names.get_name(stem)}.{ending}", name


def _write_weights(
    path: Path, sources: Mapping[str, Any], model: Described, metadata: Mapping[str, Any]
) -> None:
    """Unpack all tensors into a safetensors file, as the library of that name writes it."""
    undo, names = ARCHITECTURES[metadata["general.architecture"]], sorted(sources)
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name in names:
        start, end = end, end + 2 * math.prod(model.shapes[name])
        shape = list(model.shapes[name])
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [start, end]}
    said = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    said += b" " * (-len(said) % 8)
    threads = min(len(os.sched_getaffinity(0)), _MOST_THREADS)
    with path.open("wb") as file, ThreadPoolExecutor(threads) as pool:
        file.write(len(said).to_bytes(8, "little") + said)
        waiting = iter(names)
        begun = [
            pool.submit(_unpacked, sources[name], undo, model.head_dim)
            for name in islice(waiting, threads * _AHEAD)
        ]
        while begun:
            file.write(begun.pop(0).result().data)
            for name in islice(waiting, 1):
                begun.append(pool.submit(_unpacked, sources[name], undo, model.head_dim))


def _unpacked(tensor: Any, undo: Callable[..., np.ndarray], head_dim: int) -> np.ndarray:
    """One tensor of the file, as the model has it: the bits of bfloat16 as uint16.

    Raises:
        ValueError: a value is not finite.
        NotImplementedError: ``gguf`` cannot unpack the tensor's type.
    """
    from gguf import dequantize

    rows = tensor.data
    whole = np.empty(tuple(int(size) for size in reversed(tensor.shape)), np.uint16)
    # Whole heads: what is undone stays within one.
    step = len(rows)
    if rows.ndim > 1:
        step = max(1, _BLOCK * len(rows) // (whole.size * head_dim)) * head_dim
    for at in range(0, len(rows), step):
        array = undo(tensor.name, dequantize(rows[at : at + step], tensor.tensor_type), head_dim)
        whole[at : at + step] = _rounded(array)
    if ((whole & 0x7F80) == 0x7F80).any():
        raise ValueError(f"its tensor {tensor.name} has values that are NaN or infinite")
    return whole


def _rounded(array: np.ndarray) -> np.ndarray:
    """float32 -> uint16, the bits of the nearest bfloat16, of two the even one. What is not finite
    stays so."""
    bits = np.ascontiguousarray(array, np.float32).view(np.uint32)
    rounded = bits >> 16
    rounded &= 1
    rounded += 0x7FFF
    rounded += bits
    rounded >>= 16
    if not np.isfinite(array).all():  # the sum may carry a NaN over to zero
        rounded[~np.isfinite(array)] = 0x7F80
    return rounded.astype(np.uint16)


def _generation(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """Which tokens begin, end and pad a text."""
    keys = [f"tokenizer.ggml.{name}_token_id" for name in _END_TOKENS]
    said = {
        "bos_token_id": metadata.get("tokenizer.ggml.bos_token_id"),
        "eos_token_id": sorted({metadata[key] for key in keys if key in metadata}) or None,
        "pad_token_id": metadata.get("tokenizer.ggml.padding_token_id"),
    }
    known = {name: value for name, value in said.items() if value is not None}
    return known | {"transformers_version": version("transformers")}


def _write_json(path: Path, fields: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(fields, indent=2, sort_keys=True) + "\n")
