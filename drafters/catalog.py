"""Every kind of drafter, one line each.

To add a kind, write one file whose ``KIND`` says what it is like and how it is built, and add its
line to ``CATALOG``; ``drafter.kind`` then selects it.
"""

from __future__ import annotations

import pkgutil

from configs.choices import known
from configs.schema import DrafterSettings
from drafters.protocol import DrafterKind

CATALOG = {
    "eagle3": "drafters.eagle3.paged:KIND",
    "suffix": "drafters.suffix:KIND",
}
"""Values of ``drafter.kind`` -> module and its ``DrafterKind``. Text, so that a kind is one line
without an import and only the modules in use are loaded."""

NONE = "none"
"""The value of ``drafter.kind`` for plain decoding."""
_BESIDE = "suffix"
"""The kind that runs beside another one if ``drafter.suffix.enabled``."""


def kind_of(name: str) -> DrafterKind:
    """What the catalog says about one kind."""
    kind: DrafterKind = pkgutil.resolve_name(CATALOG[name])
    return kind


def chosen(settings: DrafterSettings) -> tuple[str, ...]:
    """Kinds that a server with these settings runs, the main one first.

    Raises:
        SettingsError: ``drafter.kind`` is not in the catalog.
    """
    known("drafter.kind", settings.kind, (*CATALOG, NONE))
    if settings.kind == NONE:
        return ()
    has_beside = settings.suffix.enabled and settings.kind != _BESIDE
    return (settings.kind, _BESIDE) if has_beside else (settings.kind,)
