"""Every sample held is equally likely, however often it was trained on."""

from __future__ import annotations

import numpy as np

from configs.schema import TrainerSettings
from policies.draws.interface import Places, Pool


def draw(pool: Pool, settings: TrainerSettings, random: np.random.Generator) -> Places:
    """A random order."""
    return random.permutation(len(pool))
