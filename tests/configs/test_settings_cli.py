"""Every command reads its settings through the same three options."""

from __future__ import annotations

import typer
from typer.testing import CliRunner

from configs.cli import ConfigOption, PrintConfigOption, SetOption, settings_from_cli

app = typer.Typer()


@app.command()
def launch(
    config: ConfigOption = None,
    overrides: SetOption = None,
    print_config: PrintConfigOption = False,
) -> None:
    settings = settings_from_cli(config, overrides, print_config)
    typer.echo(f"batch {settings.engine.max_batch}")


def test_a_command_gets_its_settings(tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text("engine: {max_batch: 7}\n")
    result = CliRunner().invoke(app, ["--config", str(file), "--set", "seed=1"])
    assert (result.exit_code, result.stdout) == (0, "batch 7\n")


def test_the_environment_counts():
    result = CliRunner().invoke(app, [], env={"SLIPSTREAM_ENGINE__MAX_BATCH": "9"})
    assert result.stdout == "batch 9\n"


def test_a_mistake_is_told_on_stderr_and_ends_with_code_2():
    result = CliRunner().invoke(app, ["--set", "engine.max_batc=1"])
    assert result.exit_code == 2
    assert result.stdout == ""
    assert "did you mean 'engine.max_batch'?" in result.stderr


def test_print_config_prints_and_does_nothing_else():
    result = CliRunner().invoke(app, ["--print-config", "--set", "engine.max_batch=3"])
    assert result.exit_code == 0
    assert "max_batch: 3" in result.stdout
    assert "batch 3\n" not in result.stdout.replace("max_batch: 3", "")
