"""All commands read their settings through the same three options, and print their version."""

from __future__ import annotations

from importlib import metadata

import pytest
import typer
from typer.testing import CliRunner

import buffer.cli
import serving.cli
import trainer.cli
from configs.choices import SettingsError, known
from configs.cli import (
    ConfigOption,
    PrintConfigOption,
    SetOption,
    exit_code,
    settings_from_cli,
)

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


def test_the_environment_is_read():
    result = CliRunner().invoke(app, [], env={"SLIPSTREAM_ENGINE__MAX_BATCH": "9"})
    assert result.stdout == "batch 9\n"


@pytest.mark.parametrize("room", [serving.cli, trainer.cli])
def test_what_a_command_would_refuse_is_not_printed_either(room):
    command = ["launch", "--set", "drafter.kind=eagle", "--print-config"]
    result = CliRunner().invoke(room.app, command)
    assert (result.exit_code, result.stdout) == (2, "")
    assert result.stderr.startswith("drafter.kind 'eagle' is unknown; known: ")


def test_a_drafter_of_a_policy_that_no_catalog_has_is_refused():
    """Another one would draft in its place, and nobody would know."""
    command = ["launch", "--set", "policy.kind=ucb", "--set", "policy.drafter=eagle"]
    result = CliRunner().invoke(serving.cli.app, command)
    assert result.exit_code == 2
    assert result.stderr.startswith("policy.drafter 'eagle' is unknown; known: ")


def test_a_mistake_is_printed_to_stderr_with_exit_code_2():
    result = CliRunner().invoke(app, ["--set", "engine.max_batc=1"])
    assert result.exit_code == 2
    assert result.stdout == ""
    assert "did you mean 'engine.max_batch'?" in result.stderr


def test_print_config_prints_and_does_nothing_else():
    result = CliRunner().invoke(app, ["--print-config", "--set", "engine.max_batch=3"])
    assert result.exit_code == 0
    assert "max_batch: 3" in result.stdout
    assert "batch 3\n" not in result.stdout.replace("max_batch: 3", "")


@pytest.mark.parametrize("room", [serving, trainer, buffer], ids=lambda room: room.__name__)
def test_every_command_prints_its_version(room):
    result = CliRunner().invoke(room.cli.app, ["--version"])
    assert (result.exit_code, result.stdout) == (0, f"{metadata.version('slipstream-serving')}\n")


def test_an_unknown_name_is_refused_with_the_known_ones_and_the_nearest():
    with pytest.raises(SettingsError) as caught:
        known("drafter.kind", "eagel3", ("none", "suffix", "eagle3"))
    assert str(caught.value) == (
        "drafter.kind 'eagel3' is unknown; known: eagle3, none, suffix; did you mean 'eagle3'?"
    )
    with pytest.raises(SettingsError, match=r"known: eagle3, none$"):
        known("drafter.kind", "qqqq", ("none", "eagle3"))
    known("drafter.kind", "none", ("none", "eagle3"))


def test_a_command_that_cannot_start_tells_wrong_settings_from_other_errors():
    assert exit_code(SettingsError("drafter.kind 'x' is unknown")) == 2
    assert exit_code(ValueError("the drafter is damaged")) == 1
