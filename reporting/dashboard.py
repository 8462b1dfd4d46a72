"""The dashboard at Weights & Biases, as code.

    python -m reporting.dashboard --entity TEAM --project slipstream    # saves it there
    python -m reporting.dashboard --print                               # prints it as JSON

It shows every figure and table of ``reporting.names``, of all runs of the project by their groups,
on one time axis. ``dashboard.json`` is what it was last; a test compares.

Exit code 0: saved or printed. 1: Weights & Biases refused it. 2: wrong usage.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer

from reporting.names import (
    FIGURES,
    GATE,
    PAYBACK,
    PER_DRAFTER,
    POLICY,
    SERVER,
    TABLES,
    TIME,
    TRAINER,
    pattern_of,
)

GOLDEN = Path(__file__).with_name("dashboard.json")
NAME = "Slipstream"
_TOGETHER: tuple[tuple[str, ...], ...] = (
    ("gate/candidate", "gate/incumbent"),
    ("payback/spent_s", "payback/saved_s", "payback/saved_by_learning_s"),
    ("server/requests_running", "server/requests_waiting"),
)
"""Figures that share a panel."""


def workspace(entity: str, project: str) -> Any:
    """The dashboard, as a ``Workspace`` of wandb-workspaces."""
    import wandb_workspaces.workspaces as ws

    sections = [
        ws.Section(name=name, panels=panels, is_open=True)
        for name, panels in (
            ("Serving", _curves(SERVER)),
            ("Learning", _curves(TRAINER)),
            ("Gate and domains", _curves(GATE)),
            ("Draft policy", _curves(POLICY)),
            ("Payback", _curves(PAYBACK)),
            ("Swaps and gate decisions", _tables()),
        )
    ]
    return ws.Workspace(
        entity=entity,
        project=project,
        name=NAME,
        sections=sections,
        settings=ws.WorkspaceSettings(x_axis=TIME),
        runset_settings=ws.RunsetSettings(groupby=[ws.Metric("Group")]),
        auto_generate_panels=False,
    )


def _curves(names: dict[str, str]) -> list[Any]:
    import wandb_workspaces.reports.v2.interface as wr

    panels = []
    for group in _grouped(names):
        title = " / ".join(group)
        if "{" in title or not PER_DRAFTER.isdisjoint(group):
            patterns = "|".join(map(pattern_of, group))
            panels.append(wr.LinePlot(title=title, x=TIME, metric_regex=patterns))
        else:
            panels.append(wr.LinePlot(title=title, x=TIME, y=list(group)))
    return panels


def _grouped(names: dict[str, str]) -> Iterator[tuple[str, ...]]:
    shown: set[str] = set()
    for name in names:
        group = next((group for group in _TOGETHER if name in group), (name,))
        if not shown.issuperset(group):
            shown.update(group)
            yield group


def _tables() -> list[Any]:
    import wandb_workspaces.reports.v2.interface as wr

    return [wr.WeavePanelSummaryTable(table_name=name) for name in TABLES]


def as_json(entity: str = "ENTITY", project: str = "PROJECT") -> str:
    """The dashboard as Weights & Biases stores it, without the ids that differ from time to
    time."""
    text = workspace(entity, project)._to_model().model_dump_json(by_alias=True, exclude_none=True)
    plain = _numbered(json.loads(text), {})
    return json.dumps(plain, indent=1, sort_keys=True) + "\n"


def _numbered(value: Any, ids: dict[str, str]) -> Any:
    """The same with every random id replaced by its number."""
    if isinstance(value, dict):
        return {key: _id(item, ids) if _is_id(key, item) else _numbered(item, ids)
                for key, item in value.items()}  # fmt: skip
    return [_numbered(item, ids) for item in value] if isinstance(value, list) else value


def _is_id(key: str, value: Any) -> bool:
    return key in ("__id__", "id", "ref") and isinstance(value, str) and bool(
        re.fullmatch(r"[a-z0-9]{8,}", value)
    )  # fmt: skip


def _id(value: str, ids: dict[str, str]) -> str:
    return ids.setdefault(value, f"id{len(ids)}")


def figures_of(text: str) -> tuple[set[str], set[str], set[str]]:
    """What a dashboard names.

    Args:
        text: JSON, as of ``as_json``.

    Returns:
        Names of figures, regular expressions of figures, names of tables.
    """
    names: set[str] = set()
    patterns: set[str] = set()
    tables: set[str] = set()
    for panel in _panels(json.loads(text)):
        config = panel.get("config", {})
        names.update(config.get("metrics", ()))
        if regex := config.get("metricRegex"):
            patterns.update(regex.split("|"))
        tables |= {name for name in TABLES if name in json.dumps(config.get("panel2Config", {}))}
    return names, patterns, tables


def _panels(value: Any) -> Iterator[dict[str, Any]]:
    if isinstance(value, dict):
        if "viewType" in value and "config" in value:
            yield value
        for item in value.values():
            yield from _panels(item)
    elif isinstance(value, list):
        for item in value:
            yield from _panels(item)


def main(
    entity: Annotated[str | None, typer.Option(help="user or team that owns the project")] = None,
    project: Annotated[str, typer.Option(help="setting wandb.project")] = "slipstream",
    print_: Annotated[bool, typer.Option("--print", help="print it, save nothing")] = False,
) -> None:
    """Save the dashboard at Weights & Biases, or print it."""
    try:
        import wandb_workspaces  # noqa: F401
    except ImportError:
        typer.echo("the dashboard needs the package wandb-workspaces, which is not installed: "
                   "pip install 'slipstream-serving[wandb]'", err=True)  # fmt: skip
        raise typer.Exit(code=2) from None
    if print_:
        typer.echo(as_json(entity or "ENTITY", project), nl=False)
        return
    if entity is None:
        raise typer.BadParameter(
            "name the user or team that owns the project", param_hint="--entity"
        )
    from wandb.errors import Error

    try:
        saved = workspace(entity, project).save()
    except Error as error:  # no key, no such entity, or no way there
        typer.echo(f"the dashboard is not saved: {error}", err=True)
        raise typer.Exit(code=1) from None
    typer.echo(saved.url)


if __name__ == "__main__":
    typer.run(main)

__all__ = ["FIGURES", "GOLDEN", "as_json", "figures_of", "workspace"]
