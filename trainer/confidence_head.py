"""Fits the head of the policy ``specdecpp`` to the positions of traces.

A sample is one position that was verified while all before it were kept, with the figures that the
device saw before its token was drawn, and whether it was kept. Positions of drafts that were cut
are among them: the cut looked at the same figures and nothing else, so given them it says nothing
about the outcome. What lies beyond a cut or a rejection is not known and left out.

As in the paper the loss is binary cross-entropy in which a rejection weighs six times: the head is
to be careful. Predictions are then lower than frequencies; ``policy.specdecpp.most_risk`` is meant
for them.

Shapes: N samples.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from policies.confidence_head import HIDDEN, NAMES, Head, inputs_of
from policies.logged import LoggedStep, drafters_of, of_drafter
from trainer.adam import Adam

Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]

_LEAST_SAMPLES = 200
_STRETCH = 16
"""Consecutive steps that are fitted on, or held out, together: their texts resemble each other."""
_LEAST_DEVIATION = 1e-3
_RESAMPLES = 400
PLACE = "their place alone"
"""What a gate compares with, in words."""


@dataclass(frozen=True, slots=True)
class HeadFit:
    """How to fit."""

    epochs: int = 200
    lr: float = 0.02
    """Falls to 0."""
    reject_weight: float = 6.0
    seed: int = 0


@dataclass(frozen=True, slots=True, eq=False)
class HeadSamples:
    """Positions of drafts."""

    inputs: Floats
    """[N, 5], see ``policies.confidence_head.inputs_of``."""
    kept: Bools
    """[N]."""
    places: NDArray[np.int64]
    """[N] position in the draft, from 0."""
    stretches: NDArray[np.int64]
    """[N] number of the stretch of steps that each is of."""

    def __len__(self) -> int:
        return len(self.kept)

    def rows(self, chosen: Bools) -> HeadSamples:
        """Some of them."""
        return HeadSamples(
            self.inputs[chosen], self.kept[chosen], self.places[chosen], self.stretches[chosen]
        )


def samples_of(steps: Sequence[LoggedStep], drafter: str | None) -> HeadSamples:
    """The positions that a log says something about.

    Args:
        drafter: ``None``: the one with the most steps.

    Raises:
        ValueError: the log has no figures, or too few.
    """
    chosen = drafter or next(iter(drafters_of(steps)), "none")
    inputs: list[Floats] = []
    kept: list[bool] = []
    places: list[int] = []
    stretches: list[int] = []
    for at, step in enumerate(of_drafter(steps, chosen)):
        for row in step.rows:
            num = min(row.num_accepted + 1, row.num_verified)
            if row.considered is None or not num:
                continue
            figures = np.array(row.considered.confidence, np.float64).reshape(1, -1, 3)
            inputs.append(inputs_of(figures, np.array([row.temperature]))[0, :num])
            kept += [j < row.num_accepted for j in range(num)]
            places += range(num)
            stretches += [at // _STRETCH] * num
    if len(kept) < _LEAST_SAMPLES:
        raise ValueError(
            f"{len(kept)} positions with figures of confidence were drafted by {chosen!r}, at "
            f"least {_LEAST_SAMPLES} are needed; serve some traffic with a policy that cuts drafts "
            f"on the device, such as policy.kind=confidence"
        )
    return HeadSamples(
        np.concatenate(inputs), np.array(kept), np.array(places), np.array(stretches)
    )


def split_samples(samples: HeadSamples, held_out: float) -> tuple[HeadSamples, HeadSamples]:
    """Samples to fit on, and held-out ones, spread over the log.

    Raises:
        ValueError: the log is too short for both.
    """
    every = max(round(1 / held_out), 2)
    is_held_out = samples.stretches % every == every - 1
    if not is_held_out.any() or is_held_out.all():
        raise ValueError(
            f"the log is too short to fit on some steps and judge on others; at least "
            f"{every * _STRETCH} are needed"
        )
    return samples.rows(~is_held_out), samples.rows(is_held_out)


def fit_head(samples: HeadSamples, how: HeadFit) -> Head:
    """Minimise the weighted cross-entropy."""
    torch.manual_seed(how.seed)
    x = torch.from_numpy(samples.inputs).float()
    mean, scale = x.mean(0), 1 / x.std(0).clamp_min(_LEAST_DEVIATION)
    kept = torch.from_numpy(samples.kept).float()
    weights = torch.where(kept > 0, 1.0, how.reject_weight)
    first, second = nn.Linear(len(NAMES), HIDDEN), nn.Linear(HIDDEN, 1)
    parameters = [*first.parameters(), *second.parameters()]
    optimizer = Adam(parameters)
    standard = (x - mean) * scale
    for epoch in range(how.epochs):
        logits = second(torch.tanh(first(standard)))[:, 0]
        loss = nn.functional.binary_cross_entropy_with_logits(logits, kept, weights)
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step(how.lr * (1 - epoch / how.epochs))
    tensors = (mean, scale, first.weight, first.bias, second.weight[0], second.bias)
    return Head(*(tensor.detach().float().numpy().copy() for tensor in tensors))


@dataclass(frozen=True, slots=True)
class HeadGate:
    """A head against the position alone, or against another head, on positions that neither has
    seen."""

    auc: float
    """Probability that it ranks a kept position above a rejected one; 0.5 tells nothing."""
    place_auc: float
    """Of the position: how often each was kept where the head was fitted. Or of the other head."""
    low: float
    """Lower bound of the difference at 95 %, by resampling stretches of steps."""
    against: str = PLACE
    """What it is compared with, in words."""

    @property
    def passed(self) -> bool:
        return self.low > 0

    def to_line(self) -> str:
        verdict = "passed" if self.passed else "failed"
        return (
            f"gate {verdict}: ranks kept positions above rejected ones with probability "
            f"{self.auc:.3f}, {self.against} {self.place_auc:.3f}; difference at least "
            f"{self.low:+.3f} (95 %)"
        )


def judge_head(
    head: Head,
    fitted_on: HeadSamples,
    held_out: HeadSamples,
    other: Head | None = None,
    against: str = PLACE,
) -> HeadGate:
    """Compare what the head says of held-out positions with what the place in the draft does, or
    another head. Whether cutting by it pays is for ``policies evaluate`` and the guard to say.

    Args:
        other: ``None``: the place.
        against: what it is compared with, in words.
    """
    baseline = _by_place(fitted_on, held_out) if other is None else _logits(other, held_out)
    by_head = _logits(head, held_out)
    rng = np.random.default_rng(0)
    names, of = np.unique(held_out.stretches, return_inverse=True)
    groups = [np.flatnonzero(of == g) for g in range(len(names))]
    differences = []
    for _ in range(_RESAMPLES):
        drawn = rng.integers(0, len(groups), len(groups))
        rows = np.concatenate([groups[g] for g in drawn])
        labels = held_out.kept[rows]
        if labels.all() or not labels.any():
            continue
        differences.append(auc(by_head[rows], labels) - auc(baseline[rows], labels))
    low = float(np.percentile(differences, 2.5)) if differences else -1.0
    return HeadGate(auc(by_head, held_out.kept), auc(baseline, held_out.kept), low, against)


def _by_place(fitted_on: HeadSamples, held_out: HeadSamples) -> Floats:
    """[N] how often positions at the same place were kept where a head was fitted."""
    most = int(max(fitted_on.places.max(), held_out.places.max())) + 1
    counts = np.bincount(fitted_on.places, minlength=most)
    kept = np.bincount(fitted_on.places, fitted_on.kept, minlength=most)
    found: Floats = (kept / np.maximum(counts, 1))[held_out.places]
    return found


def _logits(head: Head, samples: HeadSamples) -> Floats:
    x = (samples.inputs - head.mean) * head.scale
    hidden = np.tanh(x @ head.w1.T + head.b1)
    return np.asarray(hidden @ head.w2 + head.b2, np.float64)


def auc(scores: Floats, labels: Bools) -> float:
    """Probability that a true one scores higher than a false one, ties counting half; 0.5 if all
    are alike."""
    num_true = int(labels.sum())
    num_false = len(labels) - num_true
    if not num_true or not num_false:
        return 0.5
    _, of, counts = np.unique(scores, return_inverse=True, return_counts=True)
    ranks = (counts.cumsum() - (counts - 1) / 2)[of]
    above = float(ranks[labels].sum()) - num_true * (num_true + 1) / 2
    return above / (num_true * num_false)
