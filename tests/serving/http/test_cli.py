"""``serving launch`` before a server runs: help is fast, and each mistake prints one line."""

from __future__ import annotations

import socket
import subprocess
import sys
from pathlib import Path

from oracles.forked import run_forked
from tests.serving.http.live import environment, launch_command


def run(*settings: str) -> subprocess.CompletedProcess[str]:
    return run_forked(launch_command(*settings)[1:], environment(), Path.cwd(), timeout=60)


def test_the_command_line_imports_no_torch():
    code = (
        "import sys, serving.cli; "
        "sys.exit(any(name in sys.modules for name in ('torch', 'transformers', 'fastapi')))"
    )
    assert subprocess.run([sys.executable, "-c", code], env=environment()).returncode == 0


def test_launch_is_a_subcommand():
    answer = subprocess.run(
        [sys.executable, "-m", "serving", "--help"],
        env=environment(),
        capture_output=True,
        text=True,
    )
    assert answer.returncode == 0
    assert "launch" in answer.stdout


def test_a_misspelt_setting_is_named():
    answer = run("server.prot=1")
    assert answer.returncode == 2
    assert "server.port" in answer.stderr


def test_an_open_door_without_a_key_is_refused():
    answer = run("server.host=0.0.0.0")
    assert answer.returncode == 2
    assert "server.api_key is not set" in answer.stderr


def test_a_target_that_is_not_there_is_one_line(tmp_path: Path):
    answer = run(f"target={tmp_path / 'nothing'}", f"run_dir={tmp_path}", "server.port=0")
    assert answer.returncode == 1
    assert "Traceback" not in answer.stderr
    assert "nothing" in answer.stderr
    assert "imported torch" not in answer.stderr


def test_a_port_in_use_fails_before_the_model_is_loaded(tmp_path: Path):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        answer = run(f"server.port={port}", f"target={tmp_path}", f"run_dir={tmp_path}")
    assert answer.returncode == 1
    assert f"server.port {port}" in answer.stderr
    assert "Traceback" not in answer.stderr


def test_a_key_that_is_none_fails_before_anything_is_loaded(tmp_path: Path):
    key = tmp_path / "own.pub"
    key.write_text("hello\n")
    answer = run(f"swap.public_key={key}", f"target={tmp_path / 'nothing'}")
    assert answer.returncode == 2
    assert answer.stderr == f"{key} must hold one or more Ed25519 public keys in PEM\n"
