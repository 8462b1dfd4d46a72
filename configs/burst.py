"""Settings of a trainer that takes more of a shared device at once when learning is urgent."""

from __future__ import annotations

from pydantic import Field

from configs.section import Section


class BurstSettings(Section):
    """With ``trainer.duty: auto``: after the first start, and when acceptance has fallen, the
    trainer may cost serving more than ``trainer.max_serving_loss`` for a while. It rests more
    before and after, so that this holds on average."""

    serving_loss: float | None = Field(None, gt=0, lt=1)
    """Share of its speed that a server may lose at any moment of a burst. ``None``: there are no
    bursts, and ``trainer.max_serving_loss`` holds all the time."""
    window_s: float = Field(600.0, gt=0)
    """Seconds in which requests decode over which ``trainer.max_serving_loss`` holds."""
