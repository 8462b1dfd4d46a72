"""Reads a run of Weights & Biases back from its ``.wandb`` file, without their service.

The file is a log in LevelDB's format behind 7 bytes of their own, and each entry a ``Record`` of
their protocol buffers.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

_BLOCK = 32 << 10
_HEADER = 7
"""Bytes in front of the first entry, and of the header of each piece: checksum, length, type."""
_FULL, _FIRST, _LAST = 1, 2, 4


@dataclass(frozen=True)
class OfflineRun:
    """What one process logged."""

    folder: Path
    group: str
    job_type: str
    config: dict[str, Any]
    steps: dict[str, str] = field(default_factory=dict)
    """Figure, or the beginning of its name with ``*``, -> the figure it is drawn over."""
    rows: list[dict[str, Any]] = field(default_factory=list)
    """Figures that were logged together."""
    alerts: list[str] = field(default_factory=list)
    artifacts: list[str] = field(default_factory=list)

    def names(self) -> set[str]:
        """All figures and tables."""
        return {name for row in self.rows for name in row}

    def table(self, name: str) -> list[dict[str, Any]]:
        """Rows of the newest state of a table."""
        shown = [row[name] for row in self.rows if name in row][-1]
        stored = json.loads((self.folder / "files" / shown["path"]).read_text())
        return [dict(zip(stored["columns"], row, strict=True)) for row in stored["data"]]


def offline_runs(run_dir: Path) -> dict[str, OfflineRun]:
    """Runs that server and trainer have logged in ``run_dir``, by their role; the newest of each.

    Raises:
        ValueError: a file is damaged.
    """
    files = sorted(run_dir.glob("wandb/offline-run-*/*.wandb"), key=lambda f: f.stat().st_mtime)
    runs = [_read(path) for path in files]
    return {run.job_type: run for run in runs}


def _read(path: Path) -> OfflineRun:
    from wandb.proto.wandb_internal_pb2 import Record  # type: ignore[attr-defined]

    found: OfflineRun | None = None
    for content in _entries(path.read_bytes()):
        record: Any = Record()
        record.ParseFromString(content)
        kind = record.WhichOneof("record_type")
        if kind == "run" and found is None:
            config = {one.key: json.loads(one.value_json) for one in record.run.config.update}
            found = OfflineRun(path.parent, record.run.run_group, record.run.job_type, config)
        elif found is not None:
            _take(found, kind, record)
    if found is None:
        raise ValueError(f"{path} holds no run")
    return found


def _take(run: OfflineRun, kind: str, record: Any) -> None:
    match kind:
        case "history":
            row: dict[str, Any] = {}
            for one in record.history.item:
                first, *rest = one.nested_key or [one.key]
                value = json.loads(one.value_json)
                if rest:  # one field of a table
                    row.setdefault(first, {})[".".join(rest)] = value
                else:
                    row[first] = value
            run.rows.append(row)
        case "metric":
            metric = record.metric
            run.steps[metric.name or metric.glob_name] = metric.step_metric
        case "alert":
            run.alerts.append(record.alert.title)
        case "artifact":
            run.artifacts.append(record.artifact.name)
        case "request" if record.request.WhichOneof("request_type") == "log_artifact":
            run.artifacts.append(record.request.log_artifact.artifact.name)


def _entries(content: bytes) -> Iterator[bytes]:
    """Entries of a log; ``content`` begins with the file's own bytes, which count to a block."""
    at, parts = _HEADER, list[bytes]()
    while at + _HEADER <= len(content):
        left = _BLOCK - at % _BLOCK
        if left < _HEADER:
            at += left
            continue
        length = int.from_bytes(content[at + 4 : at + 6], "little")
        kind = content[at + 6]
        if kind == 0:
            return
        start = at + _HEADER
        if start + length > len(content):
            raise ValueError("the last entry is cut off")
        parts = [] if kind in (_FULL, _FIRST) else parts
        parts.append(content[start : start + length])
        if kind in (_FULL, _LAST):
            yield b"".join(parts)
        at = start + length
