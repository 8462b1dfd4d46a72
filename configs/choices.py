"""Names that a catalog defines and a setting chooses from, such as ``drafter.kind``.

The schema takes any text for them, because a new drafter or policy is one file and one line in its
catalog. The catalog checks the name when the command starts, with ``known``.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class SettingsError(ValueError):
    """Settings that are unknown, of the wrong type or contradictory, with one line for each."""


def known(key: str, name: str, names: Iterable[str]) -> None:
    """Check that a catalog holds the name that a setting gives.

    Args:
        key: dotted key of the setting, for the message.
        name: its value.
        names: all names that the catalog holds.

    Raises:
        SettingsError: the catalog does not hold ``name``. The message lists the names it holds and
            the nearest of them. The commands print it and exit with code 2.
    """
    choices = sorted(names)
    if name in choices:
        return
    close = difflib.get_close_matches(name, choices, n=1)
    hint = f"; did you mean {close[0]!r}?" if close else ""
    raise SettingsError(f"{key} {name!r} is unknown; known: {', '.join(choices)}{hint}")
