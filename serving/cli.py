"""Serve a model with speculative decoding, over HTTP.

Exit code 0: drained and done. 1: it could not start, or was stopped before it was done. 2: wrong
usage or settings.
"""

from __future__ import annotations

import logging
import sys

import typer

from configs.cli import ConfigOption, PrintConfigOption, SetOption, settings_from_cli

app = typer.Typer(no_args_is_help=True, help=__doc__, pretty_exceptions_enable=False)


@app.callback()
def main() -> None:
    """Keeps ``launch`` a subcommand while it is the only one."""


@app.command()
def launch(
    config: ConfigOption = None,
    set_: SetOption = None,
    print_config: PrintConfigOption = False,
) -> None:
    """Load the target and its drafter, and answer requests until told to stop."""
    settings = settings_from_cli(config, set_, print_config)
    logging.basicConfig(
        stream=sys.stderr, level=logging.WARNING, format="%(asctime)s %(levelname)s %(message)s"
    )
    # torch and transformers take seconds to import; --help and --print-config do without.
    from serving.http import bind, create_app, serve

    try:
        bound = bind(settings)  # a taken port is told now and not after minutes of loading
        from serving.build import build_engine

        service = build_engine(settings)
    except (OSError, ValueError) as error:
        typer.echo(str(error), err=True)
        raise typer.Exit(code=1) from error
    service.start()
    try:
        code = serve(create_app(service, settings), service.model, settings, bound)
    finally:
        service.stop()
    raise typer.Exit(code)
