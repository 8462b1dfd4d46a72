"""Steps of the optimizers, against values worked out another way."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from tests.trainer.traffic import settings_for
from trainer.optimizers import AdamW, Muon, new_optimizer, orthogonal

GO, SKIP = torch.tensor(False), torch.tensor(True)


class Small(nn.Module):
    """Two matrices and a gain."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.wide = nn.Parameter(torch.randn(12, 40))
        self.table = nn.Parameter(torch.randn(30, 12))
        self.gain = nn.Parameter(torch.ones(12))

    def set_gradients(self, seed: int) -> None:
        torch.manual_seed(seed)
        for parameter in self.parameters():
            parameter.grad = torch.randn_like(parameter)


def factor(matrix: Tensor) -> Tensor:
    """Nearest matrix with orthonormal rows or columns."""
    u, _, v = torch.linalg.svd(matrix, full_matrices=False)
    return u @ v


@pytest.mark.parametrize("shape", [(16, 16), (16, 48), (48, 16)])
def test_orthogonal_keeps_the_directions_of_a_matrix_and_levels_their_sizes(
    shape: tuple[int, int],
) -> None:
    torch.manual_seed(1)
    u, _, v = torch.linalg.svd(torch.randn(shape), full_matrices=False)
    matrix = u @ torch.diag(torch.linspace(0.05, 1.0, 16)) @ v

    found = orthogonal(matrix)

    sizes = u.T @ found @ v.T
    assert found.dtype == torch.float32
    assert float(sizes.diagonal().min()) > 0.6
    assert float(sizes.diagonal().max()) < 1.3
    assert float((sizes - sizes.diagonal().diag()).abs().max()) < 1e-4


def test_a_gradient_of_zeros_moves_nothing() -> None:
    assert orthogonal(torch.zeros(4, 8)).equal(torch.zeros(4, 8))


def test_muon_steps_along_the_orthogonal_factor_of_the_momentum() -> None:
    model = Small()
    optimizer = Muon([model.wide], [model.table, model.gain], torch.tensor(0.01), 0.1)
    expected = model.wide.detach().clone()
    momentum = torch.zeros_like(expected)
    for seed in range(3):
        model.set_gradients(seed)
        gradient = model.wide.grad
        assert gradient is not None
        momentum = 0.95 * momentum + 0.05 * gradient
        direction = factor(0.05 * gradient + 0.95 * momentum)

        optimizer.step(GO)

        moved = expected * (1 - 0.01 * 0.1) - model.wide.detach()
        along = float((moved * direction).sum() / direction.norm() / moved.norm())
        assert along > 0.97
        root_mean_square = float(moved.square().mean().sqrt())
        assert root_mean_square == pytest.approx(0.01 * 0.2, rel=0.2)
        expected = model.wide.detach().clone()
    torch.testing.assert_close(optimizer.state[model.wide]["momentum"], momentum)


def test_the_other_parameters_are_stepped_by_adamw() -> None:
    models = [Small(), Small()]
    muon = Muon([models[0].wide], [models[0].table, models[0].gain], torch.tensor(0.01), 0.1)
    adamw = torch.optim.AdamW(models[1].parameters(), lr=0.01, betas=(0.9, 0.95), weight_decay=0.1)
    for seed in range(3):
        for model in models:
            model.set_gradients(seed)
        muon.step(GO)
        adamw.step()

    torch.testing.assert_close(models[0].table, models[1].table)
    torch.testing.assert_close(models[0].gain, models[1].gain)
    assert not torch.allclose(models[0].wide, models[1].wide)


def test_adamw_steps_as_torch_does_to_the_bit() -> None:
    models = [Small(), Small()]
    lr = torch.tensor(0.01)
    ours = AdamW(models[0].parameters(), lr, 0.1)
    given = {"lr": lr, "betas": (0.9, 0.95), "weight_decay": 0.1, "fused": True}
    theirs = torch.optim.AdamW(models[1].parameters(), **given)  # type: ignore[arg-type]
    for seed in range(6):
        for model in models:
            model.set_gradients(seed)
        if seed == 3:
            ours.step(SKIP)
            continue
        lr.fill_(0.01 * (seed + 1))
        ours.step(GO)
        theirs.step()

    for own, other in zip(models[0].parameters(), models[1].parameters(), strict=True):
        assert own.equal(other)
        for kind, tensor in theirs.state[other].items():
            assert ours.state[own][kind].equal(tensor), kind


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_a_skipped_step_changes_nothing_even_if_gradients_are_not_finite(name: str) -> None:
    model = Small()
    settings = settings_for("unused", "unused", optimizer=name).trainer
    optimizer = new_optimizer(model, [model.wide], settings, torch.tensor(0.01))
    assert isinstance(optimizer, {"adamw": AdamW, "muon": Muon}[name])
    model.set_gradients(0)
    optimizer.step(GO)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    state = {p: {k: t.clone() for k, t in s.items()} for p, s in optimizer.state.items()}
    for parameter in model.parameters():
        assert parameter.grad is not None
        parameter.grad.fill_(float("nan"))

    optimizer.step(SKIP)

    for n, parameter in model.named_parameters():
        assert parameter.equal(before[n]), n
        for kind, tensor in optimizer.state[parameter].items():
            assert tensor.equal(state[parameter][kind]), (n, kind)


def test_the_learning_rate_is_read_at_each_step() -> None:
    model, lr = Small(), torch.tensor(0.01)
    optimizer = Muon([model.wide], [model.table, model.gain], lr, 0.0)
    before = [parameter.detach().clone() for parameter in model.parameters()]
    model.set_gradients(0)
    lr.zero_()

    optimizer.step(GO)

    assert all(p.equal(b) for p, b in zip(model.parameters(), before, strict=True))
