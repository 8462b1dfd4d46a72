"""MTP heads are swapped between two steps, watched and rolled back, as other drafters are."""

from __future__ import annotations

import torch

from serving.build import build_service
from tests.serving.swap.test_swaps import ask, publish_next, settings_for, wait_until


def noisy(tensors):
    generator = torch.Generator().manual_seed(0)
    return {
        name: tensor + 0.1 * torch.randn(tensor.shape, generator=generator)
        for name, tensor in tensors.items()
    }


def test_a_new_version_is_taken_and_one_rolled_back_without_a_change_of_output(
    tiny_target_dir, tmp_path
):
    settings = settings_for(tiny_target_dir, tmp_path)
    drafter = settings.drafter.model_copy(update={"kind": "mtp"})
    policy = settings.policy.model_copy(update={"drafter": "mtp"})
    settings = settings.model_copy(update={"drafter": drafter, "policy": policy})
    service = build_service(settings)
    service.start()
    try:
        before = ask(service, "before")
        assert publish_next(tmp_path / "weights", noisy) == 1
        wait_until(lambda: service.drafter_status()["version"] == 1)

        after = ask(service, "after")
        assert service.swapper.rollback()["version"] == 0
        back = ask(service, "back")

        assert before.token_ids == after.token_ids == back.token_ids
        versions = [one.last.stats.drafter_version for one in (before, after, back)]
        assert versions == [0, 1, 0]
        assert after.last.stats.proposed > 0
    finally:
        service.stop()
