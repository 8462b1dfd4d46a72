"""The drafters that exist. A new one is one file and one line in ``CATALOG``."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from configs.schema import DrafterSettings
from drafters import suffix
from drafters.eagle3 import paged as eagle3
from drafters.protocol import DrafterContext, HostDrafter, NeuralDrafter, Traits, Weights

NONE = "none"
"""The kind that stands for plain decoding."""


@dataclass(frozen=True, slots=True)
class DrafterKind:
    """What the catalog knows of one kind."""

    traits: Traits
    build: Callable[[DrafterContext], HostDrafter | NeuralDrafter]
    layer_ids: Callable[[Weights | None], tuple[int, ...]] = lambda _weights: ()
    """Layers of the target that it reads, given the weights it begins with."""


CATALOG: dict[str, DrafterKind] = {
    "eagle3": DrafterKind(eagle3.TRAITS, eagle3.build, eagle3.layer_ids),
    "suffix": DrafterKind(suffix.TRAITS, suffix.build),
}


def chosen(settings: DrafterSettings) -> tuple[str, ...]:
    """Kinds that a server with these settings runs, the main one first.

    Raises:
        ValueError: ``drafter.kind`` is not in the catalog.
    """
    if settings.kind == NONE:
        return ()
    if settings.kind not in CATALOG:
        known = ", ".join((*CATALOG, NONE))
        raise ValueError(f"drafter.kind {settings.kind!r} is unknown; known: {known}")
    has_index = settings.suffix.enabled and settings.kind != suffix.SuffixIndex.kind
    return (settings.kind, suffix.SuffixIndex.kind) if has_index else (settings.kind,)
