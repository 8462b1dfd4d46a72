"""A config.json that says what no model is ends server, trainer and update with one sentence."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from targets.causal import read_causal
from targets.config import load_config
from targets.head import load_target_head
from tests.trainer.traffic import save_target


def head_of(folder: Path) -> Any:
    return load_target_head(folder, torch.device("cpu"), torch.float32)


@pytest.mark.parametrize("read", [load_config, head_of, read_causal])
@pytest.mark.parametrize(
    ("key", "value", "says"),
    [
        ("hidden_size", "many", "hidden_size.*expected int, got str"),
        ("num_hidden_layers", 3, r"`num_hidden_layers` \(3\) must be equal"),
        ("model_type", "none_such", "model type `none_such`"),
    ],
)
def test_a_config_of_no_model_is_refused_in_a_line(
    tmp_path: Path, read: Callable[[Path], Any], key: str, value: object, says: str
) -> None:
    save_target(tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {key: value}))

    with pytest.raises(ValueError, match=f"config.json cannot be used: .*{says}") as refused:
        read(tmp_path)

    assert "\n" not in str(refused.value) and len(str(refused.value)) < 600
