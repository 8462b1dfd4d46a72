"""Loading a target."""

from __future__ import annotations

import pytest
import torch

from configs.choices import SettingsError
from targets.load import load_model, pick_device


def test_a_log_file_gets_no_progress_bar(tiny_target_dir, capfd):
    load_model(tiny_target_dir, torch.float32, torch.device("cpu"))

    assert capfd.readouterr().err == ""


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("tpu", "trainer.device must be auto, cpu, cuda or cuda:N, got 'tpu'"),
        ("cpu:0", "trainer.device must be auto"),
        ("cuda:x", "trainer.device must be auto"),
        ("cuda:999", "trainer.device is 'cuda:999', but"),
    ],
)
def test_a_device_that_is_not_there_is_a_wrong_setting(name, said):
    with pytest.raises(SettingsError, match=f"^{said}"):
        pick_device(name, setting="trainer.device")


def test_a_cpu_is_always_there():
    assert pick_device("cpu") == torch.device("cpu")
