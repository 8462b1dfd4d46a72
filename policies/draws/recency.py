"""Newer samples are more likely: for traffic that drifts."""

from __future__ import annotations

import math

import numpy as np

from configs.schema import TrainerSettings
from policies.draws.interface import Places, Pool, weighted_order


def draw(pool: Pool, settings: TrainerSettings, random: np.random.Generator) -> Places:
    """The weight of a sample halves with every ``draw_half_life_traces`` that arrived after it.

    Age is counted in traces, not by their own clocks: one with a time far in the future would put
    all others out of the draw.
    """
    return weighted_order(-pool.age_N * (math.log(2) / settings.draw_half_life_traces), random)
