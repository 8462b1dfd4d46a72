"""``server.json`` names one living server; only that one removes or renews it."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from serving.http.server_file import SERVER_FILE, ServerFile, remove_stale
from tests.serving.http.live import environment


def port_in(folder: Path) -> int:
    return int(json.loads((folder / SERVER_FILE).read_text())["port"])


def new(folder: Path, port: int) -> ServerFile:
    return ServerFile(folder, "127.0.0.1", port, "tiny")


def killed_server(folder: Path) -> None:
    """A server of another process that wrote the file and was killed."""
    code = (
        "import os, sys; from pathlib import Path; from serving.http.server_file import ServerFile;"
        "ServerFile(Path(sys.argv[1]), '127.0.0.1', 1, 'tiny').start(); os.kill(os.getpid(), 9)"
    )
    subprocess.run([sys.executable, "-c", code, str(folder)], env=environment())
    assert port_in(folder) == 1


def test_it_is_whole_while_the_server_runs_and_gone_afterwards(tmp_path: Path):
    file = new(tmp_path / "run", 1)
    file.start()
    record = json.loads(file.path.read_text())
    assert (record["pid"], record["port"], record["model"]) == (os.getpid(), 1, "tiny")
    assert [p.name for p in file.path.parent.iterdir()] == [SERVER_FILE]
    file.stop()
    assert list(file.path.parent.iterdir()) == []


def test_a_second_server_leaves_it_alone_and_takes_over_later(tmp_path: Path, caplog):
    """Both have one process id, as two containers may."""
    first, second, third = new(tmp_path, 1), new(tmp_path, 2), new(tmp_path, 3)
    first.keep()
    second.keep()
    second.keep()
    third.keep()
    assert port_in(tmp_path) == 1
    third.stop()
    assert port_in(tmp_path) == 1
    [said, _] = [record.getMessage() for record in caplog.records]
    assert f"names another server (process {os.getpid()}, 127.0.0.1:1)" in said

    first.stop()
    assert not (tmp_path / SERVER_FILE).exists()
    second.keep()
    assert port_in(tmp_path) == 2
    second.stop()


def test_one_that_was_deleted_is_written_again(tmp_path: Path):
    file = new(tmp_path / "run", 1)
    file.keep()
    shutil.rmtree(tmp_path / "run")
    file.keep()
    assert port_in(tmp_path / "run") == 1
    file.stop()
    assert not file.path.exists()


def test_one_that_somebody_replaced_is_not_removed(tmp_path: Path):
    file = new(tmp_path, 1)
    file.keep()
    file.path.unlink()
    other = new(tmp_path, 2)
    other.keep()
    file.stop()
    assert port_in(tmp_path) == 2
    other.stop()


def test_that_of_a_killed_server_is_replaced(tmp_path: Path):
    killed_server(tmp_path)
    file = new(tmp_path, 2)
    file.keep()
    assert port_in(tmp_path) == 2
    file.stop()


def test_a_start_removes_that_of_a_dead_server_only(tmp_path: Path):
    file = tmp_path / SERVER_FILE
    dead = subprocess.Popen(["true"])
    dead.wait()
    mine = {"pid": os.getpid(), "instance": "of a container whose processes have our numbers"}
    for text, is_kept in (
        (json.dumps({"pid": os.getppid()}), True),  # of a program that holds no lock
        (json.dumps({"pid": dead.pid}), False),
        (json.dumps(mine), False),
        ("[]", False),
        ("{", False),
        ("", False),
    ):
        file.write_text(text)
        remove_stale(file)
        assert file.exists() == is_kept, text
        file.unlink(missing_ok=True)
    living = new(tmp_path, 1)
    living.keep()
    remove_stale(file)
    assert port_in(tmp_path) == 1
    living.stop()


def test_a_disk_that_refuses_it_is_said_once_and_tried_again(tmp_path: Path, caplog):
    blocked = tmp_path / "file"
    blocked.write_text("")
    file = new(blocked / "run", 1)
    file.keep()
    file.keep()
    [said] = [record.getMessage() for record in caplog.records]
    assert "server.json cannot be written (Not a directory)" in said
    blocked.unlink()
    file.keep()
    assert port_in(blocked / "run") == 1
    file.stop()


@pytest.mark.parametrize("room", [0, 1])
def test_a_full_disk_leaves_no_half_file(tmp_path: Path, monkeypatch, room: int):
    monkeypatch.setattr(os, "write", lambda descriptor, content: room)  # what a full disk returns
    file = new(tmp_path, 1)
    file.keep()
    file.stop()
    assert list(tmp_path.iterdir()) == []
