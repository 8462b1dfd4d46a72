"""Rotary embeddings, for the drafters' own modules."""

from __future__ import annotations

import torch
from torch import Tensor

from specops.device import trained_rotation as rotate

__all__ = ["RotaryAngles", "rotate"]


class RotaryAngles:
    """cos and sin by position. Not a buffer of a module, because moving that to bfloat16 would
    round the angles."""

    def __init__(self, dim: int, theta: float) -> None:
        """
        Args:
            dim: D, how many elements of a head are rotated.
            theta: base of the frequencies.
        """
        self._dim, self._theta = dim, theta
        self._inverse: dict[torch.device, Tensor] = {}

    def at(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """cos and sin, each [..., 1, D] float32, for ``positions`` [...] int64."""
        angles = positions[..., None].float() * self.inverse_frequency(positions.device)
        angles = torch.cat((angles, angles), dim=-1)[..., None, :]
        return angles.cos(), angles.sin()

    def inverse_frequency(self, device: torch.device) -> Tensor:
        """[D / 2] float32, radians per position."""
        if device not in self._inverse:
            powers = -torch.arange(0, self._dim, 2, dtype=torch.float64) / self._dim
            self._inverse[device] = (self._theta**powers).float().to(device)
        return self._inverse[device]
