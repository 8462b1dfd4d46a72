"""Whoever types another server's option is told the setting."""

from __future__ import annotations

import pytest
from typer.testing import CliRunner

import serving.cli
import trainer.cli
from configs.load import load_settings
from configs.options import _NAMES, unknown_words


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("--port 9000", ["no such option: --port; settings are given as --set server.port=9000"]),
        ("--port=9000", ["no such option: --port; settings are given as --set server.port=9000"]),
        ("-p 9000", ["no such option: -p; settings are given as --set server.port=9000"]),
        ("--host ::1", ["no such option: --host; settings are given as --set server.host=::1"]),
        ("--model a/b", ["no such option: --model; settings are given as --set target=a/b"]),
        ("a/b", ["unexpected argument 'a/b'; the target is named with --set target=a/b"]),
        ("--seed", ["no such option: --seed; settings are given as --set seed=VALUE"]),
        ("--max-model-len 9", ["no such option: --max-model-len; settings are given as --set "
                               "engine.max_model_len=9"]),
        ("--server.port 1", ["no such option: --server.port; settings are given as --set "
                             "server.port=1"]),
        ("--kind x", ["no such option: --kind; settings are given as --set drafter.kind=x or "
                      "--set policy.kind=x "
                      "or --set trainer.policy.kind=x"]),
        ("--api-key sk-1", ["no such option: --api-key; settings are given as "
                            "SLIPSTREAM_SERVER__API_KEY in the environment"]),
        ("--confg a", ["no such option: --confg; did you mean --config?"]),
        ("--qqq", ["no such option: --qqq; settings are given as --set KEY=VALUE, and "
                   "--print-config lists them"]),
        ("--port 1 --host x", [
            "no such option: --port; settings are given as --set server.port=1",
            "no such option: --host; settings are given as --set server.host=x",
        ]),
    ],
)  # fmt: skip
def test_an_option_of_another_server_is_told_as_our_setting(words: str, said: list[str]):
    assert unknown_words(words.split()).splitlines() == said


@pytest.mark.parametrize("command", [serving.cli.app, trainer.cli.app])
def test_the_commands_refuse_them_with_exit_code_2(command):
    result = CliRunner().invoke(command, ["launch", "--port", "9000", "--set", "seed=1"])
    assert result.exit_code == 2
    assert result.stderr == "no such option: --port; settings are given as --set server.port=9000\n"


def test_all_hints_are_settings():
    known = load_settings((), (), {}).model_dump()
    for key in _NAMES.values():
        section: object = known
        for part in key.split("."):
            assert isinstance(section, dict) and part in section, key
            section = section[part]
