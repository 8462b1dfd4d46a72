"""Whether a path still leads to an open file, and what is not opened at all."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from pathlib import Path

import pytest

from buffer.audit import FILE, audit
from buffer.files import NotRegularError, leads_to, open_regular, read_regular, write_durably


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


def make_link(path: Path) -> None:
    path.with_name("target").write_bytes(b"target")
    path.symlink_to(path.with_name("target"))


def make_socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as made:
        made.bind(str(path))


def make_link_to_a_device(path: Path) -> None:
    path.symlink_to("/dev/zero")


FOREIGN = [
    pytest.param(os.mkfifo, "a named pipe", id="pipe"),
    pytest.param(os.mkdir, "a folder", id="folder"),
    pytest.param(make_socket, "a socket", id="socket"),
    pytest.param(make_link, "a link", id="link"),
]


@pytest.mark.timeout(30)
@pytest.mark.parametrize(("make", "kind"), FOREIGN)
@pytest.mark.parametrize("flags", [os.O_RDONLY, os.O_WRONLY | os.O_CREAT, os.O_RDWR])
def test_only_regular_files_are_opened(
    tmp_path: Path, make: Callable[[Path], None], kind: str, flags: int
) -> None:
    path = tmp_path / "file"
    make(path)
    with pytest.raises(NotRegularError) as error:
        open_regular(path, flags)
    assert error.value.strerror == f"it is {kind}, not a regular file"
    assert error.value.filename == str(path)


@pytest.mark.timeout(30)
def test_a_link_is_followed_where_one_may_be_but_not_to_a_device(tmp_path: Path) -> None:
    make_link(tmp_path / "link")
    assert read_regular(tmp_path / "link", follow=True) == b"target"
    assert read_regular(tmp_path / "link", 3, follow=True) == b"tar"
    make_link_to_a_device(tmp_path / "zeros")
    with pytest.raises(NotRegularError, match="it is a device, not a regular file"):
        read_regular(tmp_path / "zeros", follow=True)


@pytest.mark.timeout(30)
@pytest.mark.parametrize(("make", "kind"), FOREIGN)
def test_what_lies_in_the_place_of_a_file_is_not_written_to(
    tmp_path: Path, make: Callable[[Path], None], kind: str
) -> None:
    make(tmp_path / "file")
    with pytest.raises(NotRegularError, match=kind):
        write_durably(tmp_path / "file", b"text")
    if kind == "a link":
        assert (tmp_path / "target").read_bytes() == b"target"


@pytest.mark.timeout(30)
@pytest.mark.parametrize(("make", "kind"), FOREIGN)
def test_an_audit_line_without_a_regular_file_is_lost_with_a_warning(
    tmp_path: Path, make: Callable[[Path], None], kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    make(tmp_path / FILE)
    audit(tmp_path, "write", "log:")
    assert f"it is {kind}, not a regular file: '{tmp_path / FILE}'" in caplog.text
    if kind == "a link":
        assert (tmp_path / "target").read_bytes() == b"target"
