"""``buffer copy`` and ``buffer replay``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any

import typer

from buffer.audit import Action
from buffer.backends import limits_of
from buffer.command_line import (
    Access,
    DomainOption,
    JsonOption,
    SinceOption,
    TenantOption,
    UntilOption,
    VersionsOption,
    place,
    print_reports,
    refusing,
    text_of,
    unix_ms,
)
from buffer.resend import Sent, StoppedError, Wanted, copy_traces, replay_traces
from configs.cli import ConfigOption, SetOption, settings_from_cli
from configs.schema import Settings

SourceArgument = Annotated[
    str, typer.Argument(help="run folder, or URL as in buffer.url, whose traces are read")
]
DestinationArgument = Annotated[
    str, typer.Argument(help="run folder, or URL as in buffer.url, that gets them")
]


_COPY_AGAIN = "start it again to continue"
_REPLAY_AGAIN = (
    "another replay sends all of them again, and trainers pass over those that they know unless it "
    "is --as-new; `buffer copy` continues where it stopped"
)


def copy(
    source: SourceArgument,
    destination: DestinationArgument,
    config: ConfigOption = None,
    set_: SetOption = None,
    as_json: JsonOption = False,
) -> None:
    """Copy the traces of one buffer to another, each exactly once.

    Traces that the destination holds are passed over, by producer, epoch and number. A copy that
    was interrupted continues when it is started again, and a second one adds nothing.

    Exit code 0: the destination holds all traces. 1: some are missing, and the output says why; or
    the destination failed on the way. 2: wrong usage or settings, or a buffer cannot be reached.
    """
    settings = settings_from_cli(config, set_, print_config=False, loads_target=False)
    with refusing():
        limits = limits_of(settings.buffer)
        places = _places(source, destination, settings, "copy")
        here, there = (one.backend for one in places)
        _finish(lambda: copy_traces(here, there, limits), places, as_json, _COPY_AGAIN)


def replay(
    source: SourceArgument,
    destination: DestinationArgument,
    rate: Annotated[
        float | None, typer.Option(min=1e-3, help="traces per second; as fast as it goes without")
    ] = None,
    as_new: Annotated[
        bool,
        typer.Option(
            "--as-new",
            help="give the traces a new identity, so that a trainer that knows them learns them "
            "again; which of them it holds out changes, too",
        ),
    ] = False,
    since: SinceOption = None,
    until: UntilOption = None,
    tenant: TenantOption = None,
    domain: DomainOption = None,
    drafter_version: VersionsOption = None,
    config: ConfigOption = None,
    set_: SetOption = None,
    as_json: JsonOption = False,
) -> None:
    """Send the traces of one buffer, or some of them, to another, whether or not it had them: for
    example to the one that a trainer reads.

    Exit code 0: all that were asked for were sent. 1: some were not, and the output says why; or
    the destination failed on the way. 2: wrong usage or settings, or a buffer cannot be reached.
    """
    settings = settings_from_cli(config, set_, print_config=False, loads_target=False)
    with refusing():
        limits = limits_of(settings.buffer)
        places = _places(source, destination, settings, "replay")
        here, there = (one.backend for one in places)
        wanted = Wanted(
            unix_ms(since, "--since"),
            unix_ms(until, "--until"),
            frozenset(tenant or ()),
            frozenset(domain or ()),
            frozenset(drafter_version or ()),
        )
        _finish(
            lambda: replay_traces(here, there, limits, wanted, rate=rate, as_new=as_new),
            places,
            as_json,
            _REPLAY_AGAIN,
        )


def _places(source: str, destination: str, settings: Settings, action: Action) -> list[Access]:
    """Where traces come from and go to."""
    return [
        place(source, settings, action, role="from"),
        place(destination, settings, action, role="to"),
    ]


def _finish(send: Callable[[], Sent], places: list[Access], as_json: bool, advice: str) -> None:
    """Send, note and say what became of it, and exit accordingly.

    Args:
        advice: what to do if the destination fails on the way.
    """
    stopped = None
    try:
        sent = send()
    except StoppedError as error:
        sent, stopped = error.sent, error
    except BaseException as error:
        _note(places, failed=type(error).__name__)
        raise
    failed = {} if stopped is None else {"failed": type(stopped.problem).__name__}
    _note(places, **_counts_of(sent), **failed)
    print_reports([sent], as_json)
    if stopped is not None:
        typer.echo(f"stopped: {text_of(stopped.problem)}; {advice}", err=True)
    if stopped is not None or sent.is_damaged:
        raise typer.Exit(code=1)


def _note(places: list[Access], **facts: Any) -> None:
    for one in places:
        one.note(**facts)


def _counts_of(sent: Sent) -> dict[str, int]:
    return {"read": sent.read, "sent": sent.sent, "sent_bytes": sent.sent_bytes}
