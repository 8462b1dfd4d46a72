"""Train the drafter of a run on the traces its server writes, and publish better versions.

Exit code 0: told to stop, or all steps done. 1: it could not start, or could not continue. 2: wrong
usage or settings, or nothing to train.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated

import typer

from buffer.audit import audit
from buffer.files import forbid_core_dumps
from configs.cli import (
    ConfigOption,
    PrintConfigOption,
    SetOption,
    VersionOption,
    exit_code,
    settings_from_cli,
)
from configs.logs import set_up_logging
from configs.options import ANYTHING
from configs.schema import Settings
from drafters.trainable import learning_kinds
from targets.find import checked_folder
from trainer.process import TrainerDiedError, run_alone, run_among
from trainer.processes import supervise

app = typer.Typer(
    no_args_is_help=True, help=__doc__, add_completion=False, pretty_exceptions_enable=False
)


@app.callback()
def main(version: VersionOption = False) -> None:
    """What is common to all commands."""


LifelineOption = Annotated[
    int | None, typer.Option("--lifeline", help="File descriptor that ends with the parent.")
]


@app.command(context_settings=ANYTHING)
def launch(
    context: typer.Context,
    config: ConfigOption = None,
    set_: SetOption = None,
    print_config: PrintConfigOption = False,
    processes: Annotated[
        int, typer.Option(min=1, help="Processes on this host that share each update.")
    ] = 1,
) -> None:
    """Learn from the traces of ``run_dir`` until told to stop."""
    settings = _settings(config, set_, print_config, context.args)
    if processes > 1:
        options = [*_options("--config", config), *_options("--set", set_)]
        command = [sys.executable, "-m", "trainer", "rank", *options]
        raise typer.Exit(code=supervise(command, processes, os.environ))
    with _exit_codes():
        run_alone(settings)


@app.command(hidden=True)
def rank(
    config: ConfigOption = None, set_: SetOption = None, lifeline: LifelineOption = None
) -> None:
    """Be one process of a trainer: what the other ways to launch start."""
    settings = _settings(config, set_, False, ())
    with _exit_codes():
        run_among(settings, lifeline)


def _options(name: str, values: Sequence[object] | None) -> list[str]:
    return [text for value in values or () for text in (name, str(value))]


def _settings(
    config: list[Path] | None, set_: list[str] | None, print_config: bool, unknown: Sequence[str]
) -> Settings:
    """Settings with which there is something to train; logging follows them.

    Raises:
        typer.Exit: see ``settings_from_cli``; or with code 2 if there is nothing to train.
    """
    settings = settings_from_cli(config, set_, print_config, unknown=unknown)
    if settings.drafter.kind not in learning_kinds():
        typer.echo(
            f"drafter.kind is {settings.drafter.kind!r}: there is nothing to train. Set it to one "
            f"that learns ({', '.join(learning_kinds())}), or run the server alone",
            err=True,
        )
        raise typer.Exit(code=2)
    set_up_logging(settings.log_level)
    if settings.capture.memory_only:
        forbid_core_dumps()
    return settings


@contextlib.contextmanager
def _exit_codes() -> Iterator[None]:
    """
    Raises:
        typer.Exit: in place of what a trainer ends with.
    """
    try:
        yield
    except TrainerDiedError as error:
        raise typer.Exit(code=1) from error
    except (ValueError, OSError) as error:
        typer.echo(str(error), err=True)
        raise typer.Exit(code=exit_code(error)) from error


@app.command()
def vocabulary(
    size: Annotated[int, typer.Option(help="number of tokens")],
    out: Annotated[Path, typer.Option(help="JSON file to write")],
    config: ConfigOption = None,
    set_: SetOption = None,
) -> None:
    """Write the tokens that the traces of ``run_dir`` use most, for ``drafter.draft_vocab``."""
    settings = settings_from_cli(config, set_, False)
    if settings.capture.memory_only:
        typer.echo(
            "capture.memory_only is true, and a vocabulary says which tokens the traffic used: not "
            "writing it",
            err=True,
        )
        raise typer.Exit(code=2)
    audit(settings.run_dir, "vocabulary", settings.buffer.url)
    from transformers import AutoConfig

    from buffer.backends import open_backend
    from buffer.fingerprint import target_fingerprint
    from buffer.traces import TraceReader
    from trainer.vocabulary import count_generated, coverage, most_used, traces_in

    try:
        folder = checked_folder(settings.target, settings.target_cache)
        num_tokens = AutoConfig.from_pretrained(folder).get_text_config().vocab_size
        reader = TraceReader(open_backend(settings.buffer.url, settings.run_dir))
        counts = count_generated(traces_in(reader), num_tokens, target_fingerprint(folder))
        ids = most_used(counts, size)
        out.write_text(json.dumps(ids))
    except (ValueError, OSError) as error:
        typer.echo(str(error), err=True)
        raise typer.Exit(code=exit_code(error)) from error
    typer.echo(f"{out}: {size} of {num_tokens} tokens, {coverage(counts, ids):.2%} of the traffic")
