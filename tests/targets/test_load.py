"""Loading a target."""

from __future__ import annotations

import torch

from targets.load import load_model


def test_a_log_file_gets_no_progress_bar(tiny_target_dir, capfd):
    load_model(tiny_target_dir, torch.float32, torch.device("cpu"))

    assert capfd.readouterr().err == ""
