"""Optimizers whose step is part of a captured update.

They read the learning rate from a tensor on the device, and a step that the device says to skip
changes neither weights nor moments. Nothing in them waits for the device.

A state is a dictionary of tensors for each parameter, at addresses that never move: what a
checkpoint holds of an optimizer.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Protocol

import torch
from torch import Tensor, nn

from configs.schema import TrainerSettings

BETAS = (0.9, 0.95)
_EPSILON = 1e-8
_MOMENTUM = 0.95
_POLYNOMIAL = (3.4445, -4.7750, 2.0315)
"""Coefficients of a quintic whose slope at 0 is as large as possible while its fifth iterate keeps
(0, 1] within about 0.7 to 1.2."""
_ITERATIONS = 5
_RMS = 0.2
"""Root mean square of an AdamW step over its learning rate, in practice."""


class Optimizer(Protocol):
    """Changes parameters in place."""

    @property
    def state(self) -> dict[Tensor, dict[str, Tensor]]:
        """What it remembers of each parameter; zeros at first."""
        ...

    def step(self, skipped: Tensor) -> None:
        """One step along the gradients; every parameter has one.

        Args:
            skipped: bool scalar on the device: change nothing.
        """
        ...


class AdamW:
    """torch's fused AdamW, called as ``torch.optim`` does. That itself would import the compiler
    for its first step: a second of a core at every start of a trainer."""

    def __init__(
        self,
        parameters: Iterable[Tensor],
        lr: Tensor,
        weight_decay: float,
        betas: tuple[float, float] = BETAS,
    ) -> None:
        """
        Args:
            parameters: all on one device, and float32.
            lr: float32 scalar on the device, read at each step.
            betas: shares that the means of gradients and of their squares keep at each step.
        """
        self._owned, self._lr, self._weight_decay = list(parameters), lr, weight_decay
        self._betas = betas
        self.state: dict[Tensor, dict[str, Tensor]] = {
            parameter: {
                "step": torch.zeros((), device=parameter.device),
                "exp_avg": torch.zeros_like(parameter),
                "exp_avg_sq": torch.zeros_like(parameter),
            }
            for parameter in self._owned
        }

    @torch.no_grad()
    def step(self, skipped: Tensor) -> None:
        """See ``Optimizer.step``."""
        moved = [parameter for parameter in self._owned if parameter.grad is not None]
        found_inf, states = skipped.float(), [self.state[parameter] for parameter in moved]
        steps = [state["step"] for state in states]
        torch._foreach_add_(steps, 1)
        torch._fused_adamw_(
            moved,
            [parameter.grad for parameter in moved if parameter.grad is not None],
            [state["exp_avg"] for state in states],
            [state["exp_avg_sq"] for state in states],
            [],
            steps,
            amsgrad=False,
            lr=self._lr,
            beta1=self._betas[0],
            beta2=self._betas[1],
            weight_decay=self._weight_decay,
            eps=_EPSILON,
            maximize=False,
            grad_scale=None,
            found_inf=found_inf,
        )
        torch._foreach_sub_(steps, [found_inf] * len(steps))


class Muon:
    """Steps along the orthogonal factor of the momentum of a matrix, so that all its directions
    move alike; AdamW for all other parameters.

    A step has the root mean square that AdamW's has at the same learning rate, so one learning rate
    serves both.

    Source: Jordan et al. 2024, kellerjordan.github.io/posts/muon; the scale of a step: Liu et al.
    2025, arXiv:2502.16982, Section 2.2.
    """

    def __init__(
        self,
        matrices: Sequence[Tensor],
        others: Iterable[Tensor],
        lr: Tensor,
        weight_decay: float,
    ) -> None:
        """
        Args:
            matrices: [rows, columns] each.
            others: parameters of AdamW.
            lr: float32 scalar on the device, read at each step.
        """
        self._matrices, self._lr, self._weight_decay = list(matrices), lr, weight_decay
        self._others = AdamW(others, lr, weight_decay)
        momenta = {matrix: {"momentum": torch.zeros_like(matrix)} for matrix in self._matrices}
        self.state = {**momenta, **self._others.state}

    @torch.no_grad()
    def step(self, skipped: Tensor) -> None:
        """See ``Optimizer.step``."""
        self._others.step(skipped)
        for matrix in self._matrices:
            gradient, momentum = matrix.grad, self.state[matrix]["momentum"]
            assert gradient is not None, "every parameter has a gradient"
            new = torch.lerp(momentum, gradient, 1 - _MOMENTUM)
            ahead = torch.lerp(gradient, new, _MOMENTUM)
            scale = _RMS * max(matrix.shape) ** 0.5
            moved = matrix * (1 - self._lr * self._weight_decay)
            moved -= self._lr * scale * orthogonal(ahead)
            # A gradient that is not finite must not reach the weights, not even times zero.
            momentum.copy_(torch.where(skipped, momentum, new))
            matrix.copy_(torch.where(skipped, matrix, moved))


class Elsewhere:
    """In place of an optimizer that the processes of a trainer divide among themselves."""

    def __init__(self) -> None:
        self.state: dict[Tensor, dict[str, Tensor]] = {}

    def step(self, skipped: Tensor) -> None:
        """Nobody calls it."""
        raise AssertionError("the processes step together")


def orthogonal(matrix: Tensor) -> Tensor:
    """About the nearest matrix with orthonormal rows (or columns, if it has more rows): singular
    values become 0.7 to 1.2, but for those that are far smaller than the largest.

    Args:
        matrix: [rows, columns] float32.

    Returns:
        float32 of the same shape, computed in bfloat16 on a GPU.
    """
    a, b, c = _POLYNOMIAL
    is_tall = matrix.shape[0] > matrix.shape[1]
    x = matrix.T if is_tall else matrix
    x = x / (x.norm() + 1e-7)
    x = x.to(torch.bfloat16 if matrix.is_cuda else torch.float32)
    for _ in range(_ITERATIONS):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return (x.T if is_tall else x).float()


def new_optimizer(
    model: nn.Module, matrices: Sequence[Tensor], settings: TrainerSettings, lr: Tensor
) -> Optimizer:
    """The optimizer that ``trainer.optimizer`` names.

    Args:
        matrices: parameters of ``model`` that Muon may change.
        lr: float32 scalar on the device, read at each step.
    """
    if settings.optimizer == "adamw":
        return AdamW(model.parameters(), lr, settings.weight_decay)
    names = {id(matrix) for matrix in matrices}
    others = [parameter for parameter in model.parameters() if id(parameter) not in names]
    return Muon(matrices, others, lr, settings.weight_decay)
