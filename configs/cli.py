"""The options that every command shares, and what they do to settings."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from configs.load import SettingsError, load_settings, to_yaml
from configs.schema import Settings

ConfigOption = Annotated[
    list[Path] | None,
    typer.Option("--config", help="YAML file of settings; repeatable, a later one wins"),
]
SetOption = Annotated[
    list[str] | None,
    typer.Option(
        "--set", metavar="KEY=VALUE", help="one setting, e.g. engine.max_batch=4; repeatable"
    ),
]
PrintConfigOption = Annotated[
    bool, typer.Option("--print-config", help="print the settings in force and exit")
]


def settings_from_cli(
    files: Sequence[Path] | None, overrides: Sequence[str] | None, print_config: bool
) -> Settings:
    """Settings of a command, read with the process's environment.

    Raises:
        typer.Exit: 2 after telling stderr what is wrong; 0 after ``--print-config``.
    """
    try:
        settings = load_settings(files or (), overrides or (), os.environ)
    except SettingsError as error:
        typer.echo(str(error), err=True)
        raise typer.Exit(code=2) from error
    if print_config:
        typer.echo(to_yaml(settings), nl=False)
        raise typer.Exit(code=0)
    return settings
