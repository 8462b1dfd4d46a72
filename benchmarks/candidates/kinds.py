"""Ways in which a candidate can be bad. Each is made from version 0 with a seed."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from benchmarks.candidates.world import Rounds, World
from trainer.gate import Judge, Judgement
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
    judges: Mapping[str, Judge]
    """Of version 0 and one domain each, so that version 0 is measured once."""
    counts: Mapping[str, Tensor]
    """[V] int64: how often each token occurs in the completions of a domain."""
    rounds: Mapping[str, Rounds]
    """Those of version 0 on the requests of each domain."""
    better: nn.Module | None
    """Version 0, trained until it passes the gate on the other domain; ``None``: it never did."""

    played: list[list[tuple[int, int]]] = field(default_factory=list)
    """Rounds of the better one on the other domain, once it has served there."""

    def judged(self, model: nn.Module, domain: str) -> Judgement:
        """Compare with version 0 on the held-out traces of a domain."""
        return self.judges[domain].judge(model, self.judging[domain])

    def is_bad_at_home(self, model: nn.Module) -> bool:
        """Much worse than version 0 at what is served."""
        found = self.judged(model, "home")
        return (found.candidate or 0) < MUCH_WORSE * (found.incumbent or 1)


class NotMadeError(RuntimeError):
    """A candidate of this kind could not be made within the bounds."""


@dataclass(frozen=True, slots=True)
class Candidate:
    """One candidate."""

    tensors: dict[str, Tensor]
    model: nn.Module | None
    """For the gate; ``None``: a trainer, which computes in float32, cannot have it."""
    judged_on: str
    """Key of ``Known.judging``: what its trainer holds out."""


MOST_UPDATES = 200
"""Bound of training one candidate: some three minutes of one core."""
NUM_SPOILT = (16, 32, 64, 128, 256, 512, 1024, 2048)
"""Numbers of tokens of 4,096 that are tried."""

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
    model = world.trained(few, 1e-2, MOST_UPDATES, known.is_bad_at_home, seed, averaged=False)
    if model is None:
        raise NotMadeError(f"{MOST_UPDATES} updates were not enough")
    return Candidate(world.tensors_of(model), model, "home")


def _good_offline(world: World, known: Known, seed: int) -> Candidate:
    """Better on the traffic that its trainer saw and spoilt where that traffic does not look: the
    lm_head's rows of tokens that what is served needs most, compared with that traffic, are mixed
    up, as few of them as make it bad."""
    if known.better is None:
        raise NotMadeError("there is none that is better on the other domain")
    ours, theirs = (known.counts[name].double() + 1 for name in ("home", "away"))
    order = torch.argsort(theirs / ours * ours.sum() / theirs.sum())
    generator, name = torch.Generator().manual_seed(seed), "lm_head.weight"
    for num in NUM_SPOILT:
        tensors = world.tensors_of(known.better)
        rows = order[:num]
        mixed = rows[torch.randperm(num, generator=generator)]
        tensors[name][rows] = tensors[name][mixed]
        model = world.model(tensors)
        if known.is_bad_at_home(model):
            if not known.judged(model, "away").verdict.passed:
                raise NotMadeError(f"with {num} tokens spoilt it does not pass the gate")
            return Candidate(tensors, model, "away")
    raise NotMadeError("it is not bad enough at what is served")


KINDS: dict[str, Kind] = {
    "NaN": _nan,
    "permuted vocabulary": _permuted,
    "other dtype": _other_dtype,
    "over-trained": _over_trained,
    "good offline, bad live": _good_offline,
}
