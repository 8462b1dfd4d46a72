"""``engine.max_model_len`` stays within the positions that the target was made for."""

from __future__ import annotations

from pathlib import Path

import pytest
from transformers import BloomConfig

from configs.schema import Settings
from oracles.support import tiny_qwen3_config
from serving.build import load_target
from serving.model_len import with_model_len


def chosen(positions: int | None, **engine: object) -> int | None:
    """With a target of so many positions; ``None``: one whose positions never end."""
    config = BloomConfig() if positions is None else tiny_qwen3_config(288, 0)
    if positions is not None:
        config.max_position_embeddings = positions
    return with_model_len(Settings.model_validate({"engine": engine}), config).engine.max_model_len


def test_left_open_it_is_2048_or_what_target_and_pages_hold():
    assert chosen(40_960) == 2048
    assert chosen(None) == 2048
    assert chosen(512) == 512
    assert chosen(40_960, num_pages=10, page_size=16) == 160
    assert chosen(100, num_pages=10, page_size=16) == 100


@pytest.mark.parametrize(("asked", "positions"), [(16, 16), (512, 512), (100, 512), (4096, None)])
def test_up_to_the_positions_it_is_what_was_asked_for(asked: int, positions: int | None):
    assert chosen(positions, max_model_len=asked) == asked


@pytest.mark.parametrize(("asked", "positions"), [(2000, 512), (513, 512), (1 << 20, 40_960)])
def test_above_them_it_is_refused_with_both_numbers(asked: int, positions: int):
    with pytest.raises(ValueError, match=f"max_model_len {asked} is above the {positions} pos"):
        chosen(positions, max_model_len=asked)


def test_it_is_refused_before_the_weights_are_read(tiny_target_dir: Path, tmp_path: Path):
    settings = {"target": str(tiny_target_dir), "engine": {"max_model_len": 2000}, "device": "cpu"}
    with pytest.raises(ValueError, match="max_model_len 2000 is above the 512 positions"):
        load_target(Settings.model_validate(settings))
