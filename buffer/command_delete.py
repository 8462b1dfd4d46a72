"""``buffer delete``: remove everything of a tenant from the buffer that ``buffer.url`` names."""

from __future__ import annotations

import json
import re
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from buffer.audit import audit
from buffer.backends import open_backend
from buffer.command_line import RunArgument, located, refusing
from buffer.deletions import digest_of
from configs.cli import ConfigOption, SetOption, settings_from_cli
from configs.urls import shown_url


def delete(
    tenant: Annotated[
        str,
        typer.Option(help="whose traces: the ``user`` of requests; ``default`` for those without"),
    ],
    place: RunArgument = None,
    run: Annotated[
        Path | None, typer.Option(help="run folder of a URL; by default run_dir of the settings")
    ] = None,
    config: ConfigOption = None,
    set_: SetOption = None,
    as_json: Annotated[bool, typer.Option("--json", help="one JSON object")] = False,
) -> None:
    """Delete all traces of a tenant from the buffer, put-aside ones among them. Servers drop what
    they still hold of it, and trainers what they learn from, within seconds.

    What the tenant sends from now on is captured again: capture.excluded_tenants prevents that.

    Exit code 0: done. 2: wrong usage or settings, or the buffer cannot be reached or cannot delete;
    repeat it then.
    """
    settings = settings_from_cli(config, set_, print_config=False, loads_target=False)
    if run is not None:
        settings = settings.model_copy(update={"run_dir": run})
    with refusing():
        url, run_dir = located(place, settings)
        try:
            backend = open_backend(url, run_dir)
            found = backend.delete(tenant)
        except (ValueError, OSError) as error:
            audit(run_dir, "delete", url, tenant=digest_of(tenant), failed=type(error).__name__)
            raise
    audit(
        run_dir, "delete", url, tenant=digest_of(tenant), records=found.records,
        quarantined=found.quarantined,
    )  # fmt: skip
    if as_json:
        typer.echo(json.dumps(asdict(found)))
        return
    typer.echo(
        f"deleted {found.records} records of {found.num_bytes} bytes, and {found.quarantined} that "
        f"were put aside; {shown_url(url)} of {_run_of(url, run_dir)}"
    )
    if not found.records and not found.quarantined:
        typer.echo(
            "nothing of this tenant was there: is it the right run? It is named by a run folder, "
            "by --run, or by ?run=NAME in the URL of a service"
        )
    if found.remains is not None:
        typer.echo(found.remains)


def _run_of(url: str, run_dir: Path) -> str:
    """The run whose traces were meant: a service's URL may name another one than the settings."""
    named = re.search(r"[?&]run=([A-Za-z0-9._-]+)", url)
    return f"run {named[1]}" if named else str(run_dir)
