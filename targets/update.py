"""New weights for a running target: read and checked beside it, then copied over its own.

Every value goes where the old one lies. So captured graphs stay right, and so does whatever shares
these tensors: joined and padded layouts, which the parameters are views of, and drafters that use
the target's embedding or lm_head.

Files are read into memory of our own, never mapped: whoever writes them may still be at it, and a
mapped file that is cut off ends the process.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from buffer.files import open_regular
from buffer.fingerprint import target_fingerprint, weight_files
from buffer.tensors import TensorFileError, TensorInfo, bits_are_finite, check_safetensors
from targets.config import load_config
from targets.find import checked_folder
from targets.own_config import OwnConfig, computed, read_own_config
from targets.target import Target

_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
}  # fmt: skip
_BITS = {"F64": np.uint64, "F32": np.uint32, "F16": np.uint16, "BF16": np.uint16}
_MAX_HEADER_BYTES = 100 << 20  # what the safetensors library accepts
_ALIGNED = 64
_NOT_COMPUTED = frozenset({"use_cache", "bos_token_id", "eos_token_id", "pad_token_id"})
"""Keys of a config that change nothing about what the model computes for a token."""


@dataclass(frozen=True, slots=True)
class _Place:
    """Where a tensor of a checkpoint lies."""

    path: Path
    info: TensorInfo


@dataclass(frozen=True, slots=True)
class _Wanted:
    """A parameter of the target, and the memory that its successor is read into."""

    parameter: Any
    successor: Tensor
    """Same shape and dtype, on the host."""
    tied_to: str | None
    """Name whose tensor it takes if the checkpoint has none of its own."""


class TargetWeights:
    """The parameters of one target, and host memory for one set of new ones.

    The memory is allocated by the first ``read`` and stays. ``read`` and ``take_over`` must not
    run at the same time.
    """

    def __init__(self, target: Target) -> None:
        """
        Args:
            target: in its final layout.
        """
        self._target = target
        self._tied = _tied_names(target)
        self._wanted: dict[str, _Wanted] = {}
        self._scratch = np.empty(0, np.uint8)

    def read(self, folder: Path) -> str:
        """Read the checkpoint in ``folder`` and check all of it; nothing of the target changes.

        Args:
            folder: ``config.json`` and safetensors, as ``save_pretrained`` writes them.

        Returns:
            Its fingerprint.

        Raises:
            ValueError: it cannot take the place of the running weights; names the first tensor, or
                key of the config, that does not fit.
            OSError: it cannot be read.
        """
        if reason := self._target.why_not_overwritten():
            raise ValueError(f"the weights of this target cannot be replaced: {reason}")
        if not folder.is_dir():
            raise ValueError(f"{folder} is not a folder")
        checked_folder(str(folder))
        self._check_config(folder)
        before = target_fingerprint(folder)
        found = _places(folder)
        wanted = self._allocated()
        _check_names(folder, found, wanted, {*self._tied}, self._ignored())
        for name, one in wanted.items():
            self._fill(folder, name, found, one)
        self._check_tied(folder, found)
        if target_fingerprint(folder) != before:
            raise ValueError(f"{folder} changed while it was read; send it once it is complete")
        return before

    def are_in_force(self) -> bool:
        """Whether what was read equals the running weights. On a GPU it waits for the device."""
        pairs = ((one.parameter, one.successor) for one in self._wanted.values())
        return all(torch.equal(p.data, new.to(p.device)) for p, new in pairs)

    @torch.no_grad()
    def take_over(self) -> None:
        """Copy what was read over the running weights, and wait until that is done.

        Call it between two passes, on the thread and stream that launch them.
        """
        for one in self._wanted.values():
            one.parameter.data.copy_(one.successor, non_blocking=True)
        self._target.follow()
        if self._target.device.type == "cuda":  # the next ``read`` writes into the same memory
            torch.cuda.current_stream(self._target.device).synchronize()

    # ---- reading -------------------------------------------------------------------------------

    def _allocated(self) -> dict[str, _Wanted]:
        """Parameters by their names in checkpoints, with memory for their successors."""
        if self._wanted:
            return self._wanted
        parameters = dict(self._target.model.named_parameters())
        starts, total = dict[str, int](), 0
        for name, parameter in parameters.items():
            starts[name] = total
            total += -(-parameter.numel() * parameter.element_size() // _ALIGNED) * _ALIGNED
        on_gpu = self._target.device.type == "cuda"
        memory = torch.empty(total, dtype=torch.uint8, pin_memory=on_gpu)
        self._wanted = {
            name: _Wanted(p, _view(memory, starts[name], p), self._tied.get(name))
            for name, p in parameters.items()
        }
        return self._wanted

    def _ignored(self) -> tuple[str, ...]:
        """Patterns of names that ``transformers`` passes over in checkpoints of this model."""
        patterns = getattr(self._target.model, "_keys_to_ignore_on_load_unexpected", None)
        return tuple(patterns or ())

    def _check_config(self, folder: Path) -> None:
        """
        Raises:
            ValueError: a key says that the model computes something else.
        """
        ours, theirs = _computed(self._target.model.config, folder)
        for key in sorted((ours.keys() | theirs.keys()) - _NOT_COMPUTED):
            if key.startswith("_"):  # how this process computes it
                continue
            mine, its = _as_json(ours.get(key)), _as_json(theirs.get(key))
            if mine != its:
                raise ValueError(
                    f"{folder / 'config.json'} has {key} = {its}, but the running target has "
                    f"{mine}; new weights must be of the same model"
                )

    def _fill(self, folder: Path, name: str, found: Mapping[str, _Place], wanted: _Wanted) -> None:
        """Read one tensor into its memory.

        Raises:
            ValueError: it is of another shape, no floating type, or not finite.
        """
        source = name if name in found else wanted.tied_to
        assert source is not None, "names were checked"
        place, shape = found[source], tuple(wanted.successor.shape)
        if place.info.shape != shape:
            raise ValueError(
                f"{folder}: {source} has the shape {list(place.info.shape)}, but the running "
                f"target needs {list(shape)}"
            )
        dtype = _DTYPES.get(place.info.dtype)
        if dtype is None:
            raise ValueError(
                f"{folder}: {source} is {place.info.dtype}, none of {', '.join(_DTYPES)}"
            )
        bits = self._bits(place)
        if bits.size and not bits_are_finite(bits.view(_BITS[place.info.dtype]), place.info.dtype):
            raise ValueError(f"{folder}: {source} holds NaN or infinity")
        wanted.successor.copy_(torch.from_numpy(bits).view(dtype).view(shape))
        if dtype != wanted.successor.dtype and not wanted.successor.isfinite().all():
            raise ValueError(
                f"{folder}: {source} holds values that do not fit in {wanted.successor.dtype}"
            )

    def _bits(self, place: _Place) -> NDArray[np.uint8]:
        """The bytes of a tensor, in memory that the next call overwrites."""
        num_bytes = place.info.end - place.info.start
        if len(self._scratch) < num_bytes:
            self._scratch = np.empty(num_bytes, np.uint8)
        bits = self._scratch[:num_bytes]
        with FileIO(open_regular(place.path, follow=True), "rb") as file:
            file.seek(place.info.start)
            at = 0
            while at < num_bytes:
                count = file.readinto(bits[at:].data)
                if not count:
                    raise ValueError(f"{place.path} was cut off while it was read")
                at += count
        return bits

    def _check_tied(self, folder: Path, found: Mapping[str, _Place]) -> None:
        """
        Raises:
            ValueError: the checkpoint has an lm_head of its own where the target has none.
        """
        for head, embed in self._tied.items():
            if head not in found:
                continue
            own = self._wanted.get(head)
            if own is None:
                own = _Wanted(None, torch.empty_like(self._wanted[embed].successor), None)
                self._fill(folder, head, found, own)
            if not torch.equal(own.successor, self._wanted[embed].successor):
                raise ValueError(
                    f"{folder}: {head} differs from {embed}, but the running target ties them"
                )


def _computed(config: Any, folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """What the running target's config and that of a folder say about what is computed.

    Raises:
        ValueError: the folder's cannot be used.
    """
    own = read_own_config(folder)
    if own is not None and isinstance(config, OwnConfig):
        return computed(config), computed(own)
    # Loads transformers, which takes seconds of a core that requests are decoded on.
    from targets.causal import config_json

    try:
        theirs = config_json(load_config(folder))
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{folder / 'config.json'} cannot be used: {error}") from error
    return config_json(config), theirs


def _tied_names(target: Target) -> dict[str, str]:
    """Name of the lm_head -> that of the embedding, if the target ties them."""
    embed, head = target.embed.weight, target.lm_head.weight
    if not target.config.tie_word_embeddings or not _are_equal(head, embed):
        return {}
    names = {id(module): f"{name}.weight" for name, module in target.model.named_modules()}
    return {names[id(target.lm_head)]: names[id(target.embed)]}


def _are_equal(one: Tensor, other: Tensor) -> bool:
    """Whether two weights are one, or copies of each other."""
    same = one.data_ptr() == other.data_ptr() and one.stride() == other.stride()
    return (same and one.shape == other.shape) or torch.equal(one, other)


def _view(memory: Tensor, start: int, like: Tensor) -> Tensor:
    num_bytes = like.numel() * like.element_size()
    return memory[start : start + num_bytes].view(like.dtype).view(like.shape)


def _places(folder: Path) -> dict[str, _Place]:
    """Every tensor of the safetensors files of a folder, by name.

    Raises:
        ValueError: a file is damaged, or two have a tensor of the same name.
    """
    found: dict[str, _Place] = {}
    for path in weight_files(folder):
        try:
            tensors = check_safetensors(path, max_header_bytes=_MAX_HEADER_BYTES)
        except TensorFileError as error:
            raise ValueError(f"{path} is damaged: {error}") from error
        if twice := found.keys() & tensors.keys():
            raise ValueError(f"{folder}: {min(twice)} is in two files")
        found |= {name: _Place(path, info) for name, info in tensors.items()}
    return found


def _check_names(
    folder: Path,
    found: Mapping[str, _Place],
    wanted: Mapping[str, _Wanted],
    tied: Collection[str],
    ignored: tuple[str, ...],
) -> None:
    """
    Args:
        tied: tensors that may be there, equal to another one.
        ignored: patterns of further names that may be there.

    Raises:
        ValueError: a tensor is missing, or one is there that the model does not have.
    """
    for name, one in wanted.items():
        if name not in found and (one.tied_to is None or one.tied_to not in found):
            raise ValueError(f"{folder} lacks {name}, a weight of the running target")
    for name in sorted(found.keys() - wanted.keys() - {*tied}):
        if not any(re.search(pattern, name) for pattern in ignored):
            raise ValueError(f"{folder}: {name} is not a weight of the running target")


def _as_json(value: Any) -> Any:
    """A value as JSON has it: lists for tuples."""
    return json.loads(json.dumps(value, default=str))
