"""The drafter being trained, and one update of it.

An update that is not finite anywhere changes nothing; three in a row mean that the weights
themselves have gone wrong. What is judged and published is the running average of the weights:
a drafter that was annealed offline loses by the noise of small batches at a constant learning rate
what it gains from them, and the average keeps the gain.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from configs.schema import TrainerSettings
from drafters.eagle3.model import Eagle3
from drafters.eagle3.training import Objective, TTTBatch, TTTLoss, ttt_loss
from targets.head import TargetHead

BETAS = (0.9, 0.95)
AVERAGE_DECAY = 0.96
"""The average reaches back about 25 updates. On 62 requests of C, 4 passes took tokens_per_step of
the bundled drafter from 2.85 to 3.00 averaged, to 2.76 not averaged (learning rate 1e-3)."""
MAX_SKIPS = 3
"""Updates skipped in a row after which the weights are not trusted any more."""


@dataclass(frozen=True, slots=True)
class UpdateReport:
    """What one update did."""

    loss: float
    alpha: list[float]
    """Mean overlap of each draft position on the batch, before the update."""
    agree: list[float]
    """Share of positions where the drafter's argmax was the committed token."""
    num_rows: int
    grad_norm: float
    """Before clipping."""
    lr: float
    skipped: bool
    """Loss or gradient was not finite, so nothing was changed."""


def objective_for(settings: TrainerSettings, device: torch.device) -> Objective:
    """On a GPU every chain is carried to its end, and no logits are kept; on a CPU, where training
    takes its time from serving, half of the chains. See ``Objective``."""
    on_gpu = device.type == "cuda"
    return Objective(
        num_steps=settings.ttt_steps,
        loss=settings.loss,
        chain_share=1.0 if on_gpu else 0.5,
        keep_logits=not on_gpu,
    )


def batch_dtype(device: torch.device) -> torch.dtype:
    """bfloat16 on a GPU, which puts the layer under autocast; master weights stay float32."""
    return torch.bfloat16 if device.type == "cuda" else torch.float32


class Learner:
    """Weights, optimizer and the counters of updates. The trainer's running state."""

    def __init__(
        self, model: Eagle3, head: TargetHead, settings: TrainerSettings, device: torch.device
    ) -> None:
        self.model = model.float().to(device)
        self.average = copy.deepcopy(self.model).requires_grad_(False)
        """What candidates are made of."""
        self.head = head
        self.settings = settings
        self.device = device
        self.objective = objective_for(settings, device)
        self.generator = torch.Generator()
        self.step = 0
        """Updates made, skipped ones included."""
        self.num_skipped = 0
        self.skips_in_row = 0
        self.lr_scale = 1.0
        """Halved whenever the weights had to be restored."""
        self.optimizer = self._new_optimizer()

    @property
    def lr(self) -> float:
        """Learning rate of the next update."""
        warm = min(1.0, (self.step + 1) / max(self.settings.warmup_steps, 1))
        return self.settings.lr * self.lr_scale * warm

    def update(self, batch: TTTBatch) -> UpdateReport:
        """One batch: loss, check, clip, step."""
        lr = self.lr
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.zero_grad(set_to_none=True)
        judged = self.judge(batch)
        judged.loss.backward()  # type: ignore[no-untyped-call]
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.settings.grad_clip)
        loss, grad_norm = float(judged.loss.detach()), float(norm)
        finite = bool(torch.isfinite(judged.loss.detach()) & torch.isfinite(norm))
        if finite:
            self.optimizer.step()
            self._follow()
        self.step += 1
        self.num_skipped += int(not finite)
        self.skips_in_row = 0 if finite else self.skips_in_row + 1
        return UpdateReport(
            loss,
            judged.alpha_K.tolist(),
            judged.agree_K.tolist(),
            judged.num_rows,
            grad_norm,
            lr,
            skipped=not finite,
        )

    def judge(self, batch: TTTBatch) -> TTTLoss:
        """Loss of a batch under the present weights."""
        batch = batch.to(self.device, batch_dtype(self.device))
        return ttt_loss(
            self.model, self.head.embed_VH, self.head.lm_head, batch, self.objective, self.generator
        )

    def state_tensors(self) -> dict[str, Tensor]:
        """Weights, moments and generator, to be given back to ``load_state_tensors``."""
        tensors = {f"model.{n}": t.detach() for n, t in self.model.state_dict().items()}
        tensors |= {f"average.{n}": t for n, t in self.average.state_dict().items()}
        for name, parameter in self.model.named_parameters():
            state = self.optimizer.state.get(parameter, {})
            tensors |= {f"adam.{kind}.{name}": value for kind, value in state.items()}
        tensors["generator"] = self.generator.get_state()
        return {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}

    def load_state_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        """Undo ``state_tensors``.

        Raises:
            ValueError: a tensor of the model is missing, unknown or of another shape.
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
        """Take these weights, their average included, and forget the moments.

        Raises:
            ValueError: as ``load_state_tensors``.
        """
        try:
            self.model.load_state_dict(dict(weights))
            self.average.load_state_dict(dict(weights))
        except RuntimeError as error:
            raise ValueError(f"the weights do not fit the drafter: {error}") from error
        self.optimizer = self._new_optimizer()

    @torch.no_grad()
    def _follow(self) -> None:
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
