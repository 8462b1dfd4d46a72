"""Probabilities in log-odds, in which what is hard is harder at every depth by the same amount."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray


def log_odds(hazard: float) -> float:
    """Log-odds of a probability, kept away from certainty."""
    inside = min(max(hazard, 1e-3), 1 - 1e-3)
    return math.log(inside / (1 - inside))


def shifted(
    hazards: NDArray[np.float64], shift: float | NDArray[np.float64]
) -> NDArray[np.float64]:
    """Probabilities moved in log-odds, by values that can be broadcast; those of 0 and 1 stay."""
    factor = np.exp(shift)
    moved: NDArray[np.float64] = factor * hazards / (1 + (factor - 1) * hazards)
    return moved
