"""Every trace that ever arrived is equally likely.

The samples that are not recent are a uniform sample of all older traces, so each stands for as many
as there were for each that is held.
"""

from __future__ import annotations

import math

import numpy as np

from configs.schema import TrainerSettings
from policies.draws.interface import Places, Pool, weighted_order


def draw(pool: Pool, settings: TrainerSettings, random: np.random.Generator) -> Places:
    """Recent samples weigh 1, older ones what they stand for."""
    num_held = len(pool) - int(pool.is_recent_N.sum())
    stands_for = pool.num_older / num_held if num_held else 1.0
    return weighted_order(np.where(pool.is_recent_N, 0.0, math.log(max(stands_for, 1.0))), random)
