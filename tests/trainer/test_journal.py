"""The trainer's log lines: events at once, learning and waiting every few seconds."""

from __future__ import annotations

import errno
import json
import logging
import os
from pathlib import Path

import pytest

from trainer import journal as journals
from trainer.journal import Journal

WAITING = "waiting for traces: {} of trainer.min_traces=16"


def training(step: int) -> dict[str, object]:
    return {
        "state": "training",
        "step": step,
        "loss": 0.5,
        "traces": {"read": 40},
        "version": 2,
    }


def messages(caplog: pytest.LogCaptureFixture, level: int = logging.INFO) -> list[str]:
    return [r.getMessage() for r in caplog.records if r.levelno >= level]


def test_a_wait_is_logged_when_it_begins_and_when_something_else_is_missing(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, logger="trainer")
    journal = Journal(tmp_path)

    for state in (WAITING.format(0), WAITING.format(3), "waiting for the end"):
        journal.status({"state": state})

    assert messages(caplog) == [WAITING.format(0), "waiting for the end"]


def test_a_long_wait_is_logged_again_with_its_present_figures(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    caplog.set_level(logging.INFO, logger="trainer")
    monkeypatch.setattr(journals, "LINE_EVERY_S", 0.0)
    journal = Journal(tmp_path)

    for number in (0, 3):
        journal.status({"state": WAITING.format(number)})

    assert messages(caplog) == [WAITING.format(0), WAITING.format(3)]


def test_learning_is_one_line_a_window_and_not_one_an_update(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    caplog.set_level(logging.INFO, logger="trainer")
    journal = Journal(tmp_path)

    for step in (1, 2, 3):
        if step == 3:
            monkeypatch.setattr(journals, "LINE_EVERY_S", 0.0)
        journal.event("update", step=step, updates=1, rows=100, loss=0.5)
        journal.status(training(step))

    [line] = messages(caplog)
    assert line.startswith("step 3: 3 updates and ")
    assert line.endswith("loss 0.5000, 40 traces read, version 2")


def test_only_the_first_trace_refused_for_a_reason_is_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG, logger="trainer")
    journal = Journal(tmp_path)

    for trace, reason in (("a", "short"), ("b", "short"), ("c", "rows")):
        journal.event("refused", trace=trace, reason=reason, text="why")

    warned = messages(caplog, logging.WARNING)
    assert [line.split()[1] for line in warned] == ["a", "c"]
    assert len(messages(caplog, logging.DEBUG)) == 3


@pytest.mark.parametrize(
    ("event", "values", "level", "text"),
    [
        (
            "rolled_back",
            {"version": 3, "rejected": 4, "step": 9},
            "WARNING",
            "the server rolled back version 4; training goes on from version 3",
        ),
        (
            "restored",
            {"source": "checkpoint", "text": "3 updates in a row were not finite"},
            "WARNING",
            "weights restored from checkpoint: 3 updates in a row were not finite",
        ),
        (
            "checkpoint_failed",
            {"text": "no space left on device"},
            "ERROR",
            "the checkpoint could not be written: no space left on device",
        ),
    ],
)
def test_events_are_logged_at_their_level(
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    event: str,
    values: dict[str, object],
    level: str,
    text: str,
) -> None:
    caplog.set_level(logging.INFO, logger="trainer")

    Journal(tmp_path).event(event, **values)

    [record] = caplog.records
    assert (record.levelname, record.getMessage()) == (level, text)


def test_a_failure_stays_in_the_status_beside_the_last_figures(tmp_path: Path) -> None:
    journal = Journal(tmp_path)
    journal.status(training(7))

    journal.failed(RuntimeError("out of memory"))

    status = json.loads((tmp_path / "status.json").read_text())
    assert (status["state"], status["step"]) == ("failed: RuntimeError: out of memory", 7)


def test_a_full_disk_costs_the_report_and_not_the_trainer(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    journal = Journal(tmp_path)

    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "open", full)
        patch.setattr(journals, "open_regular", full)
        for _ in range(3):
            journal.event("stopped", step=1)
            journal.status({"state": "training"})
    journal.event("stopped", step=2)

    said = messages(caplog, logging.ERROR)
    assert said == [
        f"cannot write {tmp_path / name} (No space left on device); training continues"
        for name in ("log.jsonl", "status.json")
    ]
    assert json.loads((tmp_path / "log.jsonl").read_text())["step"] == 2


def test_a_file_that_is_written_now_and_then_does_not_repeat_what_fails_for_the_other(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, logger="trainer")
    (tmp_path / "log.jsonl").mkdir()
    journal = Journal(tmp_path)

    for _ in range(3):
        journal.event("update", updates=1, rows=3)
        journal.status({"state": "stopped"})
    (tmp_path / "log.jsonl").rmdir()
    journal.event("update", updates=1, rows=3)

    first, last = messages(caplog)
    assert first.startswith(f"cannot write {tmp_path / 'log.jsonl'} (it is a folder")
    assert last.startswith(f"can write {tmp_path / 'log.jsonl'} again, after ")


def test_a_status_is_due_when_it_is_old_or_says_something_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    journal = Journal(tmp_path)
    assert journal.status_is_due("training")

    journal.status(training(1))

    assert not journal.status_is_due("training")
    assert journal.status_is_due("stopped")
    monkeypatch.setattr(journals, "STATUS_EVERY_S", 0.0)
    assert journal.status_is_due("training")


@pytest.mark.timeout(30)
def test_a_pipe_in_place_of_the_log_costs_the_events_alone(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    os.mkfifo(tmp_path / "log.jsonl")
    journal = Journal(tmp_path)
    journal.event("stopped", step=1)
    assert "it is a named pipe, not a regular file" in caplog.text
    journal.status({"state": "stopped"})
    assert json.loads((tmp_path / "status.json").read_text())["state"] == "stopped"
