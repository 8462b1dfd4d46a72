"""Settings of a trainer that fits draft policies beside the drafter."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from configs.section import Section


class FittingSettings(Section):
    """Fits the network of a draft policy to recent traces, in a process of its own that yields to
    everything else, and publishes it with the drafter if it is better than the policy in force."""

    kind: Literal["auto", "ltd", "specdecpp", "none"] = "auto"
    """Policy whose network is fitted. ``auto``: that of ``policy.kind`` if it has one that is
    fitted to traces and does not come from a file, else none."""
    every_s: float = Field(60.0, gt=0)
    """Least seconds between the starts of two fits."""
    least_steps: int = Field(2000, ge=512)
    """Steps that the drafter must have drafted in the traces that are kept before a network is
    fitted; those of the newest version alone are used where they are as many."""
    most_steps: int = Field(20_000, ge=1024)
    """Newest steps of the traces that were read, which are kept in memory, without hidden rows, and
    fitted to."""
    held_out: float = Field(0.25, ge=0.05, le=0.5)
    """Share of the steps that judge the network and that it is not fitted to."""
    wait_s: float = Field(30.0, ge=0)
    """Seconds that a network which passed waits for the drafter's next version, to come with it. If
    none was published by then, or learning pauses, it is published with the weights in force."""
