"""A folder with ``config.json`` and safetensors files, as Hugging Face's libraries write it.

Nothing in it is trusted: names, shapes and dtypes are compared with what is expected before a
tensor is read, and pickle files are refused.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from buffer.manifest import MANIFEST

CONFIG, TENSORS = "config.json", "model.safetensors"
_INDEX = "model.safetensors.index.json"
FLOATING = {"F64", "F32", "F16", "BF16"}
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")


class FormatError(ValueError):
    """A checkpoint that cannot become a drafter; the message names what does not fit."""


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A folder whose tensors have not been read yet."""

    folder: Path
    config: dict[str, Any]
    files: dict[str, Path]
    """File of each tensor, by name."""

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor, from its file's header.

        Raises:
            FormatError: there is no such tensor.
        """
        return self._described(name)[0]

    def expect(self, name: str, shape: tuple[int, ...], dtypes: set[str] = FLOATING) -> None:
        """Check name, shape and dtype of a tensor.

        Args:
            dtypes: tags of safetensors.

        Raises:
            FormatError: names the tensor and what was found.
        """
        found, dtype = self._described(name)
        if found != shape:
            raise self.error(f"{name} has the shape {list(found)}, expected {list(shape)}")
        if dtype not in dtypes:
            raise self.error(f"{name} is {dtype}, expected {' or '.join(sorted(dtypes))}")

    def read(self, name: str) -> Tensor:
        """A tensor, on the CPU in the dtype of its file.

        Raises:
            FormatError: it holds NaN or infinity.
        """
        with safe_open(self.files[name], framework="pt") as opened:
            tensor: Tensor = opened.get_tensor(name)
        if not bool(tensor.isfinite().all()):
            raise self.error(f"{name} holds NaN or infinity")
        return tensor

    def setting(self, name: str, default: Any = None) -> Any:
        """A value of ``config.json``, where null is no value.

        Raises:
            FormatError: it is missing and there is no default.
        """
        found = self.config.get(name)
        value = default if found is None else found
        if value is None:
            raise self.error(f"{CONFIG} has no {name}")
        return value

    def size(self, name: str, default: int | None = None) -> int:
        """A positive integer of ``config.json``, below 2^31.

        Raises:
            FormatError: it is missing, or not that.
        """
        value = self.setting(name, default)
        if type(value) is not int or not 1 <= value < 2**31:
            raise self.error(f"{name} of {CONFIG} must be a positive integer, got {value!r}")
        return value

    def real(self, name: str, default: float | None = None) -> float:
        """A positive number of ``config.json``.

        Raises:
            FormatError: it is missing, or not that.
        """
        return self.checked_real(name, self.setting(name, default))

    def checked_real(self, name: str, value: Any) -> float:
        """``value``, if it is a positive number.

        Raises:
            FormatError: names ``name``.
        """
        if type(value) not in (int, float) or not 0 < value <= sys.float_info.max:
            raise self.error(f"{name} of {CONFIG} must be a positive number, got {value!r}")
        return float(value)

    def flag(self, name: str, *, default: bool = False) -> bool:
        """A truth value of ``config.json``; ``default`` if there is none.

        Raises:
            FormatError: it is something else.
        """
        value = self.setting(name, default)
        if type(value) is not bool:
            raise self.error(f"{name} of {CONFIG} must be true or false, got {value!r}")
        return value

    def table(self, name: str) -> dict[str, Any]:
        """An object of ``config.json``; empty if there is none.

        Raises:
            FormatError: it is something else.
        """
        value = self.config.get(name)
        if value is None:
            return {}
        if not isinstance(value, dict):
            raise self.error(f"{name} of {CONFIG} must be an object, got {value!r}")
        return value

    def with_layer(self) -> Checkpoint:
        """The checkpoint with the keys of its layers' config at the top, as ``speculators`` nests
        them; its own come first.

        Raises:
            FormatError: there are none.
        """
        layer = self.table("transformer_layer_config")
        if not layer:
            raise self.error(f"{CONFIG} has no transformer_layer_config")
        return replace(self, config={**layer, **self.config})

    def heads(self) -> tuple[int, int, int]:
        """Query heads, key heads and head dimension, as Hugging Face names them.

        Raises:
            FormatError: one is missing, query heads cannot share the key heads, or the dimension is
                odd, so that it cannot be rotated.
        """
        heads = self.size("num_attention_heads")
        kv_heads = self.size("num_key_value_heads", heads)
        if heads % kv_heads:
            raise self.error(
                f"num_key_value_heads is {kv_heads}, which does not divide the {heads} of "
                f"num_attention_heads"
            )
        head_dim = self.size("head_dim", max(self.size("hidden_size") // heads, 1))
        if head_dim % 2:
            raise self.error(f"head_dim is {head_dim}, expected an even number")
        return heads, kv_heads, head_dim

    def error(self, problem: str) -> FormatError:
        """``problem``, with the folder it is in."""
        return FormatError(f"{self.folder}: {problem}")

    def _described(self, name: str) -> tuple[tuple[int, ...], str]:
        if name not in self.files:
            raise self.error(f"{name} is missing")
        with safe_open(self.files[name], framework="pt") as opened:
            part = opened.get_slice(name)
            return tuple(part.get_shape()), str(part.get_dtype())


def read_checkpoint(folder: Path) -> Checkpoint:
    """Open a folder; only the headers of its tensors are read.

    Raises:
        FormatError: no config, no safetensors files, or a damaged one; or two files hold a tensor
            and no index names one of them.
    """
    config = read_config(folder)
    paths = sorted(folder.glob("*.safetensors"))
    if not paths:
        pickles = sorted(p.name for p in folder.iterdir() if p.suffix in _PICKLES)
        found = f", only {pickles[0]}, which may hold code and is not loaded" if pickles else ""
        raise FormatError(f"{folder} has no *.safetensors file{found}; convert it to safetensors")
    return Checkpoint(folder, config, _files_of(folder, paths))


def read_config(folder: Path) -> dict[str, Any]:
    """``config.json``.

    Raises:
        FormatError: there is none, as in a bundle, or it is no JSON object.
    """
    if not (folder / CONFIG).exists() and (folder / MANIFEST).exists():
        raise FormatError(f"{folder} is a bundle already, as drafter.path names one")
    return _read_object(folder / CONFIG)


def _files_of(folder: Path, paths: list[Path]) -> dict[str, Path]:
    """File of each tensor: where several hold it, the one that the index names."""
    indexed = _indexed(folder)
    files: dict[str, Path] = {}
    for path in paths:
        for name in _names_in(path):
            first = files.setdefault(name, path)
            if first is path:
                continue
            if indexed.get(name) not in (first.name, path.name):
                raise FormatError(
                    f"{folder}: {name} is in {first.name} and in {path.name}, and no {_INDEX} "
                    f"says which counts; move the other file away"
                )
            files[name] = first if indexed[name] == first.name else path
    for name, file in indexed.items():
        if name in files and files[name].name != file:
            raise FormatError(f"{folder}: {_INDEX} names {file} for {name}, which is elsewhere")
    return files


def _names_in(path: Path) -> list[str]:
    try:
        with safe_open(path, framework="pt") as opened:
            return list(opened.keys())
    except (SafetensorError, OSError) as error:
        raise FormatError(f"{path} is no sound safetensors file: {error}") from None


def _indexed(folder: Path) -> dict[str, Any]:
    """Tensor -> name of its file, as the index says; empty without one."""
    path = folder / _INDEX
    if not path.is_file():
        return {}
    named = _read_object(path).get("weight_map")
    if not isinstance(named, dict):
        raise FormatError(f"{path} has no weight_map")
    return named


def _read_object(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise FormatError(f"{path} cannot be read: {error}") from None
    if not isinstance(value, dict):
        raise FormatError(f"{path} must hold a JSON object")
    return value


def write_checkpoint(folder: Path, config: Mapping[str, Any], tensors: dict[str, Tensor]) -> None:
    """Write a folder that ``read_checkpoint`` reads.

    Raises:
        OSError: it cannot be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    plain = {name: tensor.contiguous() for name, tensor in tensors.items()}
    (folder / TENSORS).write_bytes(save(plain, metadata={"format": "pt"}))
    (folder / CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


def dtype_name(tensors: Mapping[str, Tensor]) -> str:
    """``float32`` and the like: the dtype of the floating tensors."""
    first = next(t.dtype for t in tensors.values() if t.is_floating_point())
    return str(first).removeprefix("torch.")


LAYER: Mapping[str, Any] = {
    "hidden_act": "silu", "attn_logit_softcapping": None, "attention_multiplier": None,
    "residual_multiplier": 1.0,
}  # fmt: skip
"""Keys of configs -> the only value that is computed here, of a decoder layer."""
WHOLE: Mapping[str, Any] = {
    **LAYER, "final_logit_softcapping": None, "logit_scale": 1.0, "logits_scaling": 1.0,
    "embedding_multiplier": 1.0,
}  # fmt: skip
"""The same of a drafter with its own embedding or lm_head."""


def refuse_others(checkpoint: Checkpoint, computed: Mapping[str, Any]) -> None:
    """Refuse values of ``config.json`` other than ``computed``; null and no value are fine.

    Raises:
        FormatError: names the key.
    """
    for name, only in computed.items():
        found = checkpoint.config.get(name)
        if found not in (only, None):
            raise checkpoint.error(f"{name} is {found!r}, which is not computed here")


def refuse_windows(checkpoint: Checkpoint) -> None:
    """Refuse a config whose attention has a window.

    Raises:
        FormatError: names the key.
    """
    width = checkpoint.config.get("sliding_window")
    if width is not None and checkpoint.flag("use_sliding_window", default=True):
        raise checkpoint.error(f"sliding_window is {width!r}, which is not computed here")
    kinds = checkpoint.config.get("layer_types")
    # Those of a target's layers may differ; its head is like one that sees the whole text.
    if kinds is not None and (not isinstance(kinds, list) or "full_attention" not in kinds):
        raise checkpoint.error(f"layer_types is {kinds!r}, which is not computed here")


_FACTOR, _THETA = "partial_rotary_factor", "rope_theta"


def rotated(checkpoint: Checkpoint, head_dim: int) -> int:
    """Leading elements of each head that a config rotates, an even number.

    Raises:
        FormatError: names the key that says something else.
    """
    nested = (checkpoint.table(name).get(_FACTOR) for name in ("rope_parameters", "rope_scaling"))
    found = [x for x in (checkpoint.config.get(_FACTOR), *nested) if x is not None]
    share = checkpoint.checked_real(_FACTOR, found[0] if found else 1.0)
    if any(other != found[0] for other in found):
        raise checkpoint.error(f"{_FACTOR} of {CONFIG} is {found[0]!r} and {found[1]!r}")
    dim = int(head_dim * min(share, 1.0))
    if share > 1 or dim < 2 or dim % 2:
        raise checkpoint.error(
            f"{_FACTOR} is {share}, which leaves no pairs of {head_dim} to rotate"
        )
    return dim


def refuse_partial_rotation(checkpoint: Checkpoint, head_dim: int) -> None:
    """Refuse heads of which only a part is rotated.

    Raises:
        FormatError: names the key.
    """
    dim = rotated(checkpoint, head_dim)
    if dim != head_dim:
        raise checkpoint.error(
            f"{_FACTOR} leaves {head_dim - dim} of {head_dim} elements of each head as they are, "
            f"which is not computed here"
        )


def rope_theta_of(checkpoint: Checkpoint) -> float:
    """Base of the rotary embedding that a config describes, under its newer name, in
    ``rope_parameters``, or an older one; 10,000 where it says nothing, as transformers has it.

    Raises:
        FormatError: it is no positive number, or is given twice and differs; positions are scaled,
            or differ between layers. It names the key.
    """
    found = [checkpoint.config.get(_THETA)]
    for name in ("rope_parameters", "rope_scaling"):
        rope = checkpoint.table(name)
        kind = rope.get("rope_type", rope.get("type", "default"))
        if kind not in (None, "default"):
            raise checkpoint.error(f"rotary positions are scaled by the rule {kind!r} of {name}")
        if layers := sorted(key for key, value in rope.items() if isinstance(value, dict)):
            raise checkpoint.error(
                f"{name} has one rotary embedding for {layers[0]}, which is not computed here"
            )
        found.append(rope.get(_THETA))
    thetas = [checkpoint.checked_real(_THETA, theta) for theta in found if theta is not None]
    if any(other != thetas[0] for other in thetas):
        raise checkpoint.error(f"{_THETA} of {CONFIG} is " + " and ".join(map(str, thetas)))
    return thetas[0] if thetas else 10000.0


def joined_rows(checkpoint: Checkpoint, names: list[str]) -> Tensor:
    """Tensors below each other.

    Raises:
        FormatError: they have several dtypes.
    """
    parts = [checkpoint.read(name) for name in names]
    for name, part in zip(names, parts, strict=True):
        if part.dtype != parts[0].dtype:
            raise checkpoint.error(f"{name} is {part.dtype}, {names[0]} is {parts[0].dtype}")
    return torch.cat(parts)
