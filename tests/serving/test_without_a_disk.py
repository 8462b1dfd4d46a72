"""Serving needs no disk: a server answers on a folder that cannot be written, counts what it could
not keep, and keeps it again once it can."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from buffer.segment_report import check_segments
from oracles.forked import Forked, run_forked
from oracles.small_disk import small_file_system
from tests.serving.http.live import SETTINGS, environment, launch_command, wait_for

ASK = {"prompt": "for item in", "max_tokens": 4, "temperature": 0}


class Server:
    """A server that is found by its log, because it may have no ``server.json``."""

    def __init__(self, target: Path, run_dir: Path, log: Path, *more: str) -> None:
        settings = (*SETTINGS, f"target={target}", f"run_dir={run_dir}", *more)
        self._log = log
        self.process = Forked(launch_command(*settings)[1:], environment(), Path.cwd(), log)
        wait_for(lambda: "ready: " in self.log or self.process.poll() is not None, 60)
        assert self.process.poll() is None, self.log
        self.url = self.log.partition(" at http://")[2].split()[0]

    @property
    def log(self) -> str:
        return self._log.read_text(errors="replace")

    def ask(self) -> None:
        answer = httpx.post(f"http://{self.url}/v1/completions", json=ASK, timeout=20)
        assert answer.status_code == 200, answer.text

    def traces(self, result: str) -> int:
        text = httpx.get(f"http://{self.url}/metrics").text
        wanted = [
            x for x in text.splitlines() if f'result="{result}"' in x and "traces_total{" in x
        ]
        return int(float(wanted[0].rpartition(" ")[2]))


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 2 MiB, where this user may mount one."""
    with small_file_system(tmp_path / "disk", "2m") as folder:
        yield folder


def fill(disk: Path) -> Path:
    ballast = disk / "ballast"
    with ballast.open("wb", buffering=0) as file:
        while room := os.statvfs(disk).f_bavail * 4096:
            file.write(bytes(room))
    return ballast


def stop(server: Server) -> None:
    server.process.kill()
    server.process.wait()


def test_a_killed_server_comes_back_on_a_full_disk(
    tiny_target_dir: Path, tmp_path: Path, small_disk: Path
):
    run_dir, fixed = small_disk / "run", ("policy.kind=fixed", "buffer.sync_interval_s=0.01")
    ballast = fill(small_disk)
    first = Server(tiny_target_dir, run_dir, tmp_path / "1.txt", *fixed)
    try:
        assert "cannot be written (No space left on device)" in first.log
        warned, loaded = first.log.index("cannot be written"), first.log.index("loading the target")
        assert warned < loaded
        assert "traces, which capture.enabled asks for, are lost and counted" in first.log
        assert "serving starts with it in memory alone" in first.log
        first.ask()
        wait_for(lambda: first.traces("failed") == 1, 5)
        assert not (run_dir / "server.json").exists()

        ballast.unlink()
        first.ask()
        wait_for(lambda: first.traces("written") == 1, 5)
        wait_for(lambda: (run_dir / "server.json").exists(), 30)
        assert sum(report.records for report in check_segments(run_dir / "traces")) == 1
    finally:
        stop(first)
    assert "Traceback" not in first.log

    fill(small_disk)
    again = Server(tiny_target_dir, run_dir, tmp_path / "2.txt", *fixed)
    try:
        again.ask()
        wait_for(lambda: again.traces("failed") == 1, 5)
        again.process.send_signal(15)
        assert again.process.wait(20) == 0
    finally:
        stop(again)
    assert "Traceback" not in again.log


def test_a_folder_that_cannot_be_made_stops_no_server(tiny_target_dir: Path, tmp_path: Path):
    """And one that is deleted while it serves is made again."""
    blocked = tmp_path / "blocked"
    blocked.write_text("")
    run_dir = blocked / "run"
    server = Server(tiny_target_dir, run_dir, tmp_path / "log.txt", "drafter.kind=suffix")
    try:
        assert f"run_dir {run_dir} cannot be written (Not a directory)" in server.log
        assert "are lost and counted" in server.log
        server.ask()
        wait_for(lambda: server.traces("failed") == 1, 30)
        blocked.unlink()
        wait_for(lambda: (run_dir / "server.json").exists(), 30)
        assert json.loads((run_dir / "server.json").read_text())["pid"] == server.process.pid
        _check_deleted_run(server, run_dir)
        server.process.send_signal(15)
        assert server.process.wait(20) == 0
        assert not (run_dir / "server.json").exists()
    finally:
        stop(server)
    assert "Traceback" not in server.log


def _check_deleted_run(server: Server, run_dir: Path) -> None:
    for _ in range(3):
        server.ask()
    wait_for(lambda: server.traces("written") == 3, 30)
    shutil.rmtree(run_dir)
    for _ in range(4):
        server.ask()
    wait_for(lambda: server.traces("written") == 7, 30)
    assert server.traces("failed") == 1  # the one before the folder could be made
    assert sum(report.records for report in check_segments(run_dir / "traces")) == 4


@pytest.mark.parametrize("room", ["trainer", "serving"])
def test_what_needs_a_disk_or_a_target_says_so_in_a_sentence(
    tiny_target_dir: Path, tmp_path: Path, room: str
):
    blocked = tmp_path / "blocked"
    blocked.write_text("")
    broken = shutil.copytree(tiny_target_dir, tmp_path / "broken")
    os.truncate(broken / "model.safetensors", 5000)
    target = tiny_target_dir if room == "trainer" else broken
    command = ["-m", room, "launch"]
    for one in (f"target={target}", f"run_dir={blocked / 'run'}", "server.port=0"):
        command += ["--set", one]
    answer = run_forked(command, environment(), Path.cwd(), 60)
    assert answer.returncode == 1
    said = [line for line in answer.stderr.splitlines() if " INFO " not in line]
    assert len(said) == 1, answer.stderr
    if room == "trainer":
        assert said[0].startswith(f"run_dir {blocked / 'run'} cannot be written (Not a directory)")
    else:
        assert said[0].startswith(f"{broken / 'model.safetensors'} is cut off")
    assert "imported torch" not in answer.stderr
