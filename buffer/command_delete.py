"""``buffer delete``: remove everything of a tenant from the buffer that ``buffer.url`` names."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from buffer.audit import audit
from buffer.backends import open_backend
from buffer.deletions import digest_of
from configs.cli import ConfigOption, SetOption, settings_from_cli


def delete(
    tenant: Annotated[
        str,
        typer.Option(help="whose traces: the ``user`` of requests; ``default`` for those without"),
    ],
    url: Annotated[
        str | None, typer.Argument(help="by default buffer.url of the settings", metavar="URL")
    ] = None,
    run: Annotated[
        Path | None, typer.Option(help="run folder; by default run_dir of the settings")
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
    run_dir, place = run or settings.run_dir, url or settings.buffer.url
    try:
        found = open_backend(place, run_dir).delete(tenant)
    except (ValueError, OSError) as error:
        audit(run_dir, "delete", place, tenant=digest_of(tenant), failed=type(error).__name__)
        typer.echo(str(error), err=True)
        raise typer.Exit(code=2) from error
    audit(
        run_dir, "delete", place, tenant=digest_of(tenant), records=found.records,
        quarantined=found.quarantined,
    )  # fmt: skip
    if as_json:
        typer.echo(json.dumps(asdict(found)))
        return
    typer.echo(
        f"deleted {found.records} records of {found.num_bytes} bytes, and {found.quarantined} that "
        f"were put aside"
    )
    if found.remains is not None:
        typer.echo(found.remains)
