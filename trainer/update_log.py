"""What the journal and the status tell of updates: one event of all those of half a second, and
where the time went."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from trainer.figures import UpdateReport
from trainer.rows import HeldSample
from trainer.times import Times

EVENT_EVERY_S = 0.5


@dataclass(slots=True)
class UpdateLog:
    """Reports and drawn samples since the last event."""

    reports: list[UpdateReport] = field(default_factory=list)
    num_traces: int = 0
    versions: list[int] = field(default_factory=list)
    """Of the drafters that proposed in the drawn samples."""
    busy_s: float = 0.0
    """Time that the updates took, without waiting for traces."""
    began_s: float = field(default_factory=time.monotonic)
    times: Times = field(default_factory=Times)
    latest: dict[str, Any] = field(default_factory=dict)
    """Latest loss, alpha and gate figures, for the status."""

    def drew(self, samples: Sequence[HeldSample]) -> None:
        """Count the samples of a batch."""
        self.num_traces += len(samples)
        self.versions += [x.version for x in samples if x.version is not None]

    def add(self, report: UpdateReport) -> None:
        """Count an update whose figures have arrived."""
        self.reports.append(report)

    def worked(self, seconds: float) -> None:
        """Count time that went into updates."""
        self.busy_s += seconds

    def is_due(self) -> bool:
        """There are updates to tell of, and the last event is long enough ago."""
        return bool(self.reports) and time.monotonic() - self.began_s >= EVENT_EVERY_S

    def taken(self, version: int) -> dict[str, Any]:
        """Values of an ``update`` event, empty without updates; begins anew.

        ``rows``, ``traces`` and ``skipped`` are sums over ``updates`` updates, ``loss``, ``alpha``
        and ``agree`` means over those that were not skipped, the others the newest. ``seconds`` is
        the time that the updates took.

        Args:
            version: the newest published one, for ``staleness``.
        """
        reports = self.reports
        if not reports:
            return {}
        sound = [r for r in reports if not r.skipped] or reports
        made = self.versions
        values = {
            "step": reports[-1].step,
            "updates": len(reports),
            "loss": sum(r.loss for r in sound) / len(sound),
            "alpha": _means([r.alpha for r in sound]),
            "agree": _means([r.agree for r in sound]),
            "rows": sum(r.num_rows for r in reports),
            "traces": self.num_traces,
            "grad_norm": reports[-1].grad_norm,
            "lr": reports[-1].lr,
            "skipped": sum(r.skipped for r in reports),
            "seconds": self.busy_s,
            "staleness": version - sum(made) / len(made) if made else None,
            "staleness_max": version - min(made) if made else None,
        }
        self.reports, self.num_traces, self.versions = [], 0, []
        self.busy_s, self.began_s = 0.0, time.monotonic()
        return values


def _means(rows: Sequence[Sequence[float]]) -> list[float]:
    return [sum(column) / len(rows) for column in zip(*rows, strict=True)]
