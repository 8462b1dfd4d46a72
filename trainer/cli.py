"""Train the drafter of a run on the traces its server writes, and publish better versions.

Exit code 0: told to stop, or all steps done. 1: it could not start, or could not continue. 2: wrong
usage or settings, or nothing to train.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import signal
import threading
from pathlib import Path
from typing import Annotated

import typer

from buffer.audit import audit
from buffer.files import forbid_core_dumps, why_unwritable
from configs.choices import SettingsError
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
from reporting.catalog import check_writers
from reporting.reports import Reports, reports_of
from targets.find import checked_folder
from trainer.lock import only_trainer
from trainer.policy_command import fit_policy

log = logging.getLogger(__name__)
app = typer.Typer(
    no_args_is_help=True, help=__doc__, add_completion=False, pretty_exceptions_enable=False
)


@app.callback()
def main(version: VersionOption = False) -> None:
    """What is common to all commands."""


@app.command(context_settings=ANYTHING)
def launch(
    context: typer.Context,
    config: ConfigOption = None,
    set_: SetOption = None,
    print_config: PrintConfigOption = False,
) -> None:
    """Learn from the traces of ``run_dir`` until told to stop."""
    settings = settings_from_cli(config, set_, print_config, unknown=context.args)
    if settings.drafter.kind not in learning_kinds():
        typer.echo(
            f"drafter.kind is {settings.drafter.kind!r}: there is nothing to train. Set it to one "
            f"that learns ({', '.join(learning_kinds())}), or run the server alone",
            err=True,
        )
        raise typer.Exit(code=2)
    try:
        check_writers(settings)
    except SettingsError as error:
        typer.echo(str(error), err=True)
        raise typer.Exit(code=2) from error
    set_up_logging(settings.log_level)
    if settings.capture.memory_only:
        forbid_core_dumps()
    stop = _stop_on_signal()
    try:
        _check_disk(settings.run_dir)
        with (
            only_trainer(settings.run_dir / "trainer"),
            reports_of(settings, "trainer") as reports,
        ):
            _train(settings, stop, reports)
    except (ValueError, OSError) as error:
        typer.echo(str(error), err=True)
        raise typer.Exit(code=exit_code(error)) from error


def _check_disk(run_dir: Path) -> None:
    """
    Raises:
        OSError: nothing can be written to ``run_dir``; says so in words.
    """
    problem = why_unwritable(run_dir)
    if problem is not None:
        raise OSError(
            f"run_dir {run_dir} cannot be written ({problem}): a trainer keeps its checkpoints and "
            f"versions there; not starting. Make room there, or choose another run_dir"
        )


def _stop_on_signal() -> threading.Event:
    """An event that SIGTERM and SIGINT set; a second signal ends the process at once."""
    stop = threading.Event()

    def handle(number: int, _frame: object) -> None:
        stop.set()
        signal.signal(number, signal.SIG_DFL)
        # Not by logging: the interrupted code may hold its locks.
        os.write(2, b"stopping after this update; a second signal stops at once\n")

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, handle)
    return stop


app.command("policy")(fit_policy)


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


def _train(settings: Settings, stop: threading.Event, reports: Reports) -> None:
    """
    Raises:
        ValueError, OSError: it cannot start.
        typer.Exit: 1 after logging why it cannot continue.
    """
    log.info("starting: target %s, run_dir %s", settings.target, settings.run_dir)
    checked_folder(settings.target, settings.target_cache)
    # --help and whoever was refused skip these imports: torch and transformers take seconds.
    from trainer.build import build_trainer
    from trainer.loop import run

    trainer = build_trainer(settings, stop, reports)
    if stop.is_set():
        log.info("stopped before training began")
        return
    try:
        run(trainer)
    except Exception as error:
        log.critical("the trainer died: %s: %s", type(error).__name__, error, exc_info=True)
        with contextlib.suppress(OSError):  # a full disk may be what it died of
            trainer.journal.failed(error)
        raise typer.Exit(code=1) from error
