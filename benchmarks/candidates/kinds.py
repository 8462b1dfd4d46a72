"""Ways in which a candidate can be bad. Each is made from version 0 with a seed."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from benchmarks.candidates.world import World
from trainer.rows import HeldSample

MUCH_WORSE = 0.75
"""Ratio of tokens_per_step to version 0's below which trained candidates are bad: well under
``1 - swap.max_drop``, so that a version that stays is a failure and not a matter of taste."""


@dataclass(frozen=True, slots=True)
class Known:
    """What a trainer that goes astray has learnt from."""

    home: Sequence[HeldSample]
    """Of the domain that version 0 was made for, and that is served."""
    away: Sequence[HeldSample]
    """Of another domain, to train on."""
    judging: Mapping[str, Sequence[HeldSample]]
    """``home`` and ``away``: never trained on."""


@dataclass(frozen=True, slots=True)
class Candidate:
    """One candidate."""

    tensors: dict[str, Tensor]
    model: nn.Module | None
    """For the gate; ``None``: a trainer, which computes in float32, cannot have it."""
    judged_on: str
    """Key of ``Known.judging``: what its trainer holds out."""


Kind = Callable[[World, Known, int], Candidate]


def _nan(world: World, known: Known, seed: int) -> Candidate:
    chance, tensors = random.Random(seed), world.tensors()
    name = chance.choice([n for n, t in tensors.items() if t.is_floating_point()])
    flat = tensors[name].view(-1)
    flat[chance.randrange(len(flat))] = float("nan")
    return Candidate(tensors, world.model(tensors), "home")


def _permuted(world: World, known: Known, seed: int) -> Candidate:
    """What each output stands for is mixed up; nothing else tells."""
    tensors, generator = world.tensors(), torch.Generator().manual_seed(seed)
    name = "lm_head.weight"
    order = torch.randperm(len(tensors[name]), generator=generator)
    tensors[name] = tensors[name][order]
    return Candidate(tensors, world.model(tensors), "home")


def _other_dtype(world: World, known: Known, seed: int) -> Candidate:
    tensors = world.tensors()
    name = "lm_head.weight"
    if seed % 3 == 0:
        tensors[name] = (tensors[name] * 1000).int()
    elif seed % 3 == 1:
        tensors[name] = tensors[name].to(torch.float8_e4m3fn)
    else:
        tensors[name] = tensors[name].double()
        tensors[name][seed % len(tensors[name]), 0] = 1e300
    return Candidate(tensors, None, "home")


def _over_trained(world: World, known: Known, seed: int) -> Candidate:
    """At a hundred times the learning rate on four traces, until it knows nothing else."""
    few = random.Random(seed).sample(list(known.home), 4)
    judging = known.judging["home"]
    judge = world.judge(world.model())

    def is_worse(model: nn.Module) -> bool:
        found = judge.judge(model, judging)
        return (found.candidate or 0) < MUCH_WORSE * (found.incumbent or 1)

    model = world.trained(few, 1e-2, 1000, is_worse, seed, averaged=False)
    return Candidate(world.tensors_of(model), model, "home")


def _good_offline(world: World, known: Known, seed: int) -> Candidate:
    """Passes the gate on the domain that its trainer saw, and is bad at what is served."""
    judge = world.judge(world.model())
    away, home = known.judging["away"], known.judging["home"]

    def is_both(model: nn.Module) -> bool:
        offline, live = judge.judge(model, away), judge.judge(model, home)
        is_bad = (live.candidate or 0) < MUCH_WORSE * (live.incumbent or 1)
        return offline.verdict.passed and is_bad

    model = world.trained(known.away, 3e-3, 1500, is_both, seed, averaged=True)
    return Candidate(world.tensors_of(model), model, "away")


KINDS: dict[str, Kind] = {
    "NaN": _nan,
    "permuted vocabulary": _permuted,
    "other dtype": _other_dtype,
    "over-trained": _over_trained,
    "good offline, bad live": _good_offline,
}
