"""A small network that scores every K, evaluated on the host with numpy: 6 µs.

Two layers, tanh between them, and a shift and scale of the inputs. It is stored as safetensors with
the names of its inputs, so that weights fitted to other features are refused.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from policies.features import NAMES, NUM_FEATURES
from policies.weight_file import WeightFile, check_weights, text_of

Floats = NDArray[np.float32]

SCHEMA = "slipstream.policy.ltd"
MAX_HIDDEN, MAX_ACTIONS = 256, 17
MAX_BYTES = 1 << 17
"""Of a file: the largest network has 90 KB."""
FILE = WeightFile("a policy", SCHEMA, NAMES, MAX_BYTES)


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
        return FILE.to_bytes(self, about)

    def to_text(self) -> str:
        """The same in base64, for the manifest of a bundle."""
        return text_of(self.to_bytes())

    @classmethod
    def from_bytes(cls, blob: bytes) -> Self:
        """Read a file without trusting it.

        Raises:
            ValueError: says what is wrong.
        """
        return cls(**FILE.read(blob, cls.__slots__))._checked()

    @classmethod
    def from_text(cls, text: Any) -> Self:
        """Read what ``to_text`` wrote.

        Raises:
            ValueError: says what is wrong.
        """
        return cls.from_bytes(FILE.blob_of(text))

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
        check_weights(self, wanted)
        return self
