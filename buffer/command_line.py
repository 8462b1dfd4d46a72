"""What the commands of ``buffer`` share: how a place is named, what is printed, how errors end."""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from buffer.audit import Action, audit
from buffer.backends import CATALOG, open_backend
from buffer.embedded_log import log_root
from buffer.interface import Backend, Report
from configs.schema import Settings
from configs.urls import file_place_problem, shown_place, shown_scheme

_NAMES_RUN = re.compile(r"[?&]run=")
_LIKE_TIME = re.compile(r"[0-9T:.+Z -]{1,40}")
RunArgument = Annotated[
    str | None,
    typer.Argument(
        metavar="[RUN]",
        help="run folder, e.g. runs/demo, or a URL as in buffer.url; by default those of the "
        "settings",
    ),
]
JsonOption = Annotated[bool, typer.Option("--json", help="one JSON object per line")]
TenantOption = Annotated[
    list[str] | None, typer.Option("--tenant", help="only traces of this tenant; repeatable")
]
DomainOption = Annotated[
    list[str] | None, typer.Option("--domain", help="only traces of this domain; repeatable")
]
VersionsOption = Annotated[
    list[int] | None,
    typer.Option(
        "--drafter-version", min=0, help="only traces that this version drafted for; repeatable"
    ),
]
SinceOption = Annotated[
    str | None, typer.Option("--since", help="only traces that finished then or later, ISO 8601")
]
UntilOption = Annotated[
    str | None, typer.Option("--until", help="only traces that finished before, ISO 8601")
]


def located(run: str | None, settings: Settings) -> tuple[str, Path]:
    """URL and run folder of the buffer that the settings name, in another run folder or at another
    URL if one is given.

    Raises:
        ValueError: there is no such folder.
    """
    if run is not None and is_url(run):
        _check_folder(run, settings.run_dir)
        return run, settings.run_dir
    if run is not None:
        _check_run_folder(run)
    run_dir = settings.run_dir if run is None else Path(run)
    _check_folder(settings.buffer.url, run_dir, may_be_missing=run_dir.is_dir())
    return settings.buffer.url, run_dir


@contextlib.contextmanager
def accessed(
    run: str | None, settings: Settings, action: Action
) -> Iterator[tuple[Backend, dict[str, Any]]]:
    """The buffer that ``located`` finds, opened, and a mapping for what was counted. The access is
    noted with it at the end, whatever happens.

    Raises:
        ValueError: there is none, or its URL cannot be used.
    """
    url, run_dir = located(run, settings)
    backend, counts = opened(url, run_dir), dict[str, Any]()
    try:
        yield backend, counts
    except BaseException as error:
        counts["failed"] = type(error).__name__
        raise
    finally:
        audit(run_dir, action, url, backend.run, **counts)


@dataclass(frozen=True, slots=True)
class Access:
    """An open buffer to or from which traces are sent. Noted when that begins, for it may be
    killed, and with counts at its end."""

    backend: Backend
    url: str
    run_dir: Path
    action: Action
    role: Literal["from", "to"]

    def note(self, **facts: Any) -> None:
        """Note it once more."""
        audit(self.run_dir, self.action, self.url, self.backend.run, role=self.role, **facts)


def place(text: str, settings: Settings, action: Action, role: Literal["from", "to"]) -> Access:
    """The buffer at a URL, or the embedded log of a run folder; the access is noted.

    Args:
        role: ``from``: it must exist.

    Raises:
        ValueError: there is no such folder, or the URL cannot be used.
    """
    must_exist = role == "from"
    if is_url(text):
        url, run_dir = text, settings.run_dir
    else:
        if must_exist or ":" in text or Path(text).exists():
            _check_run_folder(text)
        url, run_dir = "log:", Path(text)
    _check_folder(url, run_dir, may_be_missing=not (must_exist and is_url(text)))
    access = Access(opened(url, run_dir), url, run_dir, action, role)
    access.note(began=True)
    return access


def _check_run_folder(text: str) -> None:
    """Refuse what is neither a folder nor a URL; where it looks like a URL, say what is wrong with
    it."""
    if Path(text).is_dir():
        return
    scheme = shown_scheme(text)
    if scheme is not None:
        known = ", ".join(f"{name}:" for name in CATALOG)
        raise ValueError(
            f"{scheme}: is no buffer, and there is no run folder of this name; URLs of buffers "
            f"begin with {known}"
        )
    raise ValueError(f"{shown_place(text)} is neither a run folder nor a URL")


def _check_folder(url: str, run_dir: Path, *, may_be_missing: bool = False) -> None:
    """Refuse the URL of a log whose folder does not exist: it is mistyped, not empty; and what is
    no folder.

    Args:
        may_be_missing: only refuse what is no folder.
    """
    if url.partition(":")[0] in ("log", "file"):
        folder, _ = log_root(url, run_dir)
        if folder.is_dir():
            return
        if folder.exists() or folder.is_symlink():
            raise ValueError(f"there is no log in {folder}: it is no folder")
        if not may_be_missing:
            raise ValueError(f"there is no log in {folder}: the folder does not exist")


def opened(url: str, run_dir: Path) -> Backend:
    """A buffer that a command can use; which run it takes is said where nobody has named one.

    Raises:
        ValueError: its URL cannot be used, or it is in the memory of one process.
    """
    backend = open_backend(url, run_dir)
    if backend.ends_with_process:
        raise ValueError(
            f"{url.partition(':')[0]}: keeps traces in the memory of one process: a command sees "
            f"nothing of another one, and what it stored there would end with it"
        )
    if backend.run is not None and not _NAMES_RUN.search(url):
        typer.echo(
            f"the URL names no run: this is run {backend.run}, after the run folder {run_dir}; "
            f"?run=NAME takes another",
            err=True,
        )
    return backend


def is_url(text: str) -> bool:
    """Whether a place is named by a URL. Never part of a message: it may hold a password."""
    return "://" in text or (text.partition(":")[0] in CATALOG and ":" in text)


def unix_ms(text: str | None, option: str) -> int | None:
    """A time of the command line; without a zone it is UTC.

    Raises:
        ValueError: it is no time.
    """
    if text is None:
        return None
    time = None
    with contextlib.suppress(ValueError):
        time = datetime.fromisoformat(text)
    if time is None:  # out here: the error of the library quotes the text, which may be a URL
        shown = _shown_time(text)
        raise ValueError(f"{option} must be a time such as 2026-11-28T09:30, got {shown!r}")
    return int((time if time.tzinfo else time.replace(tzinfo=UTC)).timestamp() * 1000)


def _shown_time(text: str) -> str:
    """What was given in place of a time; it may be a URL."""
    return text if _LIKE_TIME.fullmatch(text) else shown_place(text)


def check_path(name: str, path: Path) -> None:
    """Refuse a URL where a file or folder belongs: it would be made, with a password in its name.

    Args:
        name: of the option or argument.

    Raises:
        ValueError: it is a URL.
    """
    problem = file_place_problem(name, path)
    if problem is not None:
        raise ValueError(problem)


@contextlib.contextmanager
def refusing() -> Iterator[None]:
    """Print why something cannot be done, and exit with code 2."""
    try:
        yield
    except (ValueError, OSError) as error:
        typer.echo(text_of(error), err=True)
        raise typer.Exit(code=2) from error


def text_of(error: Exception) -> str:
    """What an error says, in one line and without the system's number for it."""
    text = str(error)
    if isinstance(error, OSError) and error.strerror:
        text = error.strerror if error.filename is None else f"{error.filename}: {error.strerror}"
    return one_line(" ".join(text.split()))


def one_line(text: str) -> str:
    """A text with names of files, tenants and groups in it, which may hold line breaks, codes of
    the terminal, and bytes that are no text: those as escapes, so that nobody forges a line."""
    return "".join(
        letter if letter.isprintable() else letter.encode("unicode_escape").decode()
        for letter in text
    )


def print_reports(reports: Iterable[Report], as_json: bool) -> None:
    """One line for each."""
    for report in reports:
        typer.echo(json.dumps(report.to_json()) if as_json else one_line(report.to_line()))
