"""``trainer status``, ``logs`` and ``stop`` say what is, also of a trainer that is gone."""

from __future__ import annotations

import json
import os
import shutil
import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from trainer import cli, watch
from trainer.cli import app
from trainer.journal import Journal
from trainer.lock import STOP_SIGNAL, Owner, RunGoneError, only_trainer
from trainer.process import stop_on_signal

STATUS = {
    "state": "training",
    "step": 40,
    "skipped": 1,
    "version": 3,
    "traces": {"read": 90, "held": 70, "held_out": 12},
    "gate": {"passed": False, "reason": "no gain"},
}
UPDATE = {"step": 40, "updates": 4, "rows": 900, "loss": 0.5}


def ask(*words: object) -> Result:
    return CliRunner().invoke(app, [str(word) for word in words])


def journal_of(run: Path, state: str = "training") -> None:
    """What a trainer in this process would have written."""
    journal = Journal(run / "trainer")
    journal.event("started", version=2)
    for at in range(3):
        _append(run, {"event": "update", "unix_ms": 1_000_000 + 5000 * at, **UPDATE})
    _append(run, {"event": "gate", "unix_ms": 1_010_001, "step": 40, "reason": "no", "parent": 3})
    journal.status({**STATUS, "state": state})


def _append(run: Path, event: dict[str, object]) -> None:
    with (run / "trainer" / "log.jsonl").open("a") as file:
        file.write(json.dumps(event) + "\n")


@pytest.mark.parametrize("command", ["status", "logs", "stop"])
def test_a_run_that_is_not_there_is_said_so(command: str, tmp_path: Path) -> None:
    missing = ask(command, tmp_path / "none")
    (tmp_path / "traces").mkdir()
    without = ask(command, tmp_path)

    assert (missing.exit_code, without.exit_code) == (2, 2)
    assert f"{tmp_path / 'none'}: no such run" in missing.stderr
    assert f"{tmp_path} has no trainer's folder" in without.stderr


def test_a_living_trainer_is_shown_with_what_it_does(tmp_path: Path) -> None:
    with only_trainer(tmp_path / "trainer"):
        starting = ask("status", tmp_path)
        journal_of(tmp_path)
        shown, values = ask("status", tmp_path), ask("status", tmp_path, "--json")

    assert "state      starts: it loads, or resumes (process " in starting.stdout
    assert shown.exit_code == starting.exit_code == 0
    lines = dict(line.split(maxsplit=1) for line in shown.stdout.splitlines())
    assert lines["state"].startswith(f"training (process {os.getpid()} on ")
    assert lines["version"] == "3"
    assert lines["step"] == "40, 1 updates skipped"
    assert lines["rows/s"] == "180"  # the rows after the first event, over ten seconds
    assert lines["gate"] == "refused: no gain"
    assert "sharing" not in lines
    assert json.loads(values.stdout)["owner"]["pid"] == os.getpid()


def test_what_sharing_a_device_costs_is_shown(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "trainer")
    sharing = {"duty": 0.12, "slowdown": 0.4, "loss": 0.048}
    journal.status({**STATUS, "sharing": sharing})

    assert (
        "sharing    works 12% of the time while requests decode, which are slower by 40% then; "
        "serving loses 4.8%" in ask("status", tmp_path).stdout
    )
    account = {"balance_s": 12.34, "largest_s": 15.0, "urgent": "acceptance has fallen"}
    journal.status({**STATUS, "sharing": sharing | account})
    assert (
        "serving loses 4.8%; may lose another 12.3 s of 15.0 s at once; learning is urgent: "
        "acceptance has fallen" in ask("status", tmp_path).stdout
    )
    journal.status({**STATUS, "sharing": {"duty": 0.5, "slowdown": None, "loss": None}})
    assert "sharing" not in ask("status", tmp_path).stdout


@pytest.mark.parametrize(
    ("state", "says"),
    [
        (
            "training",
            "ended without a word, killed, out of memory or on a full disk, while training",
        ),
        ("stopped", "not running: stopped"),
        ("failed: OSError: full", "not running: failed: OSError: full"),
    ],
)
def test_a_trainer_that_does_not_run_is_told_from_one_that_does(
    tmp_path: Path, state: str, says: str
) -> None:
    with only_trainer(tmp_path / "trainer"):
        journal_of(tmp_path, state)
    # The process number in the files is that of this process, which lives: only the lock counts.

    shown, stopped = ask("status", tmp_path), ask("stop", tmp_path)

    assert shown.exit_code == 1
    assert says in shown.stdout
    assert stopped.exit_code == 1
    assert f"no trainer runs in {tmp_path}: there is nothing to stop" in stopped.stderr


def test_a_second_trainer_is_refused_and_asking_refuses_none(tmp_path: Path) -> None:
    with only_trainer(tmp_path), pytest.raises(ValueError, match=f"process {os.getpid()}"):
        ExitStack().enter_context(only_trainer(tmp_path))


def test_logs_tell_events_and_ten_seconds_of_learning_in_a_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(watch, "START_S", 0.0)
    journal_of(tmp_path)
    _append(tmp_path, {"event": "update", "unix_ms": 1_020_000, **UPDATE, "loss": None})
    with (tmp_path / "trainer" / "log.jsonl").open("a") as file:
        file.write('{"event": "gate", "unix')  # killed while it wrote

    shown = ask("logs", tmp_path, "-f")  # nobody writes any more, so it ends

    said = [line[20:] for line in shown.stdout.splitlines()]
    assert said[:4] == [
        "training begins from version 2",
        "step 40: 12 updates of 2700 rows in all, loss 0.5000",
        "gate at step 40: no; parent version 3",
        "step 40: 4 updates of 900 rows in all, loss not finite",
    ]
    assert "no trainer runs in this folder (any more)" in shown.stdout


def test_a_clock_that_is_set_back_neither_ends_lines_nor_turns_rates_negative(
    tmp_path: Path,
) -> None:
    with only_trainer(tmp_path / "trainer"):
        journal_of(tmp_path)
        for at in (2000, 4000, 6000, 8000):
            _append(tmp_path, {"event": "update", "unix_ms": at, **UPDATE})

        shown, logs = ask("status", tmp_path), ask("logs", tmp_path)

    assert "rows/s     450\n" in shown.stdout
    said = [line[20:] for line in logs.stdout.splitlines()]
    assert said[-1] == "step 40: 16 updates of 3600 rows in all, loss 0.5000"


def test_logs_wait_for_a_trainer_that_is_just_starting(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    owners = iter([None, None, Owner(1, "here"), Owner(1, "here"), None])
    journal_of(tmp_path)

    def next_owner(folder: Path) -> Owner | None:
        """The trainer takes the lock after a while, writes one event, and ends."""
        owner = next(owners)
        if owner is not None:
            _append(tmp_path, {"event": "gate", "unix_ms": 2_000_000, "step": 41, "reason": "new",
                               "parent": 3})  # fmt: skip
        return owner

    monkeypatch.setattr(watch, "owner_of", next_owner)
    monkeypatch.setattr(watch, "POLL_S", 0.0)
    said = list(watch.log_lines(tmp_path, follow=True))

    assert sum("gate at step 41: new" in line for line in said) == 2
    assert said[-1] == "no trainer runs in this folder (any more)"
    assert next(owners, "all asked") == "all asked"


def test_logs_tell_of_all_drafters_in_the_order_of_time(tmp_path: Path) -> None:
    gate = {"event": "gate", "reason": "no", "parent": 1}

    def write(folder: Path, updates_ms: int, *gates_ms: int) -> None:
        events: list[dict[str, Any]] = [
            {"event": "update", "unix_ms": updates_ms + 5000 * at, **UPDATE} for at in range(3)
        ]
        events += [gate | {"unix_ms": at, "step": at % 100} for at in gates_ms]
        folder.mkdir()
        text = "".join(json.dumps(event) + "\n" for event in events)
        (folder / "log.jsonl").write_text(text)

    write(tmp_path / "trainer", 1_000_000, 1_010_001, 1_010_004)
    write(tmp_path / "trainer" / "mtp", 999_000, 1_010_002, 1_010_003)

    said = [line[20:] for line in ask("logs", tmp_path).stdout.splitlines()]

    assert said == [
        "mtp: step 40: 12 updates of 2700 rows in all, loss 0.5000",
        "step 40: 12 updates of 2700 rows in all, loss 0.5000",
        "gate at step 1: no; parent version 1",
        "mtp: gate at step 2: no; parent version 1",
        "mtp: gate at step 3: no; parent version 1",
        "gate at step 4: no; parent version 1",
    ]


def test_whoever_follows_the_logs_hears_what_a_trainer_waits_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    states = ["waiting for traces: 0 of 16", "waiting for traces: 3 of 16", "training"]
    states += ["waiting for fresh traces: 9 rows", "waiting for fresh traces: 9 rows"]
    journal, ahead = Journal(tmp_path / "trainer"), iter(states)

    def next_owner(folder: Path) -> Owner | None:
        """The trainer lives as long as there are states."""
        state = next(ahead, None)
        if state is None:
            return None
        journal.status({**STATUS, "state": state})
        return Owner(os.getpid(), "here")

    monkeypatch.setattr(watch, "owner_of", next_owner)
    monkeypatch.setattr(watch, "POLL_S", 0.0)
    said = [line[20:] for line in watch.log_lines(tmp_path, follow=True)]
    assert said[:-1] == ["waiting for traces: 0 of 16", "waiting for fresh traces: 9 rows"]

    monkeypatch.setattr(watch, "LINE_EVERY_S", 0.0)
    ahead = iter(states)
    said = [line[20:] for line in watch.log_lines(tmp_path, follow=True)]
    assert said[:-1] == [state for state in states if state != "training"]


def test_what_another_trainer_waited_for_is_not_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Journal(tmp_path / "trainer").status({**STATUS, "state": "waiting for traces: 0 of 16"})
    owners = iter([Owner(1, "here"), None])
    monkeypatch.setattr(watch, "owner_of", lambda folder: next(owners))
    monkeypatch.setattr(watch, "POLL_S", 0.0)

    said = list(watch.log_lines(tmp_path, follow=True))

    assert said == ["no trainer runs in this folder (any more)"]


def test_whoever_follows_the_logs_may_come_before_the_trainer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(watch, "POLL_S", 0.01)
    run = tmp_path / "run"
    lines = watch.log_lines(run, follow=True)
    assert next(lines) == f"no trainer was started in {run} yet; waiting 10 s for one"
    journal_of(run)
    assert next(lines)[20:] == "training begins from version 2"

    monkeypatch.setattr(watch, "START_S", 0.0)
    missing = ask("logs", tmp_path / "none", "-f")
    assert (missing.exit_code, missing.stdout) == (2, "")
    assert "no such run" in missing.stderr


def _hold(run: Path, ends: bool, state: str = "stopped") -> int:
    """A child that holds the lock, and ends when told to or not."""
    pid = os.fork()
    if pid == 0:
        stop = stop_on_signal() if ends else threading.Event()
        if not ends:
            signal.signal(STOP_SIGNAL, signal.SIG_IGN)
        with only_trainer(run / "trainer"):
            journal_of(run, state)
            (run / "ready").touch()
            stop.wait(120)
            time.sleep(0.5)  # it writes a checkpoint
        os._exit(7)
    deadline = time.monotonic() + 60
    while not (run / "ready").exists():
        assert time.monotonic() < deadline
        time.sleep(0.02)
    return pid


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
@pytest.mark.parametrize("ends", [True, False])
def test_stop_waits_for_the_end_and_says_when_there_is_none(tmp_path: Path, ends: bool) -> None:
    pid = _hold(tmp_path, ends)
    try:
        result = ask("stop", tmp_path, "--timeout", 60 if ends else 0.5)
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)

    assert result.exit_code == (0 if ends else 1)
    if ends:
        assert result.stdout == f"process {pid} stopped at step 40, version 3\n"
    else:
        assert f"process {pid} was told to stop and still runs after 0.5 s" in result.stderr


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_whoever_stops_a_trainer_that_is_stopping_waits_too(tmp_path: Path) -> None:
    pid = _hold(tmp_path, True)
    try:
        with ThreadPoolExecutor(3) as pool:
            told = list(pool.map(lambda _: watch.stop(tmp_path, 60.0), range(3)))
    finally:
        _, code = os.waitpid(pid, 0)

    assert os.waitstatus_to_exitcode(code) == 7  # by itself: no signal ended it
    assert told == [f"process {pid} stopped at step 40, version 3"] * 3


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_a_trainer_that_ended_otherwise_was_not_stopped(tmp_path: Path) -> None:
    pid = _hold(tmp_path, True, "failed: OSError: full")
    try:
        result = ask("stop", tmp_path)
    finally:
        os.waitpid(pid, 0)

    assert result.exit_code == 1
    assert f"process {pid} ended, but not as told: its last state is 'failed: OSE" in result.stderr


@pytest.mark.parametrize(
    ("error", "code", "says"),
    [
        (PermissionError(1, "Operation not permitted"), 1, "is another user's: stop it as that"),
        (ProcessLookupError(3, "No such process"), 1, "was told to stop and still runs"),
    ],
)
def test_a_trainer_that_cannot_be_signalled_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: OSError, code: int, says: str
) -> None:
    def kill(pid: int, number: int) -> None:
        raise error

    monkeypatch.setattr(watch.os, "kill", kill)
    with only_trainer(tmp_path / "trainer"):
        result = ask("stop", tmp_path, "--timeout", 0.1)

    assert (result.exit_code, says in result.stderr) == (code, True)


@pytest.mark.parametrize("command", ["status", "logs", "stop"])
def test_a_file_of_another_user_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: str
) -> None:
    path = tmp_path / "trainer" / "lock"
    path.parent.mkdir()

    def owner_of(folder: Path) -> None:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(watch, "owner_of", owner_of)
    result = ask(command, tmp_path)

    assert result.exit_code == 1
    assert result.stderr.startswith(f"{path}: permission denied. Server, trainer and these")


def test_watching_ends_with_the_trainer_and_its_exit_code_is_that_of_the_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with only_trainer(tmp_path / "trainer"):
        journal_of(tmp_path)
        living = watch.status_of(tmp_path)
    found = iter([living, living, watch.status_of(tmp_path)])
    monkeypatch.setattr(cli, "status_of", lambda run: next(found))
    monkeypatch.setattr(cli.time, "sleep", lambda seconds: None)

    assert ask("status", tmp_path, "--watch").exit_code == 1
    assert ask("status", tmp_path, "--watch", "--json").exit_code == 2


@pytest.mark.parametrize(
    "line",
    [
        {"event": "update", "unix_ms": 5, "rows": None, "updates": 1, "loss": 0.5},
        {"event": "update", "unix_ms": 5, "rows": 1, "updates": 1, "loss": "low"},
        {"event": "update", "unix_ms": 5},
        {"event": "gate", "unix_ms": 1 << 52, "step": "x"},
        {"event": "stopped", "unix_ms": "noon"},
    ],
)
def test_what_another_version_wrote_ends_no_command(tmp_path: Path, line: dict[str, Any]) -> None:
    journal_of(tmp_path, "stopped")
    _append(tmp_path, line)
    status = {**STATUS, "state": 5, "sharing": {"loss": 0.5}, "time": {"a": 1}, "gate": 3}
    (tmp_path / "trainer" / "status.json").write_text(json.dumps(status))

    shown, logs = ask("status", tmp_path), ask("logs", tmp_path)

    assert (shown.exit_code, logs.exit_code) == (1, 0)
    assert "step 40: 12 updates of 2700 rows in all, loss 0.5000" in logs.stdout
    assert "step       40" in shown.stdout


def test_a_trainer_whose_run_was_moved_or_taken_ends_and_one_deleted_is_made_again(
    tmp_path: Path,
) -> None:
    run = tmp_path / "run"
    with only_trainer(run / "trainer") as lock:
        lock.check(at_once=True)
        run.rename(tmp_path / "elsewhere")

        with pytest.raises(RunGoneError, match="run was moved while its trainer worked"):
            lock.check(at_once=True)
        lock.check()  # it has just looked
        assert not run.exists()  # nothing was written to the old place
    with only_trainer(run / "trainer") as lock:
        shutil.rmtree(run)
        lock.check(at_once=True)
        with pytest.raises(ValueError, match="another trainer"), only_trainer(run / "trainer"):
            pass
        shutil.rmtree(run)
        with (
            only_trainer(run / "trainer"),
            pytest.raises(RunGoneError, match="was deleted while its trainer worked: another"),
        ):
            lock.check(at_once=True)


def test_a_trainer_on_another_host_is_not_signalled(tmp_path: Path) -> None:
    with only_trainer(tmp_path / "trainer"):
        (tmp_path / "trainer" / "lock").write_text(f"{os.getpid()}\nelsewhere\n")

        result = ask("stop", tmp_path)

    assert result.exit_code == 1
    assert f"is process {os.getpid()} on elsewhere, and this is" in result.stderr


def test_where_the_time_goes_is_shown_with_the_most_first(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "trainer")
    journal.status({**STATUS, "time": {"other": 0.001, "taking_in": 0.2, "updates": 0.799}})
    assert "time       updates 80%, taking in 20%\n" in ask("status", tmp_path).stdout
    journal.status(STATUS)
    assert "time " not in ask("status", tmp_path).stdout
