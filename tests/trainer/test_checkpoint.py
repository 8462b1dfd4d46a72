"""A checkpoint is there whole or not at all, and a damaged one is never taken for none."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from trainer.checkpoint import CheckpointError, read_checkpoint, write_checkpoint

TENSORS = {"a": torch.arange(6.0).view(2, 3), "b": torch.tensor([1, 2], dtype=torch.uint8)}


def test_what_is_read_is_what_was_written(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, {"step": 1}, TENSORS)
    write_checkpoint(tmp_path, {"step": 2, "deep": {"list": [1, 2.5, None]}}, TENSORS)

    saved = read_checkpoint(tmp_path)

    assert saved is not None
    assert saved.state == {"step": 2, "deep": {"list": [1, 2.5, None]}}
    assert saved.tensors.keys() == TENSORS.keys()
    assert all(saved.tensors[name].equal(TENSORS[name]) for name in TENSORS)


def test_no_checkpoint_is_none(tmp_path: Path) -> None:
    assert read_checkpoint(tmp_path / "missing") is None


def test_the_last_two_are_kept_under_growing_numbers(tmp_path: Path) -> None:
    for step in range(5):
        write_checkpoint(tmp_path, {"step": step}, TENSORS)

    assert sorted(path.name for path in tmp_path.iterdir()) == ["00000004", "00000005"]


def test_what_a_killed_writer_left_is_ignored_and_cleared(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, {"step": 1}, TENSORS)
    (tmp_path / ".tmp-00000002").mkdir()
    (tmp_path / ".tmp-00000002" / "state.json").write_text("{")

    saved = read_checkpoint(tmp_path)
    write_checkpoint(tmp_path, {"step": 2}, TENSORS)

    assert saved is not None and saved.state == {"step": 1}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["00000001", "00000002"]


def test_only_as_many_are_kept_as_asked_for(tmp_path: Path) -> None:
    for step in range(4):
        write_checkpoint(tmp_path, {"step": step}, TENSORS, keep=3)
    assert [path.name for path in sorted(tmp_path.iterdir())] == [f"0000000{n}" for n in (2, 3, 4)]

    write_checkpoint(tmp_path, {"step": 4}, TENSORS, keep=1)
    assert [path.name for path in tmp_path.iterdir()] == ["00000005"]


def test_checkpoints_are_their_owners_alone_to_read(tmp_path: Path) -> None:
    before = os.umask(0)  # the most careless one
    try:
        write_checkpoint(tmp_path / "checkpoints", {"step": 1}, TENSORS)
    finally:
        os.umask(before)
    for path in (tmp_path / "checkpoints", *(tmp_path / "checkpoints").rglob("*")):
        assert path.stat().st_mode & 0o777 == (0o700 if path.is_dir() else 0o600), path


def test_of_damaged_checkpoints_one_stays(tmp_path: Path) -> None:
    for step in range(1, 4):
        write_checkpoint(tmp_path, {"step": step}, TENSORS)
        (write_checkpoint(tmp_path, {"step": -step}, TENSORS) / "state.json").unlink()
        assert read_checkpoint(tmp_path) is not None
    assert len(list(tmp_path.glob("*.damaged"))) == 1


@pytest.mark.parametrize(
    ("file", "state"), [("state.safetensors", {"step": 2}), ("state.json", None)]
)
def test_the_state_of_a_damaged_checkpoint_is_given_if_it_is_sound(
    tmp_path: Path, file: str, state: dict[str, int] | None
) -> None:
    write_checkpoint(tmp_path, {"step": 1}, TENSORS)
    damage(write_checkpoint(tmp_path, {"step": 2}, TENSORS) / file, b"{}")
    found = read_checkpoint(tmp_path)
    assert found is not None and found.damaged == (state,)


@pytest.mark.timeout(30)
@pytest.mark.parametrize(
    ("file", "state"), [("state.safetensors", {"step": 2}), ("state.json", None)]
)
def test_a_pipe_in_a_checkpoint_is_damage_and_the_older_one_is_used(
    tmp_path: Path, file: str, state: dict[str, int] | None, caplog: pytest.LogCaptureFixture
) -> None:
    write_checkpoint(tmp_path, {"step": 1}, TENSORS)
    path = write_checkpoint(tmp_path, {"step": 2}, TENSORS) / file
    path.unlink()
    os.mkfifo(path)
    found = read_checkpoint(tmp_path)
    assert found is not None and (found.state, found.damaged) == ({"step": 1}, (state,))
    assert f"it is a named pipe, not a regular file: '{path}'" in caplog.text


def test_a_flipped_digit_of_the_state_is_damage(tmp_path: Path) -> None:
    path = write_checkpoint(tmp_path, {"step": 1}, TENSORS) / "state.json"
    path.write_text(path.read_text().replace('"step": 1', '"step": 3'))
    with pytest.raises(CheckpointError, match="a different state than was written"):
        read_checkpoint(tmp_path)


DAMAGE = [
    pytest.param("state.safetensors", b"\0" * 100, "a different sha256", id="overwritten"),
    pytest.param("state.safetensors", b"", "a different sha256", id="emptied"),
    pytest.param("state.safetensors", None, "FileNotFoundError", id="tensors gone"),
    pytest.param("state.json", b"{", "JSONDecodeError", id="half a state"),
    pytest.param("state.json", b"{}", "KeyError", id="an empty state"),
    pytest.param("state.json", b"[]", "TypeError", id="no state"),
    pytest.param("state.json", b"\xff", "UnicodeDecodeError", id="no text"),
    pytest.param("state.json", None, "FileNotFoundError", id="state gone"),
]


def damage(path: Path, content: bytes | None) -> None:
    if content is None:
        path.unlink()
    else:
        path.write_bytes(content)


@pytest.mark.parametrize(("file", "content", "problem"), DAMAGE)
def test_an_older_checkpoint_stands_in_for_a_damaged_one_which_is_set_aside(
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    file: str,
    content: bytes | None,
    problem: str,
) -> None:
    write_checkpoint(tmp_path, {"step": 1}, TENSORS)
    damage(write_checkpoint(tmp_path, {"step": 2}, TENSORS) / file, content)

    saved = read_checkpoint(tmp_path)

    assert saved is not None and saved.state == {"step": 1}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["00000001", "00000002.damaged"]
    [said] = [record.getMessage() for record in caplog.records]
    assert "00000002 is damaged" in said and problem in said and "older checkpoint 00000001" in said
    write_checkpoint(tmp_path, {"step": 3}, TENSORS)
    again = read_checkpoint(tmp_path)
    assert again is not None and again.state == {"step": 3}


@pytest.mark.parametrize(("file", "content", "problem"), DAMAGE)
def test_if_all_are_damaged_nothing_is_touched_and_the_error_says_what_to_do(
    tmp_path: Path, file: str, content: bytes | None, problem: str
) -> None:
    for step in (1, 2):
        damage(write_checkpoint(tmp_path, {"step": step}, TENSORS) / file, content)

    with pytest.raises(
        CheckpointError, match=f"(?s)00000002 .*{problem}.*00000001 .*{problem}.*remove {tmp_path}"
    ):
        read_checkpoint(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["00000001", "00000002"]
