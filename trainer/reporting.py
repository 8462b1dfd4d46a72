"""What a trainer reports to Weights & Biases and TensorBoard: the events of its journal, without
names of traces, tenants and domains."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from reporting.reports import Reports


class Reporter:
    """Hears the journal (``trainer.journal.Journal``)."""

    def __init__(self, reports: Reports, weights: Path, every_s: float) -> None:
        """
        Args:
            weights: folder of the versions, if they are in folders.
            every_s: least seconds between two reports of the status.
        """
        self._reports = reports
        self._weights = weights
        self._every_s = every_s
        self._status_s = -every_s

    def hear(self, name: str, values: Mapping[str, Any]) -> None:
        """Report an event or a status; others are passed over."""
        match name:
            case "update":
                self._reports.figures(of_update(values))
            case "gate":
                self._gate(values)
            case "published":
                self._published(values)
            case "status":
                self._status(values)
            case "drift":
                self._reports.alert(
                    "Acceptance has fallen",
                    f"Version {values['version']} accepts less on live traffic than it did",
                )
            case "rolled_back":
                self._reports.alert(
                    "A version was rolled back",
                    f"Version {values['rejected']}; learning goes on from {values['version']}",
                )

    def _gate(self, values: Mapping[str, Any]) -> None:
        unit = values["speeds"] or values
        figures = {
            "gate/candidate": unit["candidate"],
            "gate/incumbent": unit["incumbent"],
            "gate/gain_error": values["gain_error"],
            "gate/passed": float(values["passed"]),
        }
        self._reports.figures(figures | self._domains(values))
        cells = ("step", "parent", "passed", "candidate", "incumbent", "gain_error", "num_traces")
        row = {name: values[name] for name in cells} | {"why": values["kind"]}
        row["speedup"] = None if values["speeds"] is None else values["speeds"]["candidate"]
        self._reports.row("events/gate", row)

    def _domains(self, values: Mapping[str, Any]) -> dict[str, float | None]:
        """Speeds of the version in force after the judgement, by the domains that may be named."""
        which = "candidate" if values["passed"] else "incumbent"
        sums: dict[str, list[tuple[float, float | None, int]]] = {}
        for name, one in values["domains"].items():
            row = (one[which], one["static"], one["num_traces"])
            sums.setdefault(self._reports.domain(name), []).append(row)
        figures: dict[str, float | None] = {}
        for name, rows in sums.items():
            if values["speeds"] is not None:  # else they are tokens_per_step
                pairs = [(speed, num) for speed, _, num in rows]
                figures[f"domain/{name}/speedup_over_plain"] = _mean(pairs)
            pairs = [(speed / static, num) for speed, static, num in rows if static]
            figures[f"domain/{name}/speedup_over_static"] = _mean(pairs)
        return figures

    def _published(self, values: Mapping[str, Any]) -> None:
        version = values["version"]
        self._reports.figures({"trainer/version": version})
        folder = self._weights / str(version)
        if folder.is_dir():
            facts = {"parent": values["parent"], "step": values["step"]}
            self._reports.bundle(version, folder, facts)

    def _status(self, values: Mapping[str, Any]) -> None:
        if "payback" not in values:
            return  # it failed before its first status
        now_s = time.monotonic()
        if now_s - self._status_s < self._every_s and values["state"] != "stopped":
            return
        self._status_s = now_s
        payback = {f"payback/{name}": value for name, value in values["payback"].items()}
        self._reports.figures(
            {
                "trainer/step": values["step"],
                "trainer/skipped": values["skipped"],
                "trainer/version": values["version"],
                "trainer/drift": values["drift"]["level"],
                **payback,
            }
        )


def of_update(values: Mapping[str, Any]) -> dict[str, float | None]:
    """The figures of an ``update`` event."""
    alpha = {f"trainer/alpha_{at}": value for at, value in enumerate(values["alpha"], start=1)}
    return {
        "trainer/loss": values["loss"],
        "trainer/rows_per_s": values["rows"] / values["seconds"] if values["seconds"] else None,
        "trainer/grad_norm": values["grad_norm"],
        "trainer/lr": values["lr"],
        "trainer/staleness": values["staleness"],
        **alpha,
    }


def _mean(pairs: list[tuple[float, int]]) -> float | None:
    total = sum(weight for _, weight in pairs)
    return sum(value * weight for value, weight in pairs) / total if total else None
