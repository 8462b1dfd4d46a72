"""``trainer.gpu_share`` as CUDA MPS is told of it."""

from __future__ import annotations

import os

import pytest
import torch

from configs.load import SettingsError, load_settings
from trainer.build import set_up_process

PERCENTAGE = "CUDA_MPS_ACTIVE_THREAD_PERCENTAGE"


@pytest.mark.parametrize(
    ("chosen", "percentage", "expected"),
    [
        ([], None, None),
        (["trainer.gpu_share=1"], None, None),
        (["trainer.gpu_share=0.25"], None, "25"),
        (["trainer.gpu_share=0.125"], None, "12.5"),
        (["trainer.gpu_share=0.25"], "40", "40"),
    ],
)
def test_trainer_asks_for_its_share_unless_its_environment_does(
    monkeypatch: pytest.MonkeyPatch,
    chosen: list[str],
    percentage: str | None,
    expected: str | None,
) -> None:
    own = {name: value for name, value in os.environ.items() if not name.startswith("CUDA_MPS")}
    if percentage is not None:
        own[PERCENTAGE] = percentage
    monkeypatch.setattr(os, "environ", own)
    try:
        set_up_process(load_settings([], ["trainer.nice=0", *chosen], {}))
    finally:
        torch.set_flush_denormal(False)
    assert own.get(PERCENTAGE) == expected
    assert own["CUDA_MPS_CLIENT_PRIORITY"] == "1"


@pytest.mark.parametrize("share", ["0", "-0.5", "1.5", "nan", "half"])
def test_a_share_out_of_range_is_an_error_that_names_it(share: str) -> None:
    with pytest.raises(SettingsError, match=r"trainer\.gpu_share"):
        load_settings([], [f"trainer.gpu_share={share}"], {})
