"""Optimisers of the target: Muon for the matrices of the layers, AdamW for everything else.

Shapes: N matrices of R rows and C columns.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import Qwen3ForCausalLM

from examples.target_plan import Plan


class Muon:
    """SGD with momentum and orthogonalised updates, for the matrices of the layers.

    Matrices of equal shape are updated together, so that the number of launches does not grow with
    depth. Updates have a root mean square of about 0.2 lr, like AdamW's.

    Source: Jordan et al. 2024, kellerjordan.github.io/posts/muon; scale of Liu et al. 2025,
    arXiv:2502.16982, Section 2.2.
    """

    def __init__(self, matrices: Sequence[nn.Parameter], lr: Tensor, weight_decay: float) -> None:
        shapes = dict.fromkeys(matrix.shape for matrix in matrices)
        self.groups = [[m for m in matrices if m.shape == shape] for shape in shapes]
        self.momenta = [torch.zeros_like(torch.stack(group)) for group in self.groups]
        self.lr = lr
        self.weight_decay = weight_decay

    @torch.no_grad()
    def step(self) -> None:
        for group, momentum in zip(self.groups, self.momenta, strict=True):
            gradient = torch.stack([matrix.grad for matrix in group])
            momentum.lerp_(gradient, 0.05)
            update = orthogonal(gradient.lerp(momentum, 0.95)).float()
            update *= 0.2 * math.sqrt(max(update.shape[1:])) * self.lr
            torch._foreach_mul_(group, 1 - self.lr * self.weight_decay)
            torch._foreach_sub_(group, list(update.unbind(0)))


def orthogonal(matrices_NRC: Tensor) -> Tensor:
    """Approximately the nearest semi-orthogonal matrices: singular values end in [0.7, 1.2]."""
    if matrices_NRC.shape[1] > matrices_NRC.shape[2]:
        return orthogonal(matrices_NRC.mT).mT
    x = matrices_NRC.bfloat16() if matrices_NRC.is_cuda else matrices_NRC
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(5):
        gram = x @ x.mT
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return x


@dataclass(frozen=True, slots=True)
class Optimisers:
    muon: Muon
    adam: torch.optim.AdamW
    muon_lr: float
    adam_lr: float

    def set_rate(self, fraction: float) -> None:
        """Scale both learning rates. They are device tensors, so replayed graphs see the change."""
        self.muon.lr.fill_(self.muon_lr * fraction)
        self.adam.param_groups[0]["lr"].fill_(self.adam_lr * fraction)

    def step(self) -> None:
        self.muon.step()
        self.adam.step()


def new_optimisers(model: Qwen3ForCausalLM, plan: Plan, device: torch.device) -> Optimisers:
    matrices = [p for p in model.model.layers.parameters() if p.ndim == 2]
    rest = [p for p in model.parameters() if not any(p is matrix for matrix in matrices)]
    on_gpu = device.type == "cuda"
    adam = torch.optim.AdamW(
        rest,
        lr=torch.zeros((), device=device),
        betas=(0.9, 0.95),
        weight_decay=0.0,
        fused=on_gpu,
        capturable=on_gpu,
    )
    muon = Muon(matrices, torch.zeros((), device=device), plan.weight_decay)
    return Optimisers(muon, adam, plan.muon_lr, plan.adam_lr)


def rate_fraction(plan: Plan, step: int, progress: float) -> float:
    """Factor of the learning rate: linear warm-up over steps, constant, then linear to zero.

    Args:
        progress: share of the training time used, in [0, 1].
    """
    warm = min(1.0, (step + 1) / plan.warmup_steps)
    return warm * min(1.0, max(0.0, 1.0 - progress) / (1.0 - plan.decay_from))
