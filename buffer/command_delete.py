"""``buffer delete`` and ``buffer undelete``: remove everything of a tenant from the buffer that
``buffer.url`` names, list such deletions, and take one back."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, TypeVar

import typer

from buffer.audit import Action, audit
from buffer.command_line import (
    JsonOption,
    RunArgument,
    check_path,
    located,
    opened,
    refusing,
    unix_ms,
)
from buffer.deletions import digest_of, is_digest
from buffer.interface import Backend
from configs.cli import ConfigOption, SetOption, settings_from_cli
from configs.schema import Settings
from configs.urls import shown_url

_Found = TypeVar("_Found")
_NAMES_PATH = re.compile(r"[a-z]+:/(?!/)")
RunFolderOption = Annotated[
    Path | None,
    typer.Option("--run", help="run folder of a URL; by default run_dir of the settings"),
]


def delete(
    place: RunArgument = None,
    tenant: Annotated[
        str | None,
        typer.Option(help="whose traces: the ``user`` of requests; ``default`` for those without"),
    ] = None,
    list_: Annotated[
        bool,
        typer.Option(
            "--list",
            help="delete nothing: print what was deleted, by digests of tenants, and until when",
        ),
    ] = False,
    until: Annotated[
        str | None,
        typer.Option(
            help="traces that ended until then are dropped if they still arrive, ISO 8601, or "
            "``now``; by default until now, but at most an hour after the newest stored trace, "
            "since this machine's clock may be wrong"
        ),
    ] = None,
    run: RunFolderOption = None,
    config: ConfigOption = None,
    set_: SetOption = None,
    as_json: JsonOption = False,
) -> None:
    """Delete all traces of a tenant from the buffer, put-aside ones among them. Servers drop what
    they still hold of it, and trainers what they learn from, within seconds.

    What the tenant sends from now on is captured again: capture.excluded_tenants prevents that.

    Exit code 0: done. 2: wrong usage or settings, or the buffer cannot be reached or cannot delete;
    repeat it then.
    """
    settings = _settings(config, set_, run)
    with refusing():
        if list_:
            if until is not None:
                raise ValueError("--list deletes nothing, so it takes no --until")
            _print_list(place, settings, tenant, as_json)
            return
        if tenant is None:
            raise ValueError("name a tenant with --tenant, or look with --list")
        until_ms = _now_ms() if until == "now" else unix_ms(until, "--until")
        url, run_dir = located(place, settings)
        found, facts = _noted(
            url,
            run_dir,
            "delete",
            digest_of(tenant),
            lambda backend: backend.delete(tenant, until_ms=until_ms),
        )
        audit(
            run_dir, "delete", url, **facts, records=found.records, quarantined=found.quarantined,
            until_ms=found.until_ms,
        )  # fmt: skip
    if as_json:
        typer.echo(json.dumps(asdict(found)))
        return
    typer.echo(
        f"deleted {found.records} records of {found.num_bytes} bytes, and {found.quarantined} that "
        f"were put aside; {_place_of(url, run_dir)}"
    )
    if not found.records and not found.quarantined:
        typer.echo(
            "nothing of this tenant was there: is it the right run? It is named by a run folder, "
            "by --run, or by ?run=NAME in the URL of a service"
        )
    if found.until_ms is not None:
        late = "" if until or found.until_ms >= _now_ms() - _CLOSE_MS else _LATE
        typer.echo(f"what ended until {_time(found.until_ms)} is dropped if it still arrives{late}")
    if found.remains is not None:
        typer.echo(found.remains)


def undelete(
    place: RunArgument = None,
    tenant: Annotated[str | None, typer.Option(help="whose deletion is taken back")] = None,
    digest: Annotated[
        str | None, typer.Option(help="the same by its digest, as ``delete --list`` prints it")
    ] = None,
    run: RunFolderOption = None,
    config: ConfigOption = None,
    set_: SetOption = None,
    as_json: JsonOption = False,
) -> None:
    """Take the deletion of a tenant off the list, so that its traces are kept again, for example
    after one that was made with a wrong ``--until``. What was removed does not come back; on
    Kafka, which removes nothing, readers that come to the tenant's old traces get them again.

    Exit code 0: done. 1: no such deletion is listed. 2: wrong usage or settings, or the buffer
    cannot be reached.
    """
    settings = _settings(config, set_, run)
    with refusing():
        if (tenant is None) == (digest is None):
            raise ValueError("name either a --tenant or a --digest")
        if digest is not None and not is_digest(digest):  # a name must not get into the audit
            raise ValueError("--digest is none that ``delete --list`` prints; name a --tenant?")
        name = digest or digest_of(tenant or "")
        url, run_dir = located(place, settings)
        was_listed, facts = _noted(
            url, run_dir, "undelete", name, lambda backend: backend.undelete(name)
        )
        audit(run_dir, "undelete", url, **facts, was_listed=was_listed)
    where = _place_of(url, run_dir)
    if as_json:
        typer.echo(json.dumps({"digest": name, "was_listed": was_listed}))
    elif was_listed:
        typer.echo(f"the deletion of {name} was taken back; {where}")
    else:
        typer.echo(f"no deletion of {name} is listed; {where}")
    if not was_listed:
        raise typer.Exit(code=1)


_CLOSE_MS = 60_000
_LATE = (
    ": an hour after the newest stored trace, which is earlier than now by the clock of this "
    "machine. If that is right and something newer may still be on its way, repeat it with "
    "--until now"
)


def _settings(config: ConfigOption, set_: SetOption, run: Path | None) -> Settings:
    settings = settings_from_cli(config, set_, print_config=False, loads_target=False)
    if run is None:
        return settings
    with refusing():
        check_path("--run", run)
    return settings.model_copy(update={"run_dir": run})


def _noted(
    url: str,
    run_dir: Path,
    action: Action,
    digest: str,
    change: Callable[[Backend], _Found],
) -> tuple[_Found, dict[str, str | None]]:
    """Change what is listed of a tenant. That it failed is noted here; what to note otherwise is
    returned."""
    facts: dict[str, str | None] = {"tenant": digest}
    try:
        backend = opened(url, run_dir)
        facts["run"] = backend.run
        return change(backend), facts
    except (ValueError, OSError) as error:
        audit(run_dir, action, url, **facts, failed=type(error).__name__)
        raise


def _print_list(place: str | None, settings: Settings, tenant: str | None, as_json: bool) -> None:
    url, run_dir = located(place, settings)
    backend = opened(url, run_dir)
    listed = backend.deletions().until_ms
    audit(run_dir, "deletions", url, run=backend.run, num_listed=len(listed))
    wanted = None if tenant is None else digest_of(tenant)
    shown = {digest: ms for digest, ms in sorted(listed.items()) if wanted in (None, digest)}
    for digest, until_ms in shown.items():
        if as_json:
            typer.echo(json.dumps({"digest": digest, "until_ms": until_ms}))
        else:
            ahead = " (in the future)" if until_ms > _now_ms() else ""
            typer.echo(f"{digest}: what ended until {_time(until_ms)}{ahead}")
    if not shown and not as_json:
        typer.echo(f"no deletion is listed; {_place_of(url, run_dir)}")


def _now_ms() -> int:
    return int(datetime.now(UTC).timestamp() * 1000)


def _time(unix_ms: int) -> str:
    try:
        return datetime.fromtimestamp(unix_ms / 1000, UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
    except (ValueError, OverflowError, OSError):  # somebody has asked for year 100,000
        return f"{unix_ms} ms of Unix time"


def _place_of(url: str, run_dir: Path) -> str:
    """The buffer that was meant, and of which run: a service's URL may name another one than the
    settings, and that of a folder or a socket names all there is."""
    if _NAMES_PATH.match(url):
        return shown_url(url)
    named = re.search(r"[?&]run=([A-Za-z0-9._-]+)", url)
    return f"{shown_url(url)} of {f'run {named[1]}' if named else run_dir}"
