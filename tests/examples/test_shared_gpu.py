"""CUDA MPS is started for what shares a GPU, and ends with it. No GPU is needed: a program stands
in for NVIDIA's and writes down how it was called."""

from __future__ import annotations

import os
import stat

import pytest

from examples.shared_gpu import LOGS, PIPES, MpsError, mps


@pytest.fixture
def control(tmp_path, monkeypatch):
    """Path of the program; what it was told is in ``said`` beside it."""
    for name in (PIPES, LOGS):
        monkeypatch.delenv(name, raising=False)
    program = tmp_path / "control"
    program.write_text(
        '#!/bin/sh\n[ -d "$CUDA_MPS_PIPE_DIRECTORY" ] || exit 3\n'
        f'echo "$@ $(cat) $CUDA_MPS_PIPE_DIRECTORY" >> {tmp_path}/said\n'
    )
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    return program


def test_processes_started_meanwhile_find_the_daemon_which_then_ends(control):
    with mps(str(control)):
        pipes = os.environ[PIPES]
        assert os.path.isdir(os.environ[LOGS])
    assert PIPES not in os.environ
    assert not os.path.exists(pipes)
    started, ended = control.with_name("said").read_text().splitlines()
    assert started.split() == ["-d", pipes]
    assert ended.split() == ["quit", pipes]


def test_it_ends_where_the_work_fails(control):
    with pytest.raises(ZeroDivisionError), mps(str(control)):
        raise ZeroDivisionError
    assert "quit" in control.with_name("said").read_text()


def test_a_daemon_that_runs_is_left_alone(control, monkeypatch):
    monkeypatch.setenv(PIPES, "/somewhere")
    with mps(str(control)):
        assert os.environ[PIPES] == "/somewhere"
    assert not control.with_name("said").exists()


def test_a_missing_program_is_named(control):
    with pytest.raises(MpsError, match="no-such-program is not on PATH"), mps("no-such-program"):
        pass


def test_what_it_says_when_it_fails_is_told(control):
    control.write_text(
        "#!/bin/sh\necho An instance of this daemon is already running >&2\nexit 1\n"
    )
    with pytest.raises(MpsError, match="already running"), mps(str(control)):
        pass
    assert PIPES not in os.environ
