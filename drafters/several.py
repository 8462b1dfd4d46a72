"""A run with several neural drafters: the settings of each, as if it were the only one.

Whatever is written for the drafter of ``drafter.kind`` (first weights, training, publishing) then
works for each of them unchanged. The first one that learns has the version line and the folders of
a run with one drafter; the others have their own, named after their kind.

This module imports no torch at run time.
"""

from __future__ import annotations

from configs.drafters import BesideSettings
from configs.schema import Settings
from drafters.catalog import chosen
from drafters.trainable import learning_kinds


def learning(settings: Settings) -> tuple[str, ...]:
    """Kinds of the drafters of a run that learn, the main one first.

    Raises:
        SettingsError: see ``drafters.catalog.chosen``.
    """
    learners = learning_kinds()
    return tuple(kind for kind in chosen(settings.drafter) if kind in learners)


def line_of(settings: Settings, kind: str) -> str:
    """Name of a drafter's version line in the weights store; empty for the first that learns."""
    return "" if kind == learning(settings)[0] else kind


def settings_of(settings: Settings, kind: str) -> Settings:
    """The settings of a run in which this is the only drafter that learns; unchanged for the first
    that learns and for drafters that do not."""
    if kind not in learning(settings)[1:]:
        return settings
    drafter = settings.drafter
    named = (one for one in drafter.beside if one.kind == kind)
    own = next(named, BesideSettings(kind=kind))
    alone = drafter.model_copy(update={**dict(own), "beside": (), "former": False})
    return settings.model_copy(update={"drafter": alone})
