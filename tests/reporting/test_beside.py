"""What drafters beside the first report has names of its own, and shares its panels."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from benchmarks.reports import events
from reporting.dashboard import GOLDEN, figures_of
from reporting.names import PER_DRAFTER, is_known, of_drafter, pattern_of
from reporting.records import Bundle, Figures, Row
from tests.reporting.kept import Kept
from trainer.reporting import Reporter


def heard(tmp_path: Path, drafter: str) -> Kept:
    reports = Kept()
    reporter = Reporter(reports, tmp_path, every_s=0.0, drafter=drafter)
    (tmp_path / "3").mkdir(exist_ok=True)
    for name, values in events().items():
        reporter.hear(name, values)
    reporter.hear("published", {"version": 3, "parent": 2, "step": 8})
    return reports


def names(reports: Kept) -> set[str]:
    return {name for one in reports.of(Figures) for name in one.values}


def test_a_trainer_beside_the_first_reports_all_that_the_first_does(tmp_path: Path) -> None:
    first, beside = heard(tmp_path, ""), heard(tmp_path, "mtp")

    assert names(beside) == {f"beside/mtp/{name}" for name in names(first)}
    assert all(map(is_known, names(beside) | names(first)))
    assert [row.cells["drafter"] for row in first.of(Row)] == ["(first)"]
    assert [row.cells["drafter"] for row in beside.of(Row)] == ["mtp"]
    assert [one.drafter for one in beside.of(Bundle)] == ["mtp"]


def test_the_dashboard_shows_each_drafter_in_the_panel_of_the_first() -> None:
    _, patterns, _ = figures_of(GOLDEN.read_text())
    for name in PER_DRAFTER:
        assert pattern_of(name) in patterns
        plain = re.sub(r"\{\w+\}", "x", name)
        (other,) = of_drafter("mtp", {plain: 1.0})
        shown = [p for p in patterns if re.fullmatch(p, plain) and re.fullmatch(p, other)]
        assert shown == [pattern_of(name)]
    assert not is_known("beside/mtp/server/kv_usage")


@pytest.mark.parametrize("end", ["stopped", "failed: OSError: full"])
def test_updates_are_reported_together_and_none_is_left_out(tmp_path: Path, end: str) -> None:
    reports = Kept()
    reporter = Reporter(reports, tmp_path, every_s=3600.0)
    update, status = events()["update"], events()["status"]
    reporter.hear("update", update | {"loss": 5.0})  # the first is not waited for
    for loss, updates, lr in ((1.0, 1, 1e-4), (2.0, 3, 2e-4)):
        grad_norm = float("nan") if updates == 1 else 0.5
        reporter.hear("update", update | {
            "loss": loss, "updates": updates, "lr": lr, "rows": 100, "seconds": 0.25,
            "alpha": [0.5, 0.25 * updates][:updates], "grad_norm": grad_norm,
        })  # fmt: skip
    assert len(reports.of(Figures)) == 1
    reporter.hear("status", status | {"state": end})

    first, joined, _ = (one.values for one in reports.of(Figures))
    assert first["trainer/loss"] == 5.0
    assert joined == {
        "trainer/loss": 1.75,
        "trainer/grad_norm": 0.5,
        "trainer/rows_per_s": 400.0,
        "trainer/lr": 2e-4,
        "trainer/staleness": 0.5,
        "trainer/alpha_1": 0.5,
        "trainer/alpha_2": 0.75,
    }
