"""The gate before publication: a candidate must beat the incumbent and forget nothing."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class GateVerdict:
    """The decision and, for logs and the manifest, its reason with figures."""

    passed: bool
    reason: str


def gate(
    candidate: float,
    incumbent: float,
    margin: float,
    num_rows: int,
    older: tuple[float, float] | None = None,
    keep: float = 0.94,
) -> GateVerdict:
    """Compare simulated tokens_per_step on held-out traces.

    Args:
        candidate: tokens_per_step of the new weights.
        incumbent: tokens_per_step of the last published version on the same rows.
        margin: required ratio candidate / incumbent, e.g. 1.005.
        num_rows: held-out rows behind both figures; with none, nothing passes.
        older: both figures on held-out traces of earlier traffic, if there are any.
        keep: required ratio of the older figures, so that earlier traffic is not forgotten. Nor may
            the loss there exceed the gain on the newest traces: the product of both ratios never
            falls, and small losses cannot add up.
    """
    if num_rows < 1:
        return GateVerdict(False, "no held-out rows to judge on")
    if not math.isfinite(candidate) or not math.isfinite(incumbent):
        return GateVerdict(False, f"not finite: candidate {candidate}, incumbent {incumbent}")
    figures = f"candidate {candidate:.4f}, incumbent {incumbent:.4f}, {num_rows} rows"
    wanted = margin * incumbent
    if candidate < wanted:
        return GateVerdict(False, f"below {wanted:.4f} = {margin:g} x incumbent: {figures}")
    if older is not None:
        least = max(keep, min(1.0, incumbent / candidate))
        if not older[0] >= least * older[1]:
            return GateVerdict(
                False,
                f"forgets earlier traffic: candidate {older[0]:.4f} there, below {least:.4g} x "
                f"incumbent {older[1]:.4f}",
            )
    return GateVerdict(True, f"at least {wanted:.4f} = {margin:g} x incumbent: {figures}")
