"""Read drafters that others publish, and write ours as others read them.

Exit code 0: done. 1: the source does not fit, or nothing can be written. 2: wrong usage or
settings.
"""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from buffer.backends import open_backend
from buffer.bundles import Bundle, read_bundle
from buffer.signed_weights import open_weights
from configs.cli import ConfigOption, SetOption, VersionOption, exit_code, settings_from_cli
from configs.schema import Settings
from targets.find import checked_folder, target_folder

if TYPE_CHECKING:
    from drafters.formats.published import TargetTable

app = typer.Typer(
    no_args_is_help=True, help=__doc__, add_completion=False, pretty_exceptions_enable=False
)


class Layout(StrEnum):
    """Layouts that can be written."""

    HF = "hf"
    SPECULATORS = "speculators"


ToOption = Annotated[
    Path, typer.Option("--to", metavar="OUT", help="folder to write; new or empty")
]


@app.callback()
def main(version: VersionOption = False) -> None:
    """What is common to all commands."""


@app.command(name="import")
def import_(
    source: Annotated[str, typer.Argument(help="folder or Hugging Face id of a published drafter")],
    to: ToOption,
    config: ConfigOption = None,
    set_: SetOption = None,
) -> None:
    """Make a bundle from a published drafter for the settings' ``target``."""
    settings = settings_from_cli(config, set_, False)
    try:
        folder = target_folder(source)
        _check_free(to)
        from drafters.formats.published import imported  # torch and transformers take seconds

        manifest, files = imported(folder, _target(settings))
        path = to / str(manifest.version)
        path.mkdir(parents=True)
        for name, content in files.items():
            (path / name).write_bytes(content)
    except (ValueError, OSError) as error:
        typer.echo(str(error), err=True)
        raise typer.Exit(code=exit_code(error)) from error
    typer.echo(
        f"{path}: a drafter of kind {manifest.kind}. Begin a run with it: --set "
        f"drafter.kind={manifest.kind} --set drafter.path={path}"
    )


@app.command()
def export(
    drafter: Annotated[
        str, typer.Argument(help="bundle folder, or number of a version of run_dir's")
    ],
    to: ToOption,
    layout: Annotated[
        Layout,
        typer.Option(
            "--format", help="hf: as Hugging Face and SGLang; speculators: as vLLM's library"
        ),
    ],
    config: ConfigOption = None,
    set_: SetOption = None,
) -> None:
    """Write a drafter for the settings' ``target`` as other servers read it."""
    settings = settings_from_cli(config, set_, False)
    try:
        _check_free(to)
        bundle = _bundle(drafter, settings)
        from drafters.formats.published import export as write

        write(bundle, layout, _target(settings), to)
    except (ValueError, OSError) as error:
        typer.echo(str(error), err=True)
        raise typer.Exit(code=exit_code(error)) from error
    typer.echo(f"{to}: version {bundle.manifest.version}, {bundle.manifest.kind}, as {layout}")


def _target(settings: Settings) -> TargetTable:
    from drafters.formats.published import load_target_table

    folder = checked_folder(settings.target, settings.target_cache)
    return load_target_table(settings.target, folder)


def _bundle(drafter: str, settings: Settings) -> Bundle:
    path = Path(drafter)
    if path.is_dir():
        return read_bundle(path.resolve())
    if not drafter.isdecimal():
        raise ValueError(f"{drafter!r} is neither a bundle folder nor the number of a version")
    backend = open_backend(settings.buffer.url, settings.run_dir)
    store = open_weights(backend, settings.swap.public_key)
    if int(drafter) not in store.versions():
        raise ValueError(f"{store.location} has no version {drafter}; it has {store.versions()}")
    return store.read(int(drafter))


def _check_free(folder: Path) -> None:
    """
    Raises:
        ValueError: something is there already.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"--to {folder} is not empty; name a new folder")
