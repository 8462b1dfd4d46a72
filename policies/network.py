"""A small network that scores every K, evaluated on the host with numpy: 6 µs.

Two layers, tanh between them, and a shift and scale of the inputs. It is stored as safetensors with
the names of its inputs, so that weights fitted to other features are refused.
"""

from __future__ import annotations

import base64
import binascii
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from buffer.tensors import MAX_BUNDLE_HEADER_BYTES, join_tensors, parse_header
from policies.features import NAMES, NUM_FEATURES

Floats = NDArray[np.float32]

SCHEMA = "slipstream.policy.ltd"
MAX_HIDDEN, MAX_ACTIONS = 256, 17
MAX_BYTES = 1 << 17
"""Of a file: the largest network has 90 KB."""


@dataclass(frozen=True, slots=True)
class Network:
    """Weights; float32. H hidden units, A actions (K = 0, 1, ... A - 1)."""

    mean: Floats
    """[NUM_FEATURES] subtracted from the inputs."""
    scale: Floats
    """[NUM_FEATURES] they are multiplied with this after it."""
    w1: Floats
    """[H, NUM_FEATURES]."""
    b1: Floats
    w2: Floats
    """[A, H]."""
    b2: Floats

    @property
    def num_actions(self) -> int:
        """K + 1 for the largest K that it knows."""
        return len(self.b2)

    def scores(self, features: list[float]) -> list[float]:
        """[A] score of every K; the highest is the best."""
        x = (np.array(features, np.float32) - self.mean) * self.scale
        hidden = np.tanh(self.w1 @ x + self.b1)
        scores: list[float] = (self.w2 @ hidden + self.b2).tolist()
        return scores

    def to_bytes(self, about: dict[str, str] | None = None) -> bytes:
        """A safetensors file.

        Args:
            about: further entries of its metadata.
        """
        tensors = {
            name: ("F32", np.ascontiguousarray(getattr(self, name), np.float32))
            for name in self.__slots__
        }
        facts = {"schema": SCHEMA, "features": ",".join(NAMES)}
        return join_tensors(tensors, {**(about or {}), **facts})

    def to_text(self) -> str:
        """The same in base64, for the manifest of a bundle."""
        return base64.b64encode(self.to_bytes()).decode()

    @classmethod
    def from_bytes(cls, blob: bytes) -> Self:
        """Read a file without trusting it.

        Raises:
            ValueError: says what is wrong.
        """
        if len(blob) > MAX_BYTES:
            raise ValueError(f"a policy has at most {MAX_BYTES} bytes, got {len(blob)}")
        header = parse_header(blob, len(blob), MAX_BUNDLE_HEADER_BYTES)
        schema, features = (header.metadata.get(key) for key in ("schema", "features"))
        if schema != SCHEMA:
            raise ValueError(f"schema is {schema!r}, expected {SCHEMA!r}")
        if features != ",".join(NAMES):
            raise ValueError("it was fitted to other features than this server computes")
        missing = set(cls.__slots__) - header.tensors.keys()
        if missing:
            raise ValueError(f"it lacks {', '.join(sorted(missing))}")
        found: dict[str, Floats] = {}
        for name in cls.__slots__:
            info = header.tensors[name]
            if info.dtype != "F32":
                raise ValueError(f"{name} must be F32, got {info.dtype}")
            values = np.frombuffer(blob[info.start : info.end], np.float32)
            found[name] = values.reshape(info.shape).copy()
        return cls(**found)._checked()

    @classmethod
    def from_text(cls, text: Any) -> Self:
        """Read what ``to_text`` wrote.

        Raises:
            ValueError: says what is wrong.
        """
        if not isinstance(text, str):
            raise ValueError(f"a policy must be text, got {type(text).__name__}")
        try:
            blob = base64.b64decode(text, validate=True)
        except binascii.Error as error:
            raise ValueError(f"a policy must be base64: {error}") from None
        return cls.from_bytes(blob)

    def _checked(self) -> Self:
        hidden, actions = self.b1.size, self.b2.size
        if not 1 <= hidden <= MAX_HIDDEN or not 2 <= actions <= MAX_ACTIONS:
            raise ValueError(f"{hidden} hidden units and {actions} actions are out of bounds")
        wanted = {
            "mean": (NUM_FEATURES,),
            "scale": (NUM_FEATURES,),
            "w1": (hidden, NUM_FEATURES),
            "b1": (hidden,),
            "w2": (actions, hidden),
            "b2": (actions,),
        }
        for name, shape in wanted.items():
            values = getattr(self, name)
            if values.shape != shape:
                raise ValueError(f"{name} must be {list(shape)}, got {list(values.shape)}")
            if not np.isfinite(values).all():
                raise ValueError(f"{name} is not finite")
        return self
