"""Finished demos, read from their folders."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import typer


def recording_of(run: Path) -> dict[str, Any]:
    """``recording.json`` of a demo.

    Raises:
        typer.BadParameter: the folder has none.
    """
    file = run / "recording.json"
    if not file.is_file():
        raise typer.BadParameter(f"{run} holds no {file.name}; name the folder of a finished demo")
    found: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    return found


FROM_FIRST = "engine.draft_at_start=null"
"""Setting of servers that are compared with themselves from their first requests on. Otherwise
those that come first wait for programs that are made beside them, and have short drafts."""
