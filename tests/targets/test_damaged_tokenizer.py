"""A tokenizer, template or end-of-text id that cannot work is told by name, at the start."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from oracles.support import REPOSITORY, tiny_tokenizer
from targets.fits import known_eos_ids, warn_of_template
from targets.tokenizer import served_tokenizer

SOURCE = REPOSITORY / "examples/target"
FILES = ("config.json", "chat_template.jinja", "tokenizer.json", "tokenizer_config.json")


@pytest.fixture
def target(tmp_path: Path) -> Path:
    folder = tmp_path / "target"
    folder.mkdir()
    for name in FILES:
        shutil.copy(SOURCE / name, folder)
    return folder


def _without_any(folder: Path) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).unlink()


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (
            lambda folder: os.truncate(folder / "tokenizer.json", 100_000),
            "{folder}/tokenizer.json cannot be read: Expecting value: line",
        ),
        (
            lambda folder: (folder / "tokenizer_config.json").write_text("{"),
            "{folder}/tokenizer_config.json cannot be read: Expecting property name",
        ),
        (
            lambda folder: (folder / "tokenizer_config.json").write_text("[]"),
            "{folder}/tokenizer_config.json must hold a JSON object",
        ),
        (
            lambda folder: (folder / "tokenizer.json").unlink(),
            "{folder} has no tokenizer: tokenizer.json is missing",
        ),
        # transformers makes one without tokens
        (_without_any, "{folder} has no tokenizer: tokenizer.json is missing"),
        (
            lambda folder: (folder / "tokenizer.json").write_text("{}"),
            "the tokenizer in {folder} cannot be loaded (",
        ),
    ],
)
def test_a_tokenizer_that_cannot_be_loaded_is_named(
    target: Path, tmp_path: Path, damage: Callable[[Path], None], said: str
):
    damage(target)
    with pytest.raises(ValueError) as caught:
        served_tokenizer(target, tmp_path / "cache")
    assert str(caught.value).startswith(said.format(folder=target))


def test_a_template_that_is_not_valid_is_told_at_the_start(target: Path, caplog):
    (target / "chat_template.jinja").write_text("{{ messages }}\n{% for x in %}")
    warn_of_template(served_tokenizer(target), target)
    assert f"the chat template of {target} (chat_template.jinja or" in caplog.text
    assert "is not valid: line 2: " in caplog.text


def test_templates_that_are_valid_or_not_there_are_passed_over(caplog):
    tokenizer = tiny_tokenizer()
    for template in (None, "{{ raise_exception('no') }}", "{% generation %}{% endgeneration %}"):
        tokenizer.chat_template = template
        warn_of_template(tokenizer, Path("here"))
    assert not caplog.text


def test_an_end_of_text_id_beyond_the_vocabulary_is_told(caplog):
    assert known_eos_ids([0, 9999], 288) == {0}
    assert "eos_token_id names 9999, but the target's vocabulary is 288: the others" in caplog.text
    assert known_eos_ids([-1], 288) == frozenset()
    assert "no token ends a text" in caplog.text
    caplog.clear()
    assert known_eos_ids(json.loads("[0, 287]"), 288) == {0, 287}
    assert not caplog.text
