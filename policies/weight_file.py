"""Small networks of policies as safetensors with the names of their inputs, read without trust.

Weights that were fitted to other inputs are refused, and so is whatever is too large, damaged or of
another kind. In the manifest of a bundle they stand in base64.
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from buffer.files import read_regular
from buffer.tensors import MAX_BUNDLE_HEADER_BYTES, TensorHeader, join_tensors, parse_header
from configs.choices import SettingsError

Weights = NDArray[np.float32]
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class WeightFile:
    """One kind of such files."""

    what: str
    """Its name in messages, with an article."""
    schema: str
    inputs: tuple[str, ...]
    """Names of the network's inputs."""
    max_bytes: int
    parts: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """Names of the inputs of further networks that a file may hold, by the name of each."""

    def to_bytes(
        self,
        weights: Mapping[str, Weights],
        about: Mapping[str, str] | None = None,
        parts: Mapping[str, Mapping[str, Weights]] | None = None,
    ) -> bytes:
        """A safetensors file.

        Args:
            weights: arrays by name.
            about: further entries of the file's metadata.
            parts: arrays of further networks.
        """
        tensors = {name: _stored(values) for name, values in weights.items()}
        facts = {"schema": self.schema, "features": ",".join(self.inputs)}
        for part, own in (parts or {}).items():
            tensors |= {f"{part}.{name}": _stored(values) for name, values in own.items()}
            facts[f"{part}_features"] = ",".join(self.parts[part])
        return join_tensors(tensors, {**(about or {}), **facts})

    def has(self, blob: bytes, part: str) -> bool:
        """Whether a file holds one of the further networks, or anything of it.

        Raises:
            ValueError: it is no such file.
        """
        header = self._header(blob)
        named = (name.startswith(f"{part}.") for name in header.tensors)
        return f"{part}_features" in header.metadata or any(named)

    def read(
        self, blob: bytes, names: tuple[str, ...], part: str | None = None
    ) -> dict[str, Weights]:
        """The tensors with these names; their shapes are for the caller to check.

        Args:
            part: of which of the further networks; ``None``: of the first one.

        Raises:
            ValueError: says what is wrong.
        """
        header = self._header(blob)
        key, prefix, inputs = "features", "", self.inputs
        if part is not None:
            key, prefix, inputs = f"{part}_features", f"{part}.", self.parts[part]
        if header.metadata.get(key) != ",".join(inputs):
            raise ValueError("it was fitted to other features than this server computes")
        if missing := {f"{prefix}{name}" for name in names} - header.tensors.keys():
            raise ValueError(f"it lacks {', '.join(sorted(missing))}")
        found: dict[str, Weights] = {}
        for name in names:
            info = header.tensors[f"{prefix}{name}"]
            if info.dtype != "F32":
                raise ValueError(f"{prefix}{name} must be F32, got {info.dtype}")
            values = np.frombuffer(blob[info.start : info.end], np.float32)
            found[name] = values.reshape(info.shape).copy()
        return found

    def _header(self, blob: bytes) -> TensorHeader:
        if len(blob) > self.max_bytes:
            raise ValueError(f"{self.what} has at most {self.max_bytes} bytes, got {len(blob)}")
        header = parse_header(blob, len(blob), MAX_BUNDLE_HEADER_BYTES)
        schema = header.metadata.get("schema")
        if schema != self.schema:
            raise ValueError(f"schema is {schema!r}, expected {self.schema!r}")
        return header

    def blob_of(self, text: Any) -> bytes:
        """What ``text_of`` wrote as text.

        Raises:
            ValueError: it is no such text.
        """
        if not isinstance(text, str):
            raise ValueError(f"{self.what} must be text, got {type(text).__name__}")
        try:
            return base64.b64decode(text, validate=True)
        except binascii.Error as error:
            raise ValueError(f"{self.what} must be base64: {error}") from None


def weights_of(
    setting: str, path: Path | None, from_bytes: Callable[[bytes], T], max_bytes: int, command: str
) -> T | None:
    """The network in the file that a setting names; ``None`` if it names none.

    Args:
        setting: its name, for the message.
        from_bytes: reads the file; raises ValueError.
        max_bytes: largest file of this kind.
        command: writes such a file, for the message.

    Raises:
        SettingsError: the file cannot be used.
    """
    if path is None:
        return None
    try:
        return from_bytes(read_regular(path, max_bytes + 1, follow=True))
    except (OSError, ValueError) as error:
        raise SettingsError(
            f"{setting}: {path} cannot be used: {error}; `{command}` writes such a file"
        ) from error


def _stored(values: Weights) -> tuple[str, Weights]:
    return "F32", np.ascontiguousarray(values, np.float32)


def text_of(blob: bytes) -> str:
    """A file in base64, for the manifest of a bundle."""
    return base64.b64encode(blob).decode()


def check_weights(weights: Any, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """
    Raises:
        ValueError: an array has another shape, or holds NaN or infinity.
    """
    for name, shape in shapes.items():
        values = getattr(weights, name)
        if values.shape != shape:
            raise ValueError(f"{name} must be F32 {list(shape)}, got {list(values.shape)}")
        if not np.isfinite(values).all():
            raise ValueError(f"{name} is not finite")
