"""The optimizer of the networks of draft policies is torch's."""

from __future__ import annotations

import pytest
import torch

from trainer.adam import Adam


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_its_steps_are_those_of_torch(weight_decay: float) -> None:
    numbers = torch.Generator().manual_seed(0)
    start = [torch.randn(shape, generator=numbers) for shape in ((5, 3), (5,), (1, 5))]
    ours, theirs = ([one.clone().requires_grad_() for one in start] for _ in range(2))
    adam = Adam(ours, weight_decay)
    expected = torch.optim.AdamW(theirs, lr=0.01, weight_decay=weight_decay, fused=True)

    for number in range(40):
        lr = 0.01 * (1 - number / 40)
        expected.param_groups[0]["lr"] = lr
        for own, other in zip(ours, theirs, strict=True):
            own.grad = torch.randn(own.shape, generator=numbers)
            other.grad = own.grad.clone()
        adam.step(lr)
        expected.step()

    for own, other in zip(ours, theirs, strict=True):  # but for how the rate is rounded
        torch.testing.assert_close(own, other, rtol=1e-5, atol=1e-6)
    assert not any(map(torch.equal, ours, start))
    assert all(one.grad is None for one in ours)
