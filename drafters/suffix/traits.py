"""Traits of the suffix index: on the host, and on the device."""

from __future__ import annotations

from dataclasses import replace

from drafters.protocol import Traits
from drafters.suffix.kinds import NAMES, PRIOR_ACCEPTANCE

TRAITS = Traits(
    on_device=False,
    learns=False,
    needs_match=True,
    draws=False,
    shares_text=True,
    prior_acceptance=PRIOR_ACCEPTANCE,
    prior_draft_cost=0.005,
    match_kinds=NAMES,
)
REQUEST_TRAITS = replace(TRAITS, shares_text=False)
"""Of the index that searches each request alone."""

DEVICE_TRAITS = replace(
    TRAITS,
    on_device=True,
    needs_match=False,
    picks_itself=True,
    prior_acceptance=(0.4,),
    prior_draft_cost=0.01,
    match_kinds=(),
)
"""A request without a match has a draft, too, so there is one kind for all."""
DEVICE_REQUEST_TRAITS = replace(DEVICE_TRAITS, shares_text=False)
