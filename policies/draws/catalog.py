"""The catalog of rules of drawing: name in ``trainer.draw`` -> function.

A new one is a file beside this one, with a ``DrawRule``, and one line here.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from pkgutil import resolve_name

from configs.choices import known
from policies.draws.interface import DrawRule


@dataclass(frozen=True, slots=True)
class Entry:
    """One rule."""

    rule: str
    """Module and name."""
    needs_surprise: bool = False
    """It reads ``Pool.surprise_N``, which is NaN otherwise: it costs 0.1 ms a trace."""


CATALOG: dict[str, Entry] = {
    "turns": Entry("policies.draws.turns:draw"),
    "uniform": Entry("policies.draws.uniform:draw"),
    "recency": Entry("policies.draws.recency:draw"),
    "reservoir": Entry("policies.draws.reservoir:draw"),
    "tenants": Entry("policies.draws.strata:draw_tenants"),
    "domains": Entry("policies.draws.strata:draw_domains"),
    "surprise": Entry("policies.draws.surprise:draw", needs_surprise=True),
}


def entry(name: str) -> Entry:
    """The entry of this name.

    Raises:
        SettingsError: there is none.
    """
    known("trainer.draw", name, CATALOG)
    return CATALOG[name]


@cache
def draw_rule(name: str) -> DrawRule:
    """The rule of this name.

    Raises:
        SettingsError: the catalog does not hold it.
    """
    rule: DrawRule = resolve_name(entry(name).rule)
    return rule
