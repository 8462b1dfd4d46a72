"""What is reported. Numbers, and names that we chose: no text of a request is in any of it."""

from __future__ import annotations

from collections.abc import Mapping

import msgspec

Cell = str | int | float | bool | None


class Figures(msgspec.Struct, frozen=True, tag=True):
    """Figures of one moment."""

    unix_s: float
    """When they were taken, whenever they are written."""
    values: dict[str, float]
    """By name, see ``reporting.names``."""


class Row(msgspec.Struct, frozen=True, tag=True):
    """One row of a table."""

    unix_s: float
    table: str
    """A table of ``reporting.names``."""
    cells: dict[str, Cell]


class Alert(msgspec.Struct, frozen=True, tag=True):
    """Something that somebody should look at."""

    unix_s: float
    title: str
    text: str


class Bundle(msgspec.Struct, frozen=True, tag=True):
    """A published version of the drafter."""

    unix_s: float
    version: int
    folder: str
    """With all files of the version."""
    facts: dict[str, Cell]
    drafter: str = ""
    """Kind of the drafter; empty for the first of the run."""


Record = Figures | Row | Alert | Bundle


class Greeting(msgspec.Struct, frozen=True):
    """What a writer is told once, before the first record."""

    writer: str
    """Name in the catalog."""
    role: str
    """``server`` or ``trainer``."""
    group: str
    """Name that the server and the trainer of one run share."""
    folder: str
    """Of the run; a writer that keeps files keeps them there."""
    settings: dict[str, object]
    """The writer's section of the settings."""
    facts: dict[str, object]
    """Settings of the run that may be shown, see ``shown``."""


def shown(settings: Mapping[str, object]) -> dict[str, object]:
    """Those of a run's settings that say how it drafts and learns, without keys, addresses, paths
    and names of tenants.

    Args:
        settings: all settings, as JSON.
    """
    found: dict[str, object] = {}
    for section, hidden in _SHOWN.items():
        values = settings.get(section)
        if isinstance(values, dict):
            values = {name: value for name, value in values.items() if name not in hidden}
        if values is not None:
            found[section] = values
    return found


_SHOWN: dict[str, frozenset[str]] = {
    "device": frozenset(),
    "dtype": frozenset(),
    "seed": frozenset(),
    "engine": frozenset(),
    "drafter": frozenset({"path", "draft_vocab"}),
    "policy": frozenset(),
    "swap": frozenset({"public_key"}),
    "trainer": frozenset({"signing_key", "group"}),
}
"""Sections that are shown, and what is left out of each."""
