"""When the next candidate is judged."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(slots=True)
class Pace:
    """What happened since candidates were judged."""

    steps_since_judged: int = 0
    """Updates since the last candidate."""
    refused_in_row: int = 0
    """Candidates refused since the last published version."""
