"""Small networks that score every K, and every verification budget, evaluated on the host with
numpy: 6 µs each.

Two layers, tanh between them, and a shift and scale of the inputs. A policy has one network for the
draft length and may have a second one, its **size**, which scores shares of the batch's draft
tokens that can be verified, given the K that was chosen. Both are stored in one safetensors file
with the names of their inputs, so that weights fitted to other features are refused, and both
change in the same swap.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import numpy as np
from numpy.typing import NDArray

from policies.features import NAMES, NUM_FEATURES
from policies.weight_file import WeightFile, check_weights, text_of

Floats = NDArray[np.float32]

SCHEMA = "slipstream.policy.ltd"
SIZE_NAMES = (*NAMES, "draft_k", "saved_half")
"""Inputs of a size: the features, K by the largest K, and the time that verifying half of such a
draft saves, in plain steps."""
MAX_HIDDEN, MAX_ACTIONS, MAX_SHARES = 256, 17, 16
MAX_BYTES = 1 << 17
"""Of a file: the two largest networks have 80 KB."""
_SIZE = "size"
FILE = WeightFile("a policy", SCHEMA, NAMES, MAX_BYTES, {_SIZE: SIZE_NAMES})
LAYERS = ("mean", "scale", "w1", "b1", "w2", "b2")


@dataclass(frozen=True, slots=True)
class Layers:
    """Weights; float32. N inputs, H hidden units, A outputs."""

    mean: Floats
    """[N] subtracted from the inputs."""
    scale: Floats
    """[N] they are multiplied with this after it."""
    w1: Floats
    """[H, N]."""
    b1: Floats
    w2: Floats
    """[A, H]."""
    b2: Floats

    num_inputs: ClassVar[int]
    """N,"""
    most_outputs: ClassVar[int]
    """and the largest A."""

    def scores(self, inputs: list[float]) -> list[float]:
        """[A] score of every choice; the highest is the best."""
        x = (np.array(inputs, np.float32) - self.mean) * self.scale
        hidden = np.tanh(self.w1 @ x + self.b1)
        scores: list[float] = (self.w2 @ hidden + self.b2).tolist()
        return scores

    def best(self, inputs: list[float]) -> int:
        """The choice with the highest score."""
        scores = self.scores(inputs)
        return max(range(len(scores)), key=scores.__getitem__)

    def arrays(self) -> Mapping[str, Floats]:
        """By name."""
        return {name: getattr(self, name) for name in LAYERS}

    def checked(self) -> Self:
        """Itself.

        Raises:
            ValueError: the weights are too large, do not fit together or are not finite.
        """
        num, hidden, outputs = self.num_inputs, self.b1.size, self.b2.size
        if not 1 <= hidden <= MAX_HIDDEN or not 2 <= outputs <= self.most_outputs:
            raise ValueError(f"{hidden} hidden units and {outputs} actions are out of bounds")
        wanted = {
            "mean": (num,),
            "scale": (num,),
            "w1": (hidden, num),
            "b1": (hidden,),
            "w2": (outputs, hidden),
            "b2": (outputs,),
        }
        check_weights(self, wanted)
        return self


@dataclass(frozen=True, slots=True)
class Size(Layers):
    """Scores the shares 1 / A, 2 / A, ... 1 of a batch's draft tokens that are verified."""

    num_inputs = len(SIZE_NAMES)
    most_outputs = MAX_SHARES

    @property
    def num_shares(self) -> int:
        return len(self.b2)

    def best_each(self, inputs: list[list[float]]) -> list[int]:
        """Number of the share with the highest score for each of several inputs, in the time of
        two single ones."""
        x = (np.array(inputs, np.float32) - self.mean) * self.scale
        hidden = np.tanh(x @ self.w1.T + self.b1)
        found: list[int] = (hidden @ self.w2.T + self.b2).argmax(axis=1).tolist()
        return found


@dataclass(frozen=True, slots=True)
class Network(Layers):
    """Scores K = 0, 1, ... A - 1."""

    size: Size | None = None
    """``None``: all that is drafted is verified."""

    num_inputs = NUM_FEATURES
    most_outputs = MAX_ACTIONS

    @property
    def num_actions(self) -> int:
        """K + 1 for the largest K that it knows."""
        return len(self.b2)

    def to_bytes(self, about: dict[str, str] | None = None) -> bytes:
        """A safetensors file.

        Args:
            about: further entries of its metadata.
        """
        parts = {} if self.size is None else {_SIZE: self.size.arrays()}
        return FILE.to_bytes(self.arrays(), about, parts)

    def to_text(self) -> str:
        """The same in base64, for the manifest of a bundle."""
        return text_of(self.to_bytes())

    @classmethod
    def from_bytes(cls, blob: bytes) -> Self:
        """Read a file without trusting it. One whose size is damaged is damaged.

        Raises:
            ValueError: says what is wrong.
        """
        own = FILE.read(blob, LAYERS)
        size = None
        if FILE.has(blob, _SIZE):
            try:
                size = Size(**FILE.read(blob, LAYERS, _SIZE)).checked()
            except ValueError as error:
                raise ValueError(f"its size cannot be used: {error}") from None
        return cls(**own, size=size).checked()

    @classmethod
    def from_text(cls, text: Any) -> Self:
        """Read what ``to_text`` wrote.

        Raises:
            ValueError: says what is wrong.
        """
        return cls.from_bytes(FILE.blob_of(text))
