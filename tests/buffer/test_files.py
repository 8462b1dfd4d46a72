"""Whether a path still leads to an open file."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from buffer.files import leads_to


def delete(path: Path) -> None:
    path.unlink()


def replace_by_another(path: Path) -> None:
    path.with_name("aside").write_bytes(b"same")
    path.with_name("aside").replace(path)


def delete_its_folder(path: Path) -> None:
    path.unlink()
    path.parent.rmdir()


def put_a_file_where_its_folder_was(path: Path) -> None:
    delete_its_folder(path)
    path.parent.write_bytes(b"")


@pytest.mark.parametrize(
    "change",
    [delete, replace_by_another, delete_its_folder, put_a_file_where_its_folder_was],
)
def test_a_file_that_is_gone_or_replaced_is_noticed(
    tmp_path: Path, change: Callable[[Path], None]
) -> None:
    path = tmp_path / "folder" / "file"
    path.parent.mkdir()
    path.write_bytes(b"same")
    descriptor = os.open(path, os.O_RDONLY)
    try:
        assert leads_to(path, descriptor)
        change(path)
        assert not leads_to(path, descriptor)
    finally:
        os.close(descriptor)
