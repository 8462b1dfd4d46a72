"""What a trainer reports to Weights & Biases and TensorBoard: the events of its journal, without
names of traces, tenants and domains."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from reporting.names import FIRST, of_drafter
from reporting.reports import Reports


class Reporter:
    """Hears the journal (``trainer.journal.Journal``)."""

    def __init__(self, reports: Reports, weights: Path, every_s: float, drafter: str = "") -> None:
        """
        Args:
            weights: folder of the versions, if they are in folders.
            every_s: least seconds between two reports of updates, and of the status.
            drafter: kind of the drafter that is trained; empty for the first of the run.
        """
        self._reports = reports
        self._weights = weights
        self._every_s = every_s
        self._drafter = drafter
        self._status_s = self._updates_s = -every_s
        self._updates: list[Mapping[str, Any]] = []
        """``update`` events that were not reported yet."""

    def hear(self, name: str, values: Mapping[str, Any]) -> None:
        """Report an event or a status; others are passed over."""
        match name:
            case "update":
                self._updates.append(values)
                self._tell_updates(is_last=False)
            case "gate":
                self._gate(values)
            case "published":
                self._published(values)
            case "policy_gate":
                self._policy(values)
            case "policy_published":
                self._published(values)
            case "status":
                self._tell_updates(is_last=_is_last(values))
                self._status(values)
            case "drift":
                self._reports.alert(
                    "Acceptance has fallen",
                    f"Version {values['version']}{self._of} accepts less on live traffic than it "
                    f"did",
                )
            case "rolled_back":
                self._reports.alert(
                    "A version was rolled back",
                    f"Version {values['rejected']}{self._of}; learning goes on from "
                    f"{values['version']}",
                )

    @property
    def _of(self) -> str:
        """Whose version, for texts."""
        return f" of {self._drafter}" if self._drafter else ""

    def _figures(self, values: Mapping[str, float | None]) -> None:
        self._reports.figures(of_drafter(self._drafter, values))

    def _tell_updates(self, *, is_last: bool) -> None:
        """Report the updates since the last report, if that is due: events come twice a second, and
        a writer takes milliseconds for each."""
        now_s = time.monotonic()
        if self._updates and (is_last or now_s - self._updates_s >= self._every_s):
            self._figures(of_updates(self._updates))
            self._updates, self._updates_s = [], now_s

    def _gate(self, values: Mapping[str, Any]) -> None:
        unit = values["speeds"] or values
        figures = {
            "gate/candidate": unit["candidate"],
            "gate/incumbent": unit["incumbent"],
            "gate/gain_error": values["gain_error"],
            "gate/passed": float(values["passed"]),
        }
        self._figures(figures | self._domains(values))
        cells = ("step", "parent", "passed", "candidate", "incumbent", "gain_error", "num_traces")
        row = {name: values[name] for name in cells} | {"why": values["kind"]}
        row["drafter"] = self._drafter or FIRST
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

    def _policy(self, values: Mapping[str, Any]) -> None:
        self._figures(
            {
                "policy/gain": values["gain"],
                "policy/gain_at_least": values["at_least"],
                "policy/passed": float(values["passed"]),
                "policy/fit_s": values["seconds"],
            }
        )
        cells = ("kind", "passed", "gain", "at_least", "steps", "judged_by", "newest", "version")
        row = {name: values[name] for name in cells} | {"why": values["text"]}
        row["drafter"] = self._drafter or FIRST
        self._reports.row("events/policy", row)

    def _published(self, values: Mapping[str, Any]) -> None:
        version = values["version"]
        self._figures({"trainer/version": version})
        folder = self._weights / str(version)
        if folder.is_dir():
            facts = {"parent": values["parent"], "step": values["step"]}
            self._reports.bundle(version, folder, facts, self._drafter)

    def _status(self, values: Mapping[str, Any]) -> None:
        if "payback" not in values:
            return  # it failed before its first status
        now_s = time.monotonic()
        if now_s - self._status_s < self._every_s and not _is_last(values):
            return
        self._status_s = now_s
        parts = {f"trainer/time_{part}": share for part, share in values.get("time", {}).items()}
        payback = {f"payback/{name}": value for name, value in values["payback"].items()}
        self._figures(
            {
                "trainer/step": values["step"],
                "trainer/skipped": values["skipped"],
                "trainer/version": values["version"],
                "trainer/drift": values["drift"]["level"],
                **parts,
                **payback,
            }
        )


def _is_last(status: Mapping[str, Any]) -> bool:
    """The trainer ends with this status."""
    state = str(status["state"])
    return state == "stopped" or state.startswith("failed")


def of_updates(events: Sequence[Mapping[str, Any]]) -> dict[str, float | None]:
    """The figures of ``update`` events, at least one: means over their updates, of learning rate
    and staleness the newest."""
    newest, seconds = events[-1], sum(one["seconds"] for one in events)
    positions = range(max(len(one["alpha"]) for one in events))
    alpha = {
        f"trainer/alpha_{at + 1}": _mean(
            [(one["alpha"][at], one["updates"]) for one in events if at < len(one["alpha"])]
        )
        for at in positions
    }
    return {
        **{
            f"trainer/{name}": _mean([(one[name], one["updates"]) for one in events])
            for name in ("loss", "grad_norm")
        },
        "trainer/rows_per_s": sum(one["rows"] for one in events) / seconds if seconds else None,
        "trainer/lr": newest["lr"],
        "trainer/staleness": newest["staleness"],
        **alpha,
    }


def _mean(pairs: Sequence[tuple[float | None, int]]) -> float | None:
    """Mean of the values that are known and finite, by their weights."""
    known = [(value, num) for value, num in pairs if value is not None and math.isfinite(value)]
    total = sum(num for _, num in known)
    return sum(value * num for value, num in known) / total if total else None
