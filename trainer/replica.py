"""One process' share of an update: gradients of its parts, summed over all processes.

Every process holds the whole drafter and makes the same step, so their weights stay equal bit by
bit. ``trainer.zero`` divides them instead.

Shapes: K draft positions.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from configs.schema import TrainerSettings
from drafters.trainable import BatchLoss, Trainable
from targets.head import TargetHead
from trainer.group import Group
from trainer.parts import Part
from trainer.update import Weights, update_average

Moments = dict[str, dict[str, Tensor]]
"""Name of a parameter -> what the optimizer remembers of it, by name."""


class Replica(Protocol):
    """Computes updates together with the same of the other processes, which all call the same
    methods in the same order."""

    @property
    def is_divided(self) -> bool:
        """All processes must take part in ``moments``."""
        ...

    def update(self, parts: Sequence[Part], lr: float) -> Tensor:
        """One update.

        Args:
            parts: those of this process.

        Returns:
            [3 + 2 K] float32: loss, norm of the gradient before clipping, 1 if the update was
            skipped; then overlap and agreement at each position. The same in every process.
        """
        ...

    def moments(self) -> Moments:
        """What the optimizer remembers, whole; workers may get nothing."""
        ...

    def load(self, weights: Mapping[str, Tensor], moments: Moments | None) -> None:
        """Replace weights, by their names in the model, and moments; ``None``: zeros.

        Raises:
            KeyError: a moment is missing.
            ValueError: a weight is missing, unknown or misshapen.
        """
        ...


class WholeReplica:
    """A process with the whole drafter and the whole optimizer."""

    is_divided = False

    def __init__(
        self,
        trainable: Trainable[Any],
        head: TargetHead,
        settings: TrainerSettings,
        weights: Weights,
        group: Group,
    ) -> None:
        self._trainable, self._head, self._settings = trainable, head, settings
        self._weights, self._group = weights, group

    def update(self, parts: Sequence[Part], lr: float) -> Tensor:
        """See ``Replica.update``."""
        weights, settings = self._weights, self._settings
        weights.lr.fill_(lr)
        weights.model.zero_grad(set_to_none=True)
        figures = torch.zeros(1 + 2 * settings.ttt_steps, device=weights.lr.device)
        for part in parts:
            computed = loss_of(self._trainable, weights.model, self._head, settings, part)
            (computed.loss * part.share).backward()  # type: ignore[no-untyped-call]
            figures += figures_of(computed) * part.share
        figures = self._summed(figures)
        norm = nn.utils.clip_grad_norm_(weights.model.parameters(), settings.grad_clip)
        skipped = ~(torch.isfinite(figures[0]) & torch.isfinite(norm))
        weights.optimizer.step(skipped)
        if self._group.rank == 0:
            update_average(weights, skipped, settings.average_decay)
        return torch.cat((figures[:1], norm[None], skipped[None].float(), figures[1:]))

    def _summed(self, figures: Tensor) -> Tensor:
        """Sum gradients and figures over all processes, in one go."""
        slopes = [p.grad for p in self._weights.model.parameters() if p.grad is not None]
        if self._group.size == 1:
            return figures
        flat = torch.cat([figures, *(slope.flatten() for slope in slopes)])
        self._group.add_up(flat)
        sums = torch.split(flat, [len(figures), *(slope.numel() for slope in slopes)])
        for slope, total in zip(slopes, sums[1:], strict=True):
            slope.copy_(total.view_as(slope))
        return sums[0].clone()

    def moments(self) -> Moments:
        """See ``Replica.moments``."""
        return moments_of(self._weights)

    def load(self, weights: Mapping[str, Tensor], moments: Moments | None) -> None:
        """See ``Replica.load``."""
        load_into(self._weights, weights, moments)


def loss_of(
    trainable: Trainable[Any],
    model: nn.Module,
    head: TargetHead,
    settings: TrainerSettings,
    part: Part,
) -> BatchLoss:
    """Loss of a part, with the chains that its seed draws."""
    generator = torch.Generator().manual_seed(part.seed)
    return trainable.loss(model, head, part.batch, settings, generator)


def figures_of(computed: BatchLoss) -> Tensor:
    """[1 + 2 K] float32: loss, overlap and agreement."""
    loss = computed.loss.detach().float()[None]
    return torch.cat((loss, computed.alpha_K.float(), computed.agree_K.float()))


def moments_of(weights: Weights) -> Moments:
    """What the optimizer remembers of each parameter, itself and no copy."""
    state = weights.optimizer.state
    return {name: state[parameter] for name, parameter in weights.model.named_parameters()}


def load_into(weights: Weights, values: Mapping[str, Tensor], moments: Moments | None) -> None:
    """See ``Replica.load``."""
    load_model(weights.model, values)
    for name, own in moments_of(weights).items():
        for kind, moment in own.items():
            if moments is None:
                moment.zero_()
            else:
                moment.copy_(moments[name][kind])


def load_model(model: nn.Module, values: Mapping[str, Tensor]) -> None:
    """
    Raises:
        ValueError: a weight is missing, unknown or misshapen.
    """
    try:
        model.load_state_dict(dict(values))
    except RuntimeError as error:
        raise ValueError(f"the weights do not fit the drafter: {error}") from error
