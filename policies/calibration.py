"""What a bundle says of its version's acceptance, in ``Manifest.policy``.

Whoever publishes bundles writes it, so any of it may be malformed. A malformed figure is ignored as
a whole, and the policy starts as it does without it; ``problems`` names it, for whoever takes the
version.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple, Self

_BY_TEMPERATURE = "acceptance_by_temperature"


class Calibration(NamedTuple):
    """Conditional acceptance of draft positions 1, 2, ... on held-out traces. Lists are empty where
    nothing was published, or nothing that can be used."""

    acceptance: list[float]
    """Of the version,"""
    parent: int | None
    """of the version that it was trained from: its number,"""
    parent_acceptance: list[float]
    """and its acceptance on the same traces;"""
    by_temperature: dict[str, list[float]]
    """and of the version by class of temperature (``policies.groups``), by its number as text."""
    problems: tuple[str, ...]
    """A line for each figure that is malformed."""

    @classmethod
    def of(cls, given: Mapping[str, Any]) -> Self:
        """Read what was published; see ``DraftPolicy.on_swap``. Entries of other names are left to
        whoever knows them."""
        problems: list[str] = []

        def figures(name: str, value: object) -> list[float]:
            if value is None:
                return []
            found = probabilities(value)
            if found is None:
                problems.append(f"{name} must be a list of numbers from 0 to 1, got {value!r:.80}")
            return found or []

        parent = given.get("parent")
        if parent is not None and type(parent) is not int:
            problems.append(f"parent must be the number of a version, got {parent!r:.80}")
            parent = None
        by_temperature = given.get(_BY_TEMPERATURE)
        if not isinstance(by_temperature, Mapping):
            if by_temperature is not None:
                problems.append(f"{_BY_TEMPERATURE} must be an object, got {by_temperature!r:.80}")
            by_temperature = {}
        return cls(
            figures("acceptance", given.get("acceptance")),
            parent,
            figures("parent_acceptance", given.get("parent_acceptance")),
            {str(k): figures(f"{_BY_TEMPERATURE}.{k}", v) for k, v in by_temperature.items()},
            tuple(problems),
        )


def probabilities(value: object) -> list[float] | None:
    """Numbers from 0 to 1; ``None`` if this is no list of such numbers. True and false are none."""
    if not isinstance(value, list | tuple):
        return None
    if all(type(one) in (int, float) and 0 <= one <= 1 for one in value):
        return [float(one) for one in value]
    return None
