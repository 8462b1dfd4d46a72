"""Find a target and refuse one that cannot work, without torch.

A mistake is told at once, not after the seconds of importing torch and the minutes of loading.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from buffer.fingerprint import weight_files
from targets.gguf_cache import check_magic, converted_folder

GGUF = ".gguf"
"""Ending of the name of a GGUF file."""
_MAX_HEADER_BYTES = 100 << 20  # what the safetensors library accepts
_INDEX = "model.safetensors.index.json"
_WEIGHT_BYTES = {"F64": 8, "F32": 4, "BF16": 2, "F16": 2}
"""Types that weights may have, and their sizes in bytes."""
_ITEM_BYTES = {
    **_WEIGHT_BYTES, "I64": 8, "U64": 8, "C64": 8, "I32": 4, "U32": 4, "I16": 2, "U16": 2, "I8": 1,
    "U8": 1, "BOOL": 1, "F8_E4M3": 1, "F8_E5M2": 1,
}  # fmt: skip
_WEIGHTS = (".weight", ".bias")
"""Endings of the names of weights."""


def target_folder(target: str, cache: Path | None = None) -> Path:
    """Folder of a target: the path itself, what a GGUF file was converted into, or the snapshot of
    a Hugging Face id, downloaded if new.

    Args:
        cache: folder of converted GGUF files; ``None``: ``targets.gguf_cache.default_cache()``.

    Raises:
        ValueError: ``target`` is neither a folder, nor a GGUF file or an id that can be loaded.
    """
    path = Path(target)
    if path.is_dir():
        return path
    if path.is_file() or target.endswith(GGUF):
        return converted_folder(path, cache)
    if path.is_absolute() or target.startswith("."):
        raise _nothing_there(target)
    try:
        return downloaded(target)
    except ValueError as error:
        raise ValueError(
            f"target {target!r} is neither a folder, a GGUF file nor a Hugging Face id that can be "
            f"loaded ({error})"
        ) from error


def downloaded(name: str) -> Path:
    """Snapshot of a Hugging Face id, downloaded if new.

    Raises:
        ValueError: there is none, or it cannot be reached.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.utils.tqdm import disable_progress_bars

    if not sys.stderr.isatty():  # in a log file they would be control characters
        disable_progress_bars()
    patterns = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"]
    try:
        return Path(snapshot_download(name, allow_patterns=patterns))
    except (OSError, ValueError) as error:
        # The hub's messages are paragraphs with advice; what happened stands on the first line.
        what = str(error).strip().partition("\n")[0]
        raise ValueError(f"{type(error).__name__}: {what}") from error


def checked_folder(target: str, cache: Path | None = None) -> Path:
    """``target_folder``, with all its weights there and whole.

    Raises:
        ValueError: as ``target_folder`` does, or a file is missing, cut off or no safetensors file,
            or weights are quantized without a ``quantization_config`` that says how.
    """
    folder = target_folder(target, cache)
    files = weight_files(folder)
    config = _read_json(folder / "config.json")
    if (folder / _INDEX).is_file():
        _check_index(folder, {path.name for path in files})
    for path in files:
        entries = _check_whole(path)
        if config.get("quantization_config") is None:
            _check_types(path, entries)
    return folder


def refuse_early(target: str) -> None:
    """Look at a target for some milliseconds: whether it is there, a folder also whether it is
    whole. Nothing is downloaded or converted.

    Raises:
        ValueError: as ``checked_folder`` does.
    """
    path = Path(target)
    if path.is_dir():
        checked_folder(target)
    elif path.is_file() or target.endswith(GGUF):
        check_magic(path)
    elif path.is_absolute() or target.startswith("."):
        raise _nothing_there(target)


def target_name(target: str) -> str:
    """Name of a target in the API: the last part of its path or id, without ``.gguf``."""
    return Path(target).absolute().name.removesuffix(GGUF)


def _nothing_there(target: str) -> ValueError:
    return ValueError(f"target {target!r} is neither a folder nor a GGUF file")


def _check_index(folder: Path, present: set[str]) -> None:
    index = _read_json(folder / _INDEX)
    named = index.get("weight_map")
    if not isinstance(named, dict):
        raise ValueError(f"{folder / _INDEX} has no weight_map; download the target again")
    missing = sorted({str(name) for name in named.values()} - present)
    if missing:
        raise ValueError(
            f"{folder} lacks {len(missing)} of the files that {_INDEX} names: "
            f"{', '.join(missing[:3])}; download the target again"
        )


def _check_whole(path: Path) -> dict[str, Any]:
    """Compare the size of a safetensors file with what its header says. Returns dtype, shape and
    offsets of each tensor."""
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or not 2 <= length <= _MAX_HEADER_BYTES:
                raise ValueError(
                    f"{path} is not a safetensors file ({size} bytes); download the target again"
                )
            header = file.read(length)
    except OSError as error:
        raise ValueError(f"{path} cannot be read ({error.strerror})") from None
    if len(header) < length:
        raise _cut_off(path, 8 + length, size)
    try:
        entries = json.loads(header)
        entries.pop("__metadata__", None)
        last = 8 + length + max((entry["data_offsets"][1] for entry in entries.values()), default=0)
        is_sound = _fills_file(entries)
    except (ValueError, TypeError, KeyError, IndexError, AttributeError, RecursionError):
        raise ValueError(
            f"{path} is damaged: its header cannot be read; download the target again"
        ) from None
    if size != last:
        raise _cut_off(path, last, size)
    if not is_sound:
        raise ValueError(
            f"{path} is damaged: by its header, tensors overlap or have another size than their "
            f"shape; download the target again"
        )
    return entries  # type: ignore[no-any-return]


def _fills_file(entries: Mapping[str, Any]) -> bool:
    """True if tensors lie one behind the other and are as large as their shapes."""
    at = 0
    for entry in sorted(entries.values(), key=lambda entry: tuple(entry["data_offsets"])):
        start, end = entry["data_offsets"]
        each = _ITEM_BYTES.get(entry["dtype"])
        if start != at or end < start:
            return False
        if each is not None and end - start != each * math.prod(entry["shape"]):
            return False
        at = end
    return True


def _check_types(path: Path, entries: Mapping[str, Any]) -> None:
    """Weights of another type would be read as plain numbers, without their scales."""
    for name, entry in entries.items():
        if name.endswith(_WEIGHTS) and entry["dtype"] not in _WEIGHT_BYTES:
            raise ValueError(
                f"{path}: {name} has the type {entry['dtype']}; weights must be "
                f"{', '.join(_WEIGHT_BYTES)}. Quantized targets are not supported"
            )


def _cut_off(path: Path, wanted: int, size: int) -> ValueError:
    what, extent = ("cut off", " or more") if size < wanted else ("damaged", "")
    return ValueError(
        f"{path} is {what}: by its header it holds {wanted} bytes{extent}, but it has {size}; "
        f"download the target again"
    )


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path} must hold a JSON object, got {type(value).__name__}")
    return value
