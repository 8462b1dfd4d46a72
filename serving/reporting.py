"""What a server reports to Weights & Biases and TensorBoard, every ``reports.every_s`` seconds.

A thread of its own takes the differences of ``EngineFigures`` and gives them to ``reporting``,
which never waits; the engine's thread is not involved.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from configs.logs import Outage
from configs.schema import Settings
from reporting.names import FIRST, of_drafter
from reporting.records import Cell
from reporting.reports import Reports, reports_of
from serving.periodic import Window
from serving.requests import EngineFigures
from serving.service import Service

log = logging.getLogger(__name__)


@contextmanager
def reported(service: Service, settings: Settings) -> Iterator[Reports]:
    """Report on a running service until the block ends; nothing, unless a writer is asked for."""
    with reports_of(settings, "server") as reports:
        if not reports.is_on:
            yield reports
            return
        stopping = threading.Event()
        reporter = Reporter(service, reports)
        thread = threading.Thread(
            target=_run,
            args=(reporter, settings.reports.every_s, stopping),
            name="reporter",
            daemon=True,
        )
        thread.start()
        try:
            yield reports
        finally:
            stopping.set()
            thread.join()


def _run(reporter: Reporter, every_s: float, stopping: threading.Event) -> None:
    outage = Outage("report")
    is_last = False
    while not is_last:
        is_last = stopping.wait(every_s)
        try:
            reporter.report()
        except OSError as error:  # the store of versions, whose status is asked for
            if line := outage.failed(str(error)):
                log.warning("%s; this is tried again", line)
        else:
            if line := outage.ended():
                log.info("%s", line)


class Reporter:
    """Reports what happened since the last report."""

    def __init__(self, service: Service, reports: Reports) -> None:
        self._service = service
        self._reports = reports
        self._figures, self._at_s = service.figures(), time.monotonic()
        self._told_s = dict[str, float]()
        """Time of each drafter's newest swap that was reported."""
        self._begun_s = time.time()

    def report(self) -> None:
        """
        Raises:
            OSError: the store of versions failed.
        """
        before, after, now_s = self._figures, self._service.figures(), time.monotonic()
        status = self._service.drafter_status()
        window = Window(before, after, max(now_s - self._at_s, 1e-9))
        self._figures, self._at_s = after, now_s
        lost = float(self._reports.num_lost)
        self._reports.figures(figures_of(window, status) | {"server/reports_lost": lost})
        self._tell_swaps("", status)
        for one in status.get("beside", ()):
            own = {f"server/{name}": one[name] for name in ("version", "staleness")}
            self._reports.figures(of_drafter(one["kind"], own))
            self._tell_swaps(one["kind"], one)

    def _tell_swaps(self, drafter: str, status: Mapping[str, Any]) -> None:
        """Report the swaps of a drafter that are new.

        Args:
            drafter: its kind; empty for the first of the run.
        """
        for entry in status.get("history", ()):
            if entry["unix_s"] > self._told_s.get(drafter, self._begun_s):
                self._tell(drafter, entry)

    def _tell(self, drafter: str, entry: Mapping[str, Any]) -> None:
        self._told_s[drafter] = entry["unix_s"]
        event, version = str(entry["event"]), int(entry["version"])
        cells: dict[str, Cell] = {
            "event": event, "version": version, "drafter": drafter or FIRST,
        }  # fmt: skip
        self._reports.row("events/swaps", cells, entry["unix_s"])
        if event.startswith("rolled back"):
            of = f" of {drafter}" if drafter else ""
            text = f"{event}; version {version}{of} serves"
            self._reports.alert("A version was rolled back", text)


def figures_of(window: Window, status: Mapping[str, Any]) -> dict[str, float | None]:
    """The figures of ``reporting.names.SERVER`` in a window, ``None`` where there are none."""
    before, after = window.before, window.after
    return {
        "server/speedup_over_plain": _ratio(
            *(_grown(before.extra, after.extra, n) for n in ("plain_seconds", "decode_seconds"))
        ),
        "server/generation_tokens_per_s": window.generation_tokens_per_s,
        "server/tokens_per_step": window.tokens_per_step,
        "server/acceptance_rate": window.acceptance_rate,
        "server/draft_k": _mean_k(before, after),
        "server/version": after.drafter_version,
        "server/staleness": status["staleness"],
        "server/requests_running": after.num_running,
        "server/requests_waiting": after.num_waiting,
        "server/kv_usage": after.kv_usage,
        "server/traces_lost": sum(after.traces.get(n, 0) for n in ("dropped", "failed")),
    }


def _mean_k(before: EngineFigures, after: EngineFigures) -> float | None:
    """Mean K of the steps in between."""
    steps = {arm: n - before.steps_by_arm.get(arm, 0) for arm, n in after.steps_by_arm.items()}
    return _ratio(sum(k * n for (_, k), n in steps.items()), sum(steps.values()))


def _grown(before: Mapping[str, float], after: Mapping[str, float], name: str) -> float:
    return after.get(name, 0.0) - before.get(name, 0.0)


def _ratio(part: float, whole: float) -> float | None:
    return part / whole if whole > 0 else None
