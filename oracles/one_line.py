"""A copy of the source tree with one additional file and one additional catalog line.

Tests use it to show that adding a drafter, a policy, a buffer backend or a sampling field takes one
new file and one line: they add both to a copy and run it in a separate process.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

from oracles.forked import run_forked
from oracles.support import REPOSITORY

FOLDERS = (
    "serving", "trainer", "drafters", "policies", "targets", "buffer", "reporting", "configs",
    "kernels", "oracles",
)  # fmt: skip


def with_addition(
    tmp_path: Path, new_file: str, text: str, catalog_file: str, line: str, after: str
) -> Path:
    """Copy the source packages to ``tmp_path``, write one file and insert one line.

    Args:
        tmp_path: parent of the copy, which is the folder ``house``.
        new_file: path of the new file within the copy, e.g. ``buffer/list_log.py``.
        text: its content.
        catalog_file: path of the file that gets the line, e.g. ``buffer/backends.py``.
        line: the line to insert, including indentation.
        after: text on exactly one line of ``catalog_file``; ``line`` is inserted below that line.

    Returns:
        Root of the copy.

    Raises:
        ValueError: ``new_file`` exists already, ``line`` is more than one line, or ``after`` is not
            on exactly one line.
    """
    root = tmp_path / "house"
    for folder in FOLDERS:
        shutil.copytree(
            REPOSITORY / folder, root / folder, ignore=shutil.ignore_patterns("__pycache__")
        )
    path = root / new_file
    if path.exists():
        raise ValueError(f"{new_file} exists already; choose another name for the new file")
    path.write_text(text)
    _insert_line(root / catalog_file, line.removesuffix("\n"), after)
    return root


def run_in(root: Path, code: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run ``python -c code arguments`` on the copy at ``root``; the repository is not on its path.

    Returns:
        The finished process; standard output and error as text.

    Raises:
        subprocess.TimeoutExpired: it ran for more than 100 s.
    """
    path = os.pathsep.join([str(root), str(root / "kernels")])
    env = {**os.environ, "PYTHONPATH": path, "PYTHONDONTWRITEBYTECODE": "1"}
    return run_forked(["-c", code, *arguments], env, root, timeout=100)


def _insert_line(path: Path, line: str, after: str) -> None:
    if "\n" in line:
        raise ValueError(f"an addition is one line, got {line!r}")
    lines = path.read_text().splitlines()
    found = [index for index, existing in enumerate(lines) if after in existing]
    if len(found) != 1:
        raise ValueError(f"{path.name} must have {after!r} on exactly one line, has {len(found)}")
    lines.insert(found[0] + 1, line)
    path.write_text("\n".join(lines) + "\n")
