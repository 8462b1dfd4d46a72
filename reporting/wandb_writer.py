"""Weights & Biases: one run for the server and one for the trainer, in one group.

Nothing is sent but what records say and ``Greeting.facts``: no console output, no code, no git
state, no command line, no list of packages, no figures of the machine.
"""

from __future__ import annotations

import os
import time
from collections import deque
from pathlib import Path
from typing import TYPE_CHECKING, Any

from configs.schema import Settings
from reporting.interface import WriterKind
from reporting.names import FIGURES, TABLES, TIME
from reporting.records import Alert, Bundle, Cell, Figures, Greeting, Row

if TYPE_CHECKING:
    import wandb

_TABLE_ROWS = 500
"""Newest rows of a table that are kept: each write is of the whole table."""
_TABLE_EVERY_S = 30.0
"""Least time between two writes of a table; what came meanwhile is in the next one."""
_ALERT_EVERY_S = 60
"""Alerts of one title within this time are one."""


class _Table:
    """Newest rows of a table."""

    def __init__(self) -> None:
        self.rows: deque[dict[str, Cell]] = deque(maxlen=_TABLE_ROWS)
        self.columns: list[str] = [TIME]
        self.is_written = True
        self.written_s = -_TABLE_EVERY_S

    def add(self, record: Row) -> None:
        self.columns += [name for name in record.cells if name not in self.columns]
        self.rows.append({TIME: record.unix_s, **record.cells})
        self.is_written = False

    def data(self) -> list[list[Any]]:
        return [[row.get(name) for name in self.columns] for row in self.rows]


class WandbWriter:
    """Implements ``Writer``."""

    def __init__(self, greeting: Greeting) -> None:
        folder = Path(greeting.folder)
        _keep_files_in(folder / "wandb")
        import wandb

        self._wandb = wandb
        self._keeps_bundles = bool(greeting.settings["artifacts"])
        self._group = greeting.group
        self._run: wandb.Run = wandb.init(
            project=_text(greeting.settings["project"]),
            entity=_text(greeting.settings["entity"]),
            group=greeting.group,
            job_type=greeting.role,
            name=f"{greeting.group} {greeting.role}",
            dir=str(folder),
            config=greeting.facts,
            settings=_settings(wandb, greeting),
        )
        self._run.define_metric(TIME, hidden=True)
        for name in FIGURES:
            glob = name.partition("{")[0]
            self._run.define_metric(f"{glob}*" if "{" in name else name, step_metric=TIME)
        self._run.define_metric("beside/*", step_metric=TIME)
        for name in TABLES:
            self._run.define_metric(name, step_metric=TIME)
        self._tables = {name: _Table() for name in TABLES}

    def figures(self, record: Figures) -> None:
        self._run.log({TIME: record.unix_s, **record.values})
        self._write_tables(record.unix_s, is_last=False)

    def row(self, record: Row) -> None:
        self._tables[record.table].add(record)
        self._write_tables(record.unix_s, is_last=False)

    def alert(self, record: Alert) -> None:
        self._run.alert(record.title, record.text, level="WARN", wait_duration=_ALERT_EVERY_S)

    def bundle(self, record: Bundle) -> None:
        if not self._keeps_bundles:
            return
        artifact = self._wandb.Artifact(
            "-".join(filter(None, (_artifact_name(self._group), "drafter", record.drafter))),
            type="drafter",
            metadata={"version": record.version, **record.facts},
        )
        artifact.add_dir(record.folder)
        self._run.log_artifact(artifact, aliases=[f"version-{record.version}"])

    def close(self) -> None:
        self._write_tables(time.time(), is_last=True)
        self._run.finish()

    def _write_tables(self, unix_s: float, *, is_last: bool) -> None:
        now_s = time.monotonic()
        for name, table in self._tables.items():
            is_due = is_last or now_s - table.written_s >= _TABLE_EVERY_S
            if table.is_written or not is_due:
                continue
            shown = self._wandb.Table(
                columns=list(table.columns), data=table.data(), allow_mixed_types=True
            )
            self._run.log({TIME: unix_s, name: shown})
            table.is_written, table.written_s = True, now_s


def _settings(wandb: Any, greeting: Greeting) -> Any:
    return wandb.Settings(
        mode=greeting.settings["mode"],
        console="off",
        silent=True,
        disable_git=True,
        disable_code=True,
        disable_job_creation=True,
        save_code=False,
        x_disable_meta=True,
        x_disable_stats=True,
        x_disable_machine_info=True,
        x_save_requirements=False,
        host="",
    )


def _keep_files_in(folder: Path) -> None:
    """Have W&B keep what it stages and caches in the run folder, unless the environment says
    where."""
    for name in ("data", "cache", "artifact"):
        os.environ.setdefault(f"WANDB_{name.upper()}_DIR", str(folder / name))


def _text(value: object) -> str | None:
    return None if value is None else str(value)


def _artifact_name(group: str) -> str:
    return "".join(c if c.isascii() and (c.isalnum() or c in "._-") else "-" for c in group)


def _asked_by(settings: Settings) -> str | None:
    mode = settings.wandb.mode
    return None if mode == "disabled" else f"wandb.mode {mode!r}"


def _where(settings: Settings) -> str | None:
    if settings.wandb.mode == "online":
        return f"at Weights & Biases, project {settings.wandb.project!r}"
    return (
        f"wandb sync {settings.run_dir / 'wandb'}/offline-run-*    # sends it to Weights & Biases\n"
        f"python -m reporting.dashboard --entity YOURS --project {settings.wandb.project}"
    )


KIND = WriterKind(
    extra="wandb",
    module="wandb",
    asked_by=_asked_by,
    section=lambda settings: settings.wandb.model_dump(mode="json"),
    open=WandbWriter,
    where=_where,
)
