"""A server's load is read by another process of the host, whole, and only while a server lives."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from buffer.load import ALIVE_S, LOOK_S, Load, LoadReader, LoadWriter, open_writer, path_of

DEVICE = "GPU-01234567-89ab-cdef-0123-456789abcdef"


@pytest.fixture
def places(tmp_path: Path) -> tuple[Path, Path]:
    """A run folder, and a folder in place of the host's memory."""
    memory = tmp_path / "memory"
    memory.mkdir()
    return tmp_path / "run", memory


def written(places: tuple[Path, Path]) -> LoadWriter:
    run, memory = places
    return open_writer(run, DEVICE, memory)


def test_a_reader_sees_what_was_passed_and_how_long_requests_ran(
    places: tuple[Path, Path],
) -> None:
    writer, reader = written(places), LoadReader(*places)
    assert reader.read() is None, "nothing passed yet"

    reader = LoadReader(*places)
    writer.passed(tokens=4, running=2)
    time.sleep(0.02)
    writer.passed(tokens=9, running=0)
    time.sleep(0.02)
    writer.passed(tokens=9, running=0)
    load = reader.read()

    assert load is not None
    assert (load.passes, load.tokens, load.running) == (3, 9, 0)
    assert load.device == DEVICE
    assert 0.02 <= load.busy_s < time.monotonic(), "the time without requests is not counted"
    assert load.busy_s < load.at_s and not load.is_busy(load.at_s)
    writer.close()


def test_a_server_that_stopped_in_the_midst_of_requests_is_not_busy_for_long() -> None:
    load = Load(passes=10, tokens=99, busy_s=1.0, running=3, at_s=50.0)

    assert load.is_busy(50.0 + 0.9 * ALIVE_S)
    assert not load.is_busy(50.0 + 1.1 * ALIVE_S)


def test_only_one_server_of_a_run_publishes_and_leaves_nothing_behind(
    places: tuple[Path, Path],
) -> None:
    first, second = written(places), written(places)
    first.passed(tokens=1, running=1)
    second.passed(tokens=1000, running=1)
    load = LoadReader(*places).read()
    assert load is not None and load.tokens == 1

    first.close()
    assert not list(places[1].iterdir())
    first.passed(tokens=2, running=1)  # after the end: nothing happens


def test_what_killed_servers_left_behind_is_removed(
    places: tuple[Path, Path], tmp_path: Path
) -> None:
    left, fresh, other = (places[1] / f"slipstream.load-1-{name}" for name in "abc")
    foreign = places[1] / "somebody-elses"
    for path in (left, fresh, other, foreign):
        path.write_bytes(bytes(120))
    held = open_writer(tmp_path / "another run", DEVICE, places[1])
    held_path = path_of(tmp_path / "another run", places[1])
    other.unlink()
    other.mkdir()  # whatever it is, it stops nobody
    for path in (left, other, foreign, held_path):
        os.utime(path, (1.0, 1.0))

    writer = written(places)

    assert not left.exists(), "nobody holds it"
    assert fresh.exists(), "a server may just be about to hold it"
    assert held_path.exists() and foreign.exists() and other.exists()
    writer.close()
    held.close()


def test_a_reader_finds_the_next_server(places: tuple[Path, Path]) -> None:
    writer, reader = written(places), LoadReader(*places)
    writer.passed(tokens=1, running=0)
    assert reader.read() == LoadReader(*places).read()
    writer.close()

    writer = written(places)
    writer.passed(tokens=7, running=1)
    time.sleep(1.1 * LOOK_S)
    found = reader.read()
    assert found is not None and found.tokens == 7
    writer.close()


@pytest.mark.parametrize("content", [b"", b"x" * 7, bytes(120), b"\xff" * 120, b"\xff" * 4096])
def test_what_is_no_load_is_none(places: tuple[Path, Path], content: bytes) -> None:
    run, memory = places
    run.mkdir()
    path_of(run, memory).write_bytes(content)

    assert LoadReader(run, memory).read() is None


def test_a_pipe_or_a_link_in_its_place_stops_nobody(places: tuple[Path, Path]) -> None:
    run, memory = places
    run.mkdir()
    os.mkfifo(path_of(run, memory))
    assert LoadReader(run, memory).read() is None
    writer = open_writer(run, DEVICE, memory)
    writer.passed(tokens=1, running=1)
    assert path_of(run, memory).is_fifo(), "it is left to whoever made it"


def test_without_memory_a_server_publishes_nothing(tmp_path: Path) -> None:
    writer = open_writer(tmp_path / "run", DEVICE, tmp_path / "missing")
    writer.passed(tokens=1, running=1)
    writer.close()
    assert LoadReader(tmp_path / "run", tmp_path / "missing").read() is None


def test_half_a_write_is_not_read(places: tuple[Path, Path]) -> None:
    """The number of passes is at both ends, and a write has come to the first one alone."""
    writer = written(places)
    writer.passed(tokens=5, running=1)
    with path_of(*places).open("r+b") as file:
        whole = file.read()
        file.seek(0)
        file.write(whole[:8] + (2).to_bytes(8, "little"))
    assert LoadReader(*places).read() is None

    writer.passed(tokens=6, running=1)
    found = LoadReader(*places).read()
    assert found is not None and (found.passes, found.tokens) == (2, 6)
    writer.close()
