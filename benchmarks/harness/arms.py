"""The drafters used by the arms of a benchmark, found by their traits."""

from __future__ import annotations

from drafters.catalog import CATALOG, kind_of

LEARNED = next(kind for kind in CATALOG if kind_of(kind).traits.learns)
"""Kind of the drafter that is trained on live traffic."""
LOOKUP = next(kind for kind in CATALOG if kind_of(kind).traits.needs_match)
"""Kind of the drafter that looks up matches in text, at no cost on the device."""
OFF = ("none", 0)
"""Plain decoding, as (drafter, K)."""
