"""A process' share of an update when DeepSpeed divides the drafter over the processes (ZeRO).

Stage 1 divides the moments of AdamW, stage 2 the gradients, too, and stage 3 the weights, too. The
first process keeps the whole drafter beside its share, because it judges, publishes and saves it:
with stage 3 it collects the weights after every update.

Checkpoints hold everything whole, as those of one process do, so they resume on any number of
processes and in any stage.

Source: Rajbhandari et al. 2020, ZeRO, arXiv:1910.02054, Section 5.
"""

from __future__ import annotations

import contextlib
import copy
import logging
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from configs.schema import TrainerSettings
from drafters.trainable import Trainable
from targets.head import TargetHead
from trainer.group import Group
from trainer.optimizers import BETAS
from trainer.parts import Part
from trainer.replica import Moments, figures_of, load_model, loss_of
from trainer.update import Weights, update_average

log = logging.getLogger(__name__)

_MOMENTS = ("exp_avg", "exp_avg_sq")


class ZeroReplica:
    """A process with its share of the drafter's training state."""

    is_divided = True

    def __init__(
        self,
        trainable: Trainable[Any],
        head: TargetHead,
        settings: TrainerSettings,
        weights: Weights,
        group: Group,
    ) -> None:
        self._settings, self._weights, self._group = settings, weights, group
        self._stage = settings.deepspeed.stage
        # Stage 3 leaves nothing whole in the module that it trains.
        model = copy.deepcopy(weights.model) if self._stage == 3 else weights.model
        self._model = model
        with group.shared_work():
            loss = _Loss(trainable, model, head, settings)
            self._engine = _engine(loss, settings, weights.lr.device)

    def update(self, parts: Sequence[Part], lr: float) -> Tensor:
        """See ``Replica.update``."""
        with self._group.shared_work():
            return self._update(parts, lr)

    def _update(self, parts: Sequence[Part], lr: float) -> Tensor:
        engine, size = self._engine, self._group.size
        for group in engine.optimizer.param_groups:
            group["lr"] = lr
        device = self._weights.lr.device
        figures = torch.zeros(1 + 2 * self._settings.ttt_steps, device=device)
        for number, part in enumerate(parts):
            computed = engine(part)
            figures += figures_of(computed) * part.share
            # DeepSpeed takes the mean over processes; what is wanted is the sum over all parts.
            engine.set_gradient_accumulation_boundary(number == len(parts) - 1)
            engine.backward(computed.loss * (part.share * size), scale_wrt_gas=False)
        self._group.add_up(figures)
        engine.step()
        optimizer = engine.optimizer
        norm = torch.as_tensor(engine.get_global_grad_norm() or torch.nan, device=device).float()
        is_sound = torch.isfinite(figures[0]) & torch.isfinite(norm)
        skipped = ~is_sound | torch.tensor(bool(optimizer.overflow), device=device)
        self._collect(skipped)
        return torch.cat((figures[:1], norm[None], skipped[None].float(), figures[1:]))

    def _collect(self, skipped: Tensor) -> None:
        """Bring the new weights, and their average, to the first process."""
        if self._stage == 3:
            with _whole(self._model):
                if self._group.rank == 0:
                    self._weights.model.load_state_dict(self._model.state_dict())
        if self._group.rank == 0:
            update_average(self._weights, skipped, self._settings.average_decay)

    def moments(self) -> Moments:
        """See ``Replica.moments``."""
        from deepspeed.utils import safe_get_full_optimizer_state

        step = self._steps()[0].to(self._weights.lr.device)
        found: Moments = {}
        with self._group.shared_work():
            for name, parameter in self._model.named_parameters():
                own = {kind: safe_get_full_optimizer_state(parameter, kind) for kind in _MOMENTS}
                found[name] = {"step": step, **own}
        return found

    def load(self, weights: Mapping[str, Tensor], moments: Moments | None) -> None:
        """See ``Replica.load``."""
        with self._group.shared_work():
            self._load(weights, moments)

    def _load(self, weights: Mapping[str, Tensor], moments: Moments | None) -> None:
        from deepspeed.utils import safe_set_full_fp32_param, safe_set_full_optimizer_state

        if self._stage == 3 and self._group.rank == 0:
            load_model(self._weights.model, weights)
        with _whole(self._model, changed=True):
            load_model(self._model, weights)
        for name, parameter in self._model.named_parameters():
            safe_set_full_fp32_param(parameter, weights[name].to(self._weights.lr.device))
            for kind in _MOMENTS:
                value = torch.zeros(weights[name].shape) if moments is None else moments[name][kind]
                safe_set_full_optimizer_state(parameter, value.to(self._weights.lr.device), kind)
        first = None if moments is None else next(iter(moments.values()))["step"]
        for step in self._steps():
            step.fill_(0 if first is None else float(first))

    def _steps(self) -> list[Tensor]:
        """The counters of AdamW for all that this process has of it."""
        states = self._engine.optimizer.optimizer.state.values()
        return [state["step"] for state in states if "step" in state]


class _Loss(nn.Module):
    """The loss as a forward pass: while it runs, DeepSpeed provides the weights that it reads."""

    def __init__(
        self,
        trainable: Trainable[Any],
        model: nn.Module,
        head: TargetHead,
        settings: TrainerSettings,
    ) -> None:
        super().__init__()
        self.model = model
        self._known = trainable, head, settings

    def forward(self, part: Part) -> Any:
        """``BatchLoss`` of a part."""
        trainable, head, settings = self._known
        return loss_of(trainable, self.model, head, settings, part)


def _engine(loss: _Loss, settings: TrainerSettings, device: torch.device) -> Any:
    began_s = time.monotonic()
    # Left to itself it takes a GPU that is there for the one to use, even if the trainer does not.
    os.environ.setdefault("DS_ACCELERATOR", device.type)
    # It takes the number of a process on its host for that of its GPU, now and in updates. But a
    # process sees its own GPU alone, as number 0 (``targets.device``): there is no other.
    os.environ["LOCAL_RANK"] = "0"
    import deepspeed

    # None of its own operators: to find out which of them this host can compile, it compiles
    # pieces of most. On a CPU it would also compile an all-reduce, which takes a C++ compiler and a
    # minute; a process killed meanwhile leaves a lock for which all later ones wait.
    deepspeed.ops.__compatible_ops__ = {}
    optimizer = torch.optim.AdamW(
        loss.parameters(), lr=0.0, betas=BETAS, weight_decay=settings.weight_decay
    )
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": settings.grad_clip,
        "zero_allow_untested_optimizer": True,
        "zero_optimization": {
            "stage": settings.deepspeed.stage,
            "stage3_param_persistence_threshold": 0,
        },
        "steps_per_print": 1 << 30,
    }
    log.info("imported DeepSpeed in %.1f s", time.monotonic() - began_s)
    with _without_compiler():
        engine, *_ = deepspeed.initialize(
            model=loss, optimizer=optimizer, config=config, dist_init_required=False
        )
    # Steps with a gradient that is not finite are left out in float32, too.
    engine.optimizer.check_grad_overflow = True
    _begin(engine.optimizer, settings.deepspeed.stage)
    stage, seconds = settings.deepspeed.stage, time.monotonic() - began_s
    log.info("DeepSpeed divides the drafter by ZeRO-%d: ready in %.1f s", stage, seconds)
    return engine


@contextlib.contextmanager
def _without_compiler() -> Iterator[None]:
    """DeepSpeed looks at the class of an optimizer of its own, whose functions it has torch compile
    later: that imports the compiler, which takes 4 s of a core and is not used."""
    name = "TORCHDYNAMO_DISABLE"
    before = os.environ.get(name)
    os.environ[name] = "1"
    try:
        yield
    finally:
        del os.environ[name]
        if before is not None:
            os.environ[name] = before


def _begin(optimizer: Any, stage: int) -> None:
    """Make the moments, which AdamW otherwise makes at its first step: a checkpoint may come before
    it."""
    shares = (
        optimizer.fp32_partitioned_groups_flat
        if stage == 3
        else optimizer.single_partition_of_fp32_groups
    )
    for share in shares:
        state = {kind: torch.zeros_like(share) for kind in _MOMENTS}
        optimizer.optimizer.state[share] = {"step": torch.zeros(()), **state}
    if stage < 3:
        optimizer._lazy_init_hp_params_optimizer_state()


def _whole(model: nn.Module, changed: bool = False) -> Any:
    """Context in which the first process may read the weights whole, or change them."""
    from deepspeed.runtime.zero import GatheredParameters

    return GatheredParameters(list(model.parameters()), modifier_rank=0 if changed else None)
