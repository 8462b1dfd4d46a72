"""A new writer takes one file and one line in the catalog; then it gets what is reported."""

from __future__ import annotations

import json
from pathlib import Path

from oracles.one_line import run_in, with_addition

LINES = '''
"""Figures as lines of JSON, in the run folder."""

import json
from pathlib import Path

from reporting.interface import WriterKind


class Lines:
    def __init__(self, greeting):
        self._file = Path(greeting.folder, f"{greeting.role}.lines").open("a")

    def figures(self, record):
        print(json.dumps({"unix_s": record.unix_s, **record.values}), file=self._file)

    def row(self, record):
        pass

    def alert(self, record):
        pass

    def bundle(self, record):
        pass

    def close(self):
        self._file.close()


KIND = WriterKind(
    extra="none",
    module="json",
    asked_by=lambda settings: "always",
    section=lambda settings: {},
    open=Lines,
    where=lambda settings: None,
)
'''
LINE = '    "lines": "reporting.lines:KIND",'

PLAY = """
import sys
from pathlib import Path

from configs.schema import Settings
from reporting.reports import reports_of

with reports_of(Settings(run_dir=Path(sys.argv[1])), "server") as reports:
    reports.figures({"server/version": 3}, unix_s=5.0)
print(reports.counts())
"""


def test_a_new_writer_takes_one_file_and_one_line(tmp_path: Path) -> None:
    root = with_addition(
        tmp_path, "reporting/lines.py", LINES, "reporting/catalog.py", LINE, '    "wandb": "'
    )
    run_dir = tmp_path / "run"
    run_dir.mkdir()

    done = run_in(root, PLAY, str(run_dir))

    assert done.returncode == 0, done.stderr
    assert "{'lines': {'written': 1, 'dropped': 0, 'failed': 0}}" in done.stdout
    [line] = (run_dir / "server.lines").read_text().splitlines()
    assert json.loads(line) == {"unix_s": 5.0, "server/version": 3.0}
