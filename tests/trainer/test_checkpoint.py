"""A checkpoint is there whole or not at all, and a damaged one is never taken for none."""

from __future__ import annotations

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
