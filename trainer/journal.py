"""What the trainer says of itself: ``log.jsonl``, one event a line, and ``status.json``, now."""

from __future__ import annotations

import json
import math
import os
import time
from pathlib import Path
from typing import Any


class Journal:
    """Appends events and replaces the status. Readers never see half a status."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._status_path = folder / "status.json"
        self._log_path = folder / "log.jsonl"
        if self._log_path.exists() and not _ends_a_line(self._log_path):
            self._append(b"\n")  # behind what a killed trainer left

    def event(self, name: str, /, **values: Any) -> None:
        """Append ``{"event": name, "unix_ms": now, ...}``; NaN and infinities become null."""
        line = {"event": name, "unix_ms": int(time.time() * 1000), **values}
        self._append(json.dumps(_plain(line), allow_nan=False).encode() + b"\n")

    def status(self, values: dict[str, Any]) -> None:
        """Replace ``status.json``; after a power cut it may be an old one."""
        body = {"unix_ms": int(time.time() * 1000), "pid": os.getpid(), **values}
        aside = self._status_path.with_suffix(".tmp")
        aside.write_text(json.dumps(_plain(body), allow_nan=False, indent=1))
        aside.replace(self._status_path)

    def _append(self, text: bytes) -> None:
        with self._log_path.open("ab") as file:
            file.write(text)


def _ends_a_line(path: Path) -> bool:
    content_end = path.stat().st_size
    with path.open("rb") as file:
        file.seek(max(content_end - 1, 0))
        return file.read(1) in (b"\n", b"")


def _plain(value: Any) -> Any:
    """JSON has no NaN."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
