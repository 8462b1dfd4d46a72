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
from buffer.bundles import Bundle, BundleError, read_bundle
from buffer.signed_weights import open_weights
from configs.cli import ConfigOption, SetOption, VersionOption, exit_code, settings_from_cli
from configs.schema import Settings
from drafters.several import learning, line_of
from targets.find import checked_folder, downloaded

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
        _check_free(to)
        folder = _source(source)
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
    kind: Annotated[
        str | None,
        typer.Option(
            "--drafter",
            metavar="KIND",
            help="whose version, in a run with several that learn; the first one if not said",
        ),
    ] = None,
    config: ConfigOption = None,
    set_: SetOption = None,
) -> None:
    """Write a drafter for the settings' ``target`` as other servers read it."""
    settings = settings_from_cli(config, set_, False)
    try:
        _check_free(to)
        bundle = _bundle(drafter, kind, settings)
        from drafters.formats.published import export as write

        write(bundle, layout.value, _target(settings), to)
    except (ValueError, OSError) as error:
        typer.echo(str(error), err=True)
        raise typer.Exit(code=exit_code(error)) from error
    typer.echo(f"{to}: version {bundle.manifest.version}, {bundle.manifest.kind}, as {layout}")


def _target(settings: Settings) -> TargetTable:
    from drafters.formats.published import load_target_table

    folder = checked_folder(settings.target, settings.target_cache)
    return load_target_table(settings.target, folder)


def _source(source: str) -> Path:
    """The folder that a published drafter is in.

    Raises:
        ValueError: there is none, or it cannot be downloaded.
    """
    path = Path(source)
    if path.is_dir():
        return path
    if path.exists() or path.is_absolute() or source.startswith("."):
        what = "a file" if path.exists() else "not there"
        raise ValueError(
            f"{source} is {what}; name the folder of a published drafter, with config.json and "
            f"*.safetensors, or a Hugging Face id"
        )
    try:
        return downloaded(source)
    except ValueError as error:
        raise ValueError(
            f"{source!r} is neither a folder nor a Hugging Face id that can be loaded ({error})"
        ) from error


def _bundle(drafter: str, kind: str | None, settings: Settings) -> Bundle:
    path = Path(drafter)
    if path.is_dir():
        return _bundle_at(path.resolve())
    if not drafter.isdecimal():
        raise ValueError(f"{drafter!r} is neither a bundle folder nor the number of a version")
    kinds = learning(settings)
    if kind is not None and kind not in kinds:
        raise ValueError(
            f"--drafter {kind}: the settings' drafters that learn are {', '.join(kinds) or 'none'}"
        )
    line = "" if kind is None else line_of(settings, kind)
    backend = open_backend(settings.buffer.url, settings.run_dir)
    store = open_weights(backend, settings.swap.public_key, line=line)
    if int(drafter) not in store.versions():
        others = [other for other in kinds if other != (kind or kinds[0])]
        hint = f"; for {' or '.join(others)} say --drafter" if others else ""
        raise ValueError(
            f"{store.location} has no version {drafter}; it has {store.versions()}{hint}"
        )
    try:
        return store.read(int(drafter))
    except BundleError as error:
        raise ValueError(
            f"version {drafter} in {store.location} is damaged: {error.problem}"
        ) from error


def _bundle_at(folder: Path) -> Bundle:
    """
    Raises:
        ValueError: it is no sound bundle.
    """
    try:
        return read_bundle(folder)
    except BundleError as error:
        raise ValueError(
            f"{folder} is not a sound bundle: {error.problem}. `drafters import` makes a bundle "
            f"from a published drafter"
        ) from error


def _check_free(folder: Path) -> None:
    """
    Raises:
        ValueError: something is there already.
    """
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"--to {folder} is a file; name a new folder")
    if folder.exists() and any(folder.iterdir()):
        raise ValueError(f"--to {folder} is not empty; name a new folder")
