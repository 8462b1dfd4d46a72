"""Figures arrive in order, each once, however late they are read."""

from __future__ import annotations

import pytest
import torch

from trainer.figures import Figures, Launched
from trainer.update_log import UpdateLog

CPU = torch.device("cpu")


def write(figures: Figures, step: int, skipped: bool = False) -> list[int]:
    """Write an update whose loss is its number; returns the numbers that arrived."""
    alpha = torch.tensor([step / 100, step / 200])
    figures.write(torch.tensor(float(step)), torch.tensor(2.0), torch.tensor(skipped), alpha, alpha)
    reports = figures.launched(Launched(step, 10, 1e-3))
    assert all(report.loss == report.step for report in reports)
    return [report.step for report in reports]


def test_on_a_cpu_each_update_reports_at_once() -> None:
    figures = Figures(CPU, 2)

    assert [write(figures, step) for step in (1, 2, 3)] == [[1], [2], [3]]
    assert figures.settle() == []


def test_lagged_figures_are_each_read_once_and_in_order() -> None:
    """As on a GPU, where every eighth update copies the figures of the last eight."""
    figures = Figures(CPU, 2, lag=4)

    arrived = [write(figures, step) for step in range(1, 11)]
    left = [report.step for report in figures.settle()]

    assert [number for numbers in arrived for number in numbers] + left == list(range(1, 11))
    assert arrived[:3] == [[], [], []] and left == [9, 10]
    assert [write(figures, step) for step in (11, 12, 13, 14)] == [[], [], [], [11, 12, 13, 14]]


def test_forgotten_figures_never_arrive() -> None:
    figures = Figures(CPU, 2, lag=4)
    for step in (1, 2, 3):
        write(figures, step)

    figures.forget()

    assert figures.settle() == []
    assert [write(figures, step) for step in (4, 5, 6, 7)][-1] == [4, 5, 6, 7]


def test_one_event_tells_of_all_updates_since_the_last() -> None:
    figures, log = Figures(CPU, 2), UpdateLog()
    for step, skipped in ((1, False), (2, True), (3, False)):
        loss = torch.tensor(float("nan") if skipped else step)
        alpha = torch.tensor([step / 100, step / 200])
        figures.write(loss, torch.tensor(2.0), torch.tensor(skipped), alpha, alpha)
        for report in figures.launched(Launched(step, 10, 1e-3)):
            log.add(report)

    values = log.taken(version=5)

    assert (values["step"], values["updates"], values["rows"], values["skipped"]) == (3, 3, 30, 1)
    assert values["loss"] == 2.0
    assert values["alpha"] == pytest.approx([0.02, 0.01])
    assert log.taken(version=5) == {}
