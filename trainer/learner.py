"""The drafter in training, and its updates.

An update whose loss or gradient is not finite is skipped; three in a row mean that the weights
themselves are broken. Candidates are the running average of the weights: at a constant learning
rate, the noise of small batches costs a drafter that was annealed offline as much as it gains from
them; averaging keeps the gain.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from configs.schema import TrainerSettings
from drafters.trainable import Batch, BatchLoss, Trainable
from targets.head import TargetHead

BETAS = (0.9, 0.95)
AVERAGE_DECAY = 0.96
"""Averages over about the last 25 updates. With 4 passes over 62 requests of C at learning rate
1e-3, tokens_per_step of the bundled drafter went from 2.85 to 3.00 with averaging, and to 2.76
without."""
MAX_SKIPS = 3
"""Consecutive skipped updates after which the weights are restored."""


@dataclass(frozen=True, slots=True)
class UpdateReport:
    """Figures of one update."""

    loss: float
    alpha: list[float]
    """Mean overlap at each draft position on the batch, before the update."""
    agree: list[float]
    """Share of positions where the drafter's argmax was the committed token."""
    num_rows: int
    grad_norm: float
    """Before clipping."""
    lr: float
    skipped: bool
    """Loss or gradient was not finite, so the weights were left unchanged."""


def batch_dtype(device: torch.device) -> torch.dtype:
    """bfloat16 on a GPU, where the drafter computes under autocast; its weights stay float32."""
    return torch.bfloat16 if device.type == "cuda" else torch.float32


class Learner:
    """Weights, optimizer and counters of updates."""

    def __init__(
        self,
        trainable: Trainable[Any, Any],
        model: nn.Module,
        head: TargetHead,
        settings: TrainerSettings,
        device: torch.device,
    ) -> None:
        self.trainable = trainable
        self.model = model.float().to(device)
        self.average = copy.deepcopy(self.model).requires_grad_(False)
        """Running average of the weights: the next candidate."""
        self.head = head
        self.settings = settings
        self.device = device
        self.generator = torch.Generator()
        self.step = 0
        """Updates so far, skipped ones included."""
        self.num_skipped = 0
        self.skips_in_row = 0
        self.lr_scale = 1.0
        """Halved whenever the weights are restored."""
        self.optimizer = self._new_optimizer()

    @property
    def lr(self) -> float:
        """Learning rate of the next update."""
        warm = min(1.0, (self.step + 1) / max(self.settings.warmup_steps, 1))
        return self.settings.lr * self.lr_scale * warm

    def update(self, batch: Batch) -> UpdateReport:
        """Train on one batch; skipped if its loss or gradient is not finite."""
        lr = self.lr
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.zero_grad(set_to_none=True)
        computed = self.loss(batch)
        computed.loss.backward()  # type: ignore[no-untyped-call]
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.settings.grad_clip)
        loss, grad_norm = float(computed.loss.detach()), float(norm)
        finite = bool(torch.isfinite(computed.loss.detach()) & torch.isfinite(norm))
        if finite:
            self.optimizer.step()
            self._update_average()
        self.step += 1
        self.num_skipped += int(not finite)
        self.skips_in_row = 0 if finite else self.skips_in_row + 1
        return UpdateReport(
            loss,
            computed.alpha_K.tolist(),
            computed.agree_K.tolist(),
            computed.num_rows,
            grad_norm,
            lr,
            skipped=not finite,
        )

    def loss(self, batch: Batch) -> BatchLoss:
        """Loss of a batch under the current weights."""
        batch = batch.to(self.device, batch_dtype(self.device))
        return self.trainable.loss(self.model, self.head, batch, self.settings, self.generator)

    def state_tensors(self) -> dict[str, Tensor]:
        """Weights, their average, moments and generator, on the CPU."""
        tensors = {f"model.{n}": t.detach() for n, t in self.model.state_dict().items()}
        tensors |= {f"average.{n}": t for n, t in self.average.state_dict().items()}
        for name, parameter in self.model.named_parameters():
            state = self.optimizer.state.get(parameter, {})
            tensors |= {f"adam.{kind}.{name}": value for kind, value in state.items()}
        tensors["generator"] = self.generator.get_state()
        return {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}

    def load_state_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        """Restore the state that ``state_tensors`` returned.

        Raises:
            ValueError: a weight is missing, unknown or misshapen.
        """
        self.load_weights(_named(tensors, "model."))
        self.average.load_state_dict(_named(tensors, "average."))
        for name, parameter in self.model.named_parameters():
            kinds = {k: tensors.get(f"adam.{k}.{name}") for k in ("step", "exp_avg", "exp_avg_sq")}
            state = {k: t.clone() for k, t in kinds.items() if t is not None}
            if state:
                moved = {k: t if k == "step" else t.to(self.device) for k, t in state.items()}
                self.optimizer.state[parameter] = moved
        self.generator.set_state(tensors["generator"])

    def load_weights(self, weights: Mapping[str, Tensor]) -> None:
        """Replace the weights and their average, and reset the optimizer.

        Raises:
            ValueError: a weight is missing, unknown or misshapen.
        """
        try:
            self.model.load_state_dict(dict(weights))
            self.average.load_state_dict(dict(weights))
        except RuntimeError as error:
            raise ValueError(f"the weights do not fit the drafter: {error}") from error
        self.optimizer = self._new_optimizer()

    @torch.no_grad()
    def _update_average(self) -> None:
        for mean, now in zip(self.average.parameters(), self.model.parameters(), strict=True):
            mean.lerp_(now, 1 - AVERAGE_DECAY)

    def _new_optimizer(self) -> torch.optim.AdamW:
        return torch.optim.AdamW(
            self.model.parameters(),
            lr=self.settings.lr,
            betas=BETAS,
            weight_decay=self.settings.weight_decay,
            fused=True,
        )


def _named(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}
