"""Settings of drafters beside the main one: further neural ones, and the suffix index."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field

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


class SuffixSettings(Section):
    """Suffix drafter: an index over the request and recent traffic, without training."""

    enabled: bool = True
    """Offer the suffix index to the policy beside the drafter of ``drafter.kind``."""
    min_match: int = Field(2, ge=1)
    """Shortest suffix of the request to look up, in tokens."""
    max_match: int = Field(12, ge=1)
    """Longest suffix to look up, in tokens."""
    mixed: bool | None = None
    """Let the index draft for some requests of a step in which neural drafters draft for others: on
    the host as the policy picks, on the device where it is sure of its match. ``None``: where it
    looks on the device and the policy has no drafts cut."""
    place: Literal["auto", "host", "device"] = "auto"
    """Where it looks: ``device``: in a round's program, so that rounds need not wait for the host;
    ``host``: before a round is launched, by kinds of matches whose worth the policy learns;
    ``auto``: ``device`` on a GPU, ``host`` elsewhere."""
    recent_tokens: int = Field(400_000, ge=0)
    """Tokens of finished requests kept in the shared index. 0: index each request alone. On the
    device a round reads all of them for each request: 0.4 ms for 256 requests on an H200."""
