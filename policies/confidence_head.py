"""The head of SpecDec++: a small network that predicts whether a draft token will be kept, from
what is known before it is drawn.

The paper's head reads the drafter's hidden state; this one reads the figures that traces keep (top
probability, entropy, lead, position, temperature), so that it can be fitted by ``trainer policy``
without running the drafter again, and works for every drafter. It is stored as safetensors with the
names of its inputs, and read without trust.

Source: Huang et al. 2024, arXiv:2405.19715.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from policies.weight_file import WeightFile, Weights, check_weights, text_of

Floats = NDArray[np.float64]

SCHEMA = "slipstream.policy.head"
NAMES = ("log_top", "entropy", "margin", "place", "temperature")
"""Inputs, as ``specops.allocation.head_inputs`` computes them."""
HIDDEN = 16
"""Units of the hidden layer; fixed, because the device's programs hold it."""
MAX_BYTES = 1 << 15
FILE = WeightFile("a head", SCHEMA, NAMES, MAX_BYTES)
_LEAST_TOP = 1e-6


def inputs_of(figures_RK3: Floats, temperature_R: Floats) -> Floats:
    """[R, K, 5] inputs of the head."""
    top, entropy, margin = (figures_RK3[..., i] for i in range(3))
    place = np.broadcast_to(np.arange(top.shape[1], dtype=np.float64), top.shape)
    warmth = np.broadcast_to(np.asarray(temperature_R)[:, None], top.shape)
    log_top = np.log(np.maximum(top, _LEAST_TOP))
    return np.stack((log_top, entropy, margin, place, warmth), axis=-1)


@dataclass(frozen=True, slots=True, eq=False)
class Head:
    """Weights; float32."""

    mean: Weights
    """[5] subtracted from the inputs."""
    scale: Weights
    """[5] they are multiplied with this after it."""
    w1: Weights
    """[16, 5]."""
    b1: Weights
    """[16]."""
    w2: Weights
    """[16]."""
    b2: Weights
    """[1]."""

    def scores(self, figures_RK3: Floats, temperature_R: Floats) -> Floats:
        """[R, K] probability that a position is kept if all before it are."""
        x = (inputs_of(figures_RK3, temperature_R) - self.mean) * self.scale
        logits = np.tanh(x @ self.w1.T + self.b1) @ self.w2 + self.b2
        found: Floats = 1 / (1 + np.exp(-logits))
        return found

    def to_bytes(self, about: dict[str, str] | None = None) -> bytes:
        """A safetensors file.

        Args:
            about: further entries of its metadata.
        """
        return FILE.to_bytes({name: getattr(self, name) for name in self.__slots__}, about)

    def to_text(self) -> str:
        """The same in base64, for the manifest of a bundle."""
        return text_of(self.to_bytes())

    @classmethod
    def from_bytes(cls, blob: bytes) -> Self:
        """Read a file without trusting it.

        Raises:
            ValueError: says what is wrong.
        """
        found = cls(**FILE.read(blob, cls.__slots__))
        check_weights(found, _SHAPES)
        return found

    @classmethod
    def from_text(cls, text: Any) -> Self:
        """Read what ``to_text`` wrote.

        Raises:
            ValueError: says what is wrong.
        """
        return cls.from_bytes(FILE.blob_of(text))


_SHAPES: dict[str, tuple[int, ...]] = {
    "mean": (len(NAMES),),
    "scale": (len(NAMES),),
    "w1": (HIDDEN, len(NAMES)),
    "b1": (HIDDEN,),
    "w2": (HIDDEN,),
    "b2": (1,),
}


NO_HEAD = Head(**{name: np.zeros(shape, np.float32) for name, shape in _SHAPES.items()})
"""Says the same of every position: for steps whose drafts are not cut."""
