"""The profile in the run folder is used for what it was measured with, and for nothing else."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch

from configs.schema import Settings
from policies.interface import CostSample
from serving.kept_profile import PROFILE_FILE, facts_of, kept_or_measured

SAMPLES = [CostSample("none", 0, 1, 0.01, 0.0), CostSample("eagle3", 2, 4, 0.02, 0.003)]
FACTS = {"device": "a card", "target": "ab"}


class Counted:
    """Measures by counting."""

    def __init__(self, samples: list[CostSample] | None = None) -> None:
        self.samples = SAMPLES if samples is None else samples
        self.num_calls = 0

    def __call__(self) -> list[CostSample]:
        self.num_calls += 1
        return self.samples


def test_second_start_takes_the_times_of_the_first(tmp_path: Path) -> None:
    first, second = Counted(), Counted([])
    assert kept_or_measured(tmp_path, FACTS, first) == SAMPLES
    assert kept_or_measured(tmp_path, FACTS, second) == SAMPLES
    assert (first.num_calls, second.num_calls) == (1, 0)


def test_other_facts_are_measured_and_replace_the_former_ones(tmp_path: Path) -> None:
    kept_or_measured(tmp_path, FACTS, Counted())
    others = Counted(SAMPLES[:1])
    assert kept_or_measured(tmp_path, FACTS | {"device": "another"}, others) == SAMPLES[:1]
    assert others.num_calls == 1
    again = Counted()
    assert kept_or_measured(tmp_path, FACTS, again) == SAMPLES and again.num_calls == 1


def _with(stored: dict[str, Any], **changes: Any) -> str:
    return json.dumps(stored | changes)


@pytest.mark.parametrize("damage", ["empty", "cut", "nan", "negative", "unknown", "list", "binary"])
def test_damaged_file_is_measured_anew_with_a_warning(
    tmp_path: Path, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    kept_or_measured(tmp_path, FACTS, Counted())
    path = tmp_path / PROFILE_FILE
    text = path.read_text()
    sample = json.loads(text)["samples"][0]
    damaged = {
        "empty": b"",
        "cut": text[: len(text) // 2].encode(),
        "nan": _with(json.loads(text), samples=[sample | {"draft_s": float("nan")}]).encode(),
        "negative": _with(json.loads(text), samples=[sample | {"step_s": -1.0}]).encode(),
        "unknown": _with(json.loads(text), colour="red").encode(),
        "list": b"[]",
        "binary": bytes(range(256)),
    }
    path.write_bytes(damaged[damage])
    measure = Counted()
    assert kept_or_measured(tmp_path, FACTS, measure) == SAMPLES
    assert measure.num_calls == 1
    assert str(path) in caplog.text
    assert kept_or_measured(tmp_path, FACTS, Counted([])) == SAMPLES  # it was replaced


@pytest.mark.timeout(30)
def test_a_pipe_in_place_of_the_file_is_measured_anew_with_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / PROFILE_FILE
    os.mkfifo(path)
    measure = Counted()
    assert kept_or_measured(tmp_path, FACTS, measure) == SAMPLES
    assert measure.num_calls == 1
    assert f"step times in {path} cannot be read" in caplog.text
    assert "it is a named pipe, not a regular file" in caplog.text
    assert kept_or_measured(tmp_path, FACTS, Counted([])) == SAMPLES  # it was replaced


def test_without_a_folder_nothing_is_kept_and_the_start_goes_on(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    measure = Counted()
    assert kept_or_measured(tmp_path / "missing", FACTS, measure) == SAMPLES
    assert measure.num_calls == 1 and "cannot be kept" in caplog.text


def test_facts_tell_apart_what_changes_step_times() -> None:
    settings, device = Settings(), torch.device("cpu")
    facts = facts_of(settings, "ab", device, "one")
    assert facts == facts_of(settings, "ab", device, "one")
    engine = settings.engine.model_copy(update={"max_batch": settings.engine.max_batch + 1})
    for other in (
        facts_of(settings, "cd", device, "one"),
        facts_of(settings, "ab", device, "two"),
        facts_of(settings.model_copy(update={"engine": engine}), "ab", device, "one"),
    ):
        assert other != facts
