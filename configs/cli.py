"""Options that all commands share, and how they become settings."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from configs.bundled import missing_bundled
from configs.choices import SettingsError
from configs.load import load_settings, to_yaml
from configs.options import unknown_words
from configs.schema import Settings
from configs.urls import shown_place, without_secrets
from configs.version import package_version

_UsageError: type[Exception] = typer.BadParameter.__bases__[0]


class Commands(TyperGroup):
    """Commands whose errors of usage repeat no secret of a URL on the command line."""

    def make_context(self, info_name: Any, args: list[str], *rest: Any, **more: Any) -> Any:
        self._words = tuple(word for word in args if shown_place(word) != word)
        try:
            return super().make_context(info_name, args, *rest, **more)
        except _UsageError as error:
            wrong = self._shown(error)
        raise wrong

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except _UsageError as error:
            wrong = self._shown(error)
        raise wrong

    def _shown(self, error: Any) -> Any:
        error.message = without_secrets(error.message, *self._words)
        error.args = (error.message,)
        error.__cause__ = error.__context__ = None  # it quotes the value that it refuses
        return error


def _print_version(is_wanted: bool) -> None:
    if is_wanted:
        typer.echo(package_version())
        raise typer.Exit


VersionOption = Annotated[
    bool,
    typer.Option(
        "--version", callback=_print_version, is_eager=True, help="Print the version and exit."
    ),
]
ConfigOption = Annotated[
    list[Path] | None,
    typer.Option(
        "--config",
        metavar="FILE",
        help="YAML file of settings, or the name of a shipped one such as demo; repeatable, later "
        "files win.",
    ),
]
SetOption = Annotated[
    list[str] | None,
    typer.Option(
        "--set", metavar="KEY=VALUE", help="One setting, e.g. engine.max_batch=4; repeatable."
    ),
]
PrintConfigOption = Annotated[
    bool, typer.Option("--print-config", help="Print the settings in force and exit.")
]


def settings_from_cli(
    files: Sequence[Path] | None,
    overrides: Sequence[str] | None,
    print_config: bool,
    *,
    loads_target: bool = True,
    unknown: Sequence[str] = (),
    check: Callable[[Settings], object] = lambda _settings: None,
) -> Settings:
    """Load the settings of a command, with the environment of the process.

    Args:
        loads_target: the command loads the target, so a bundled one must be there.
        unknown: words of the command line that are no option of the command.
        check: raises SettingsError for what the command would refuse; not even printed then.

    Raises:
        typer.Exit: with code 2 after printing to stderr what is wrong, or with code 0 after
            ``--print-config``.
    """
    if unknown:
        typer.echo(unknown_words(unknown), err=True)
        raise typer.Exit(code=2)
    try:
        settings = load_settings(files or (), overrides or (), os.environ)
        check(settings)
    except SettingsError as error:
        typer.echo(str(error), err=True)
        raise typer.Exit(code=2) from error
    if print_config:
        typer.echo(to_yaml(settings), nl=False)
        raise typer.Exit(code=0)
    missing = list(missing_bundled(settings)) if loads_target else []
    if missing:
        typer.echo("\n".join(missing), err=True)
        raise typer.Exit(code=2)
    return settings


def exit_code(error: Exception) -> int:
    """Exit code of a command that cannot start: 2 for wrong settings, 1 for all else."""
    return 2 if isinstance(error, SettingsError) else 1
