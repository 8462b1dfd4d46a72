"""Settings of drafters beside the main one, entries of ``drafter.beside``."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from configs.section import Section


class BesideSettings(Section):
    """A further neural drafter in the same server. Each key means what the key of that name in the
    section ``drafter`` means for ``drafter.kind``."""

    kind: str
    """A name in the catalog of drafters, of a neural drafter that is not named otherwise."""
    path: Path | None = None
    model: str | None = None
    init: Literal["auto", "random", "target"] = "auto"
    draft_vocab: Path | None = None
    layer_ids: tuple[int, ...] | None = None
