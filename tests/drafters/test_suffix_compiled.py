"""Where the compiled search of the suffix index is kept."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from drafters.suffix import compiled
from drafters.suffix.index import SuffixIndex

PROPOSED = """
from drafters.suffix.index import SuffixIndex
index = SuffixIndex(2, 8, 100)
index.begin("a", [1, 2, 3, 4, 1, 2, 3])
print(index.propose(["a"], [3]))
"""


@pytest.fixture
def named_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """``NUMBA_CACHE_DIR``, and nothing remembered of another one."""
    monkeypatch.setenv("NUMBA_CACHE_DIR", str(tmp_path))
    compiled.folder.cache_clear()
    yield tmp_path
    compiled.folder.cache_clear()


def test_its_folder_is_the_owners_alone(named_folder: Path) -> None:
    found = compiled.folder()

    assert found.parent == named_folder
    assert found.stat().st_mode & 0o777 == 0o700


@pytest.mark.parametrize("mode", [0o720, 0o702, 0o777])
def test_code_that_others_may_have_put_there_is_not_executed(
    named_folder: Path, mode: int, caplog: pytest.LogCaptureFixture
) -> None:
    kept = compiled.folder()
    compiled.folder.cache_clear()
    kept.chmod(mode)

    found = compiled.folder()
    shutil.rmtree(found)

    assert found != kept and named_folder not in found.parents
    assert f"others can write {kept}" in caplog.text


@pytest.mark.parametrize("recent_tokens", [0, 1, 2, 50])
@pytest.mark.parametrize("bounds", [(1, 1), (2, 6)])
def test_every_index_calls_what_was_compiled(recent_tokens: int, bounds: tuple[int, int]) -> None:
    """Compiling for other types would hold up a server for seconds."""
    index = SuffixIndex(*bounds, recent_tokens)
    for key in "ab":
        index.begin(key, [1, 2, 3, 4, 1, 2, 3])
        index.extend([key], [[4, 1]])
        index.observe([key])
        index.propose([key], [3])
        index.finish(key, keep=True)

    native = compiled.wait()
    called = (native.extend, native.link_finished, native.look, native.draft)
    assert [len(function.signatures) for function in called] == [1] * 4


def test_damaged_code_is_compiled_again(tmp_path: Path) -> None:
    kept = compiled.folder()
    compiled.wait()
    shutil.copytree(kept, tmp_path / kept.name)
    for damaged in tmp_path.rglob("native.draft-*.nbc"):  # one of each checkout of these sources
        damaged.write_bytes(damaged.read_bytes()[:1000])

    shown = subprocess.run(
        [sys.executable, "-c", PROPOSED],
        env={**os.environ, "NUMBA_CACHE_DIR": str(tmp_path)},
        capture_output=True,
        text=True,
        check=True,
    )

    assert shown.stdout == "[[4, 1, 2]]\n"
    assert f"{tmp_path / kept.name} is damaged" in shown.stderr
