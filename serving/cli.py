"""Serve a model with speculative decoding over HTTP.

Exit code 0: drained and stopped. 1: failed to start, or was stopped before it had drained. 2: wrong
usage or settings.
"""

from __future__ import annotations

import logging
import time

import typer

from buffer.backends import open_backend
from configs.cli import (
    ConfigOption,
    PrintConfigOption,
    SetOption,
    VersionOption,
    exit_code,
    settings_from_cli,
)
from configs.logs import set_up_logging
from configs.schema import Settings
from drafters.catalog import chosen
from policies.catalog import policy_class

log = logging.getLogger(__name__)
app = typer.Typer(no_args_is_help=True, help=__doc__, pretty_exceptions_enable=False)


@app.callback()
def main(version: VersionOption = False) -> None:
    """Keeps ``launch`` a subcommand while it is the only one."""


@app.command()
def launch(
    config: ConfigOption = None,
    set_: SetOption = None,
    print_config: PrintConfigOption = False,
) -> None:
    """Load the target and its drafter, and answer requests until told to stop."""
    settings = settings_from_cli(config, set_, print_config)
    _check_kinds(settings)
    set_up_logging(settings.log_level)
    log.info("starting: target %s, run_dir %s", settings.target, settings.run_dir)
    # --help and --print-config skip these imports: torch and transformers take seconds.
    started_s = time.perf_counter()
    from serving.http import bind, create_app, serve
    from serving.periodic import periodic_stats

    try:
        bound = bind(settings)  # report a taken port now, not after minutes of loading
        from serving.build import build_service

        log.info("imported torch and transformers in %.1f s", time.perf_counter() - started_s)
        service = build_service(settings)
    except (OSError, ValueError) as error:
        typer.echo(str(error), err=True)
        raise typer.Exit(code=exit_code(error)) from error
    service.start()
    try:
        with periodic_stats(service.figures, settings.server.log_stats_s):
            code = serve(create_app(service, settings), service.model, settings, bound)
    finally:
        service.stop()
    log.info("stopped")
    raise typer.Exit(code)


def _check_kinds(settings: Settings) -> None:
    """Refuse names that are in no catalog, before torch is imported.

    Raises:
        typer.Exit: with code 2 after printing the unknown name and the known ones.
    """
    try:
        chosen(settings.drafter)
        policy_class(settings.policy)
        open_backend(settings.buffer.url, settings.run_dir)
    except ValueError as error:
        typer.echo(str(error), err=True)
        raise typer.Exit(code=2) from error
