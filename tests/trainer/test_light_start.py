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

from tests.policies.confident_logs import confident_log
from tests.trainer.test_ltd import parts
from trainer.confidence_head import HeadFit, fit_head, samples_of
from trainer.ltd import FullInformation, fit_full_information
from trainer.ppo import Ppo, fit_ppo
whole, rows = parts(320)
fit_full_information(whole, rows, FullInformation(epochs=2, rounds=2, passes=1))
fit_ppo(whole, rows, Ppo(rollout=64, total_steps=64, minibatch=32, epochs=1))
fit_head(samples_of(confident_log(60), None), HeadFit(epochs=2))
print("fitted")

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
    assert ran.stdout.startswith("fitted\n"), "nor do the fits of draft policies"
    assert json.loads((tmp_path / "trainer" / "status.json").read_text())["step"] == 2
    assert "imported torch and the trainer in" in ran.stderr
