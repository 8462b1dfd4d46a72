"""Every tenant, or every domain, is equally likely, however much traffic it has."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from configs.schema import TrainerSettings
from policies.draws.interface import Places, Pool, weighted_order


def draw_tenants(pool: Pool, settings: TrainerSettings, random: np.random.Generator) -> Places:
    """A tenant's samples share one weight equally."""
    return _even(pool.tenant_N, random)


def draw_domains(pool: Pool, settings: TrainerSettings, random: np.random.Generator) -> Places:
    """A domain's samples share one weight equally."""
    return _even(pool.domain_N, random)


def _even(stratum_N: NDArray[Any], random: np.random.Generator) -> Places:
    sizes = np.bincount(stratum_N)
    return weighted_order(-np.log(sizes[stratum_N]), random)
