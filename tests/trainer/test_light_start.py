"""A trainer starts without the libraries that take longest to import."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import yaml

from oracles.support import REPOSITORY
from tests.trainer.conftest import World
from tests.trainer.traffic import settings_for, write_traces

TRAIN = """
import sys
for name in ("transformers", "torch._dynamo", "deepspeed", "wandb"):
    sys.modules[name] = None  # whoever imports it gets an error
from trainer.cli import app
app(sys.argv[1:])
"""


def test_a_trainer_of_a_usual_target_needs_neither_transformers_nor_a_compiler(
    world: World, tmp_path: Path
) -> None:
    settings = settings_for(tmp_path, world.target, max_steps=2)
    write_traces(tmp_path, world.traces[:16])
    config = tmp_path / "settings.yaml"
    config.write_text(yaml.safe_dump(settings.model_dump(mode="json")))

    ran = subprocess.run(
        [sys.executable, "-c", TRAIN, "launch", "--config", str(config)],
        cwd=REPOSITORY, env=os.environ, capture_output=True, text=True, timeout=120,
    )  # fmt: skip

    assert ran.returncode == 0, ran.stderr
    assert json.loads((tmp_path / "trainer" / "status.json").read_text())["step"] == 2
    assert "imported torch and the trainer in" in ran.stderr
