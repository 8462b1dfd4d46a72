"""Fits K and the share of the drafts that is verified together, one while the other is frozen.

The schedule is that of Learning to Draft (Zhang et al. 2026, arXiv:2603.01639): K is fitted first,
with everything verified; the size first, to drafts of any K; then size, K and size in turns, each
to what the other has become. After every stage the pair decodes a part of the log that no stage is
fitted to, and the fastest pair is kept: later stages may learn the rest by heart.

**PPO** tries shares in ``policies.replay_environment.SizeEnvironment``, and K in the environment
that leaves the share to the frozen size. **Full information** uses what a log tells of every share:
a network learns which part of a whole draft's tokens is kept under each, given the features, from
all drafts whose figures are known; K and size maximise the gain that this one and the hazards
expect. As in ``trainer.ltd``, the features are those of earlier policies and of the newest one.

Shapes: S steps, F features, K the largest draft length, J shares, N rows of a fit.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from policies.budgets import BudgetScores, SavedTimes, cut_rows, size_inputs
from policies.evaluation import speed_of
from policies.network import SIZE_NAMES, Network, Size
from policies.replay_environment import ReplayEnvironment, SizeEnvironment
from policies.replayed_log import ReplayedLog
from trainer.ltd import (
    FullInformation,
    PolicyGate,
    Steps,
    ascend,
    chances_of,
    compare,
    expected_tokens,
    fit_full_information,
)
from trainer.ltd_networks import (
    actor_from,
    actor_of,
    features_of,
    network_of,
    played,
    size_of,
    standard_of,
)
from trainer.ppo import Ppo, fit_ppo, improve

Rows = NDArray[np.bool_]

_VALIDATED_EVERY, _STRETCH = 8, 64
"""One stretch of so many steps in so many tells which pair is the fastest."""
_MOST_FEATURES = 3
"""Policies whose features are fitted to at once: the log's, and the newest."""


@dataclass(frozen=True, slots=True)
class Stage:
    """One turn of the schedule."""

    name: str
    rate: float
    """Tokens per second on the validated steps after it."""
    verified: float
    """Share of the draft tokens that is verified there."""


@dataclass(frozen=True, slots=True)
class Fitted:
    """The fastest pair, and how it came to be."""

    network: Network
    """With a size."""
    stages: tuple[Stage, ...]

    def to_lines(self) -> list[str]:
        return [
            f"{stage.name}: {stage.rate:.1f} tokens/s on validated steps, "
            f"{100 * stage.verified:.0f} % of the draft tokens verified"
            for stage in self.stages
        ]


def fit_depth(
    log: ReplayedLog,
    rows: Rows,
    budgets: BudgetScores | None,
    how: FullInformation,
    size: Size | None,
) -> Network:
    """K, and a size that stays as it is.

    Args:
        rows: [S] steps to fit on.
        budgets: ``None``: the log tells nothing of them, so K is fitted as if everything were
            verified.
        size: ``None``: everything is.
    """
    if size is None or budgets is None:
        return replace(fit_full_information(log, rows, how), size=size)
    fitter = _ByAll(log, rows, budgets, how)
    return fitter.depth(replace(fitter.first(), size=size))


class Fitter(Protocol):
    """One way to fit."""

    def first(self) -> Network:
        """K alone."""
        ...

    def size(self, network: Network, *, any_k: bool) -> Size:
        """The network's size, fitted further, to drafts of its K, or of any."""
        ...

    def depth(self, network: Network) -> Network:
        """The network fitted further, its size frozen."""
        ...


def fit_both(
    log: ReplayedLog, rows: Rows, budgets: BudgetScores, how: FullInformation | Ppo
) -> Fitted:
    """Run the schedule.

    Args:
        rows: [S] steps to fit on and to choose the pair by.
    """
    numbers = np.arange(len(log.steps)) // _STRETCH
    is_validated = rows & (numbers % _VALIDATED_EVERY == 0)
    inner = rows & ~is_validated
    fitter: Fitter = (
        _ByTrying(log.rows(inner), budgets.rows(inner), how)
        if isinstance(how, Ppo)
        else _ByAll(log, inner, budgets, how)
    )
    judged: list[tuple[Stage, Network]] = []

    def judge(name: str, network: Network) -> Network:
        found = played(network, log, budgets).rows(is_validated)
        rate = speed_of(log.rows(is_validated), found.tokens, found.seconds)
        judged.append((Stage(name, rate, found.verified), network))
        return network

    network = judge("K alone", fitter.first())
    network = judge("size, any K", replace(network, size=fitter.size(network, any_k=True)))
    network = judge("size", replace(network, size=fitter.size(network, any_k=False)))
    network = judge("K", fitter.depth(network))
    judge("size again", replace(network, size=fitter.size(network, any_k=False)))
    pairs = [(stage.rate, one) for stage, one in judged if one.size is not None]
    best = max(pairs, key=lambda pair: pair[0])[1]
    return Fitted(best, tuple(stage for stage, _ in judged))


class _ByTrying:
    """PPO in the replay environment."""

    def __init__(self, log: ReplayedLog, budgets: BudgetScores, how: Ppo) -> None:
        self._log, self._budgets, self._how = log, budgets, how
        self._numbers = np.random.default_rng(how.seed)

    def first(self) -> Network:
        return fit_ppo(self._log, np.ones(len(self._log.steps), np.bool_), self._how)

    def size(self, network: Network, *, any_k: bool) -> Size:
        most = self._log.max_draft

        def draft_k(features: list[float]) -> int:
            if any_k:
                return int(self._numbers.integers(1, most + 1))
            return min(network.best(features), most)

        environment = SizeEnvironment(self._log, self._budgets, draft_k, seed=self._how.seed)
        if network.size is None:
            actor = actor_of(self._how.hidden, self._budgets.num_shares, len(SIZE_NAMES))
            standard = standard_of(self._inputs_of(draft_k))
        else:
            actor, standard = actor_from(network.size)
        improve(actor, environment, standard, self._how)
        return size_of(actor, *standard)

    def _inputs_of(self, draft_k: Callable[[list[float]], int]) -> Tensor:
        """[S, N] inputs of a size along the log, with these K."""
        log, saved = self._log, SavedTimes(self._log.table)
        found: list[list[float]] = []

        def choose(at: int, features: list[float]) -> int:
            k = draft_k(features)
            found.append(size_inputs(features, log.steps[at].batch, k, log.max_draft, saved))
            return k

        features_of(log, choose, self._how.seed)
        return torch.tensor(found)

    def depth(self, network: Network) -> Network:
        size = network.size
        assert size is not None, "it is frozen, so there is one"
        environment = ReplayEnvironment(
            self._log, seed=self._how.seed, budgets=self._budgets, share=size.best
        )
        actor, standard = actor_from(network)
        improve(actor, environment, standard, self._how)
        return replace(network_of(actor, *standard), size=size)


class _ByAll:
    """Full information. Every stage begins with other weights: a law that is certain of its choice
    has no slope that would lead it to the one that suits its new partner."""

    def __init__(
        self, log: ReplayedLog, rows: Rows, budgets: BudgetScores, how: FullInformation
    ) -> None:
        self._log, self._rows, self._how = log, rows, how
        self._budgets = budgets
        self._held = torch.from_numpy(rows)
        kept, known = log.rows(rows), budgets.rows(rows)
        self._steps = Steps.of(kept)
        batches = np.array([float(step.batch) for step in kept.steps])[:, None, None]
        drafted = (known.tokens / batches - 1)[:, 1:] * known.is_known[:, 1:, None]
        self._whole, self._cut = (
            torch.from_numpy(one).float()
            for one in (np.broadcast_to(drafted[..., -1:], drafted.shape).copy(), drafted)
        )
        """[S, K, J] tokens that a request keeps of a whole draft, and under each share; 0 where the
        latter is not known."""
        self._seconds = torch.from_numpy((kept.seconds[..., None] - known.saved) / batches).float()
        """[S, K + 1, J] of a request."""
        saved = SavedTimes(log.table)
        ks = range(log.max_draft + 1)
        self._halves = torch.tensor([[saved.half(s.batch, k) for k in ks] for s in kept.steps])
        taken = np.minimum([step.draft_k for step in log.steps], log.max_draft)
        self._seen = [features_of(log, lambda at, _: int(taken[at]), how.seed)[self._held]]

    def first(self) -> Network:
        return fit_full_information(self._log, self._rows, self._how)

    def size(self, network: Network, *, any_k: bool) -> Size:
        x, tokens, seconds = self._expected(network)
        torch.manual_seed(self._how.seed)
        if any_k:
            ks = torch.randint(1, self._log.max_draft + 1, (len(x),))
        else:
            ks = _choices(network, x).clamp_max(self._log.max_draft)
        if not ks.any():
            ks = torch.ones_like(ks)  # nothing is drafted, so no share matters
        drafts = ks > 0
        inputs, at = self._inputs(x, ks)[drafts], torch.arange(len(x))[drafts]
        actor = actor_of(self._how.hidden, self._budgets.num_shares, len(SIZE_NAMES))
        shift, scale = standard_of(inputs)
        sizes = self._repeated(self._steps.sizes)[drafts]
        of_k = tokens[at, ks[drafts]], seconds[at, ks[drafts]]
        ascend(actor, (inputs - shift) * scale, sizes, *of_k, self._how)
        return size_of(actor, shift, scale)

    def depth(self, network: Network) -> Network:
        size = network.size
        assert size is not None, "it is frozen, so there is one"
        x, tokens, seconds = self._expected(network)
        by_k = []
        for k in range(self._log.max_draft + 1):
            shares = _choices(size, self._inputs(x, torch.full((len(x),), k)))
            at = torch.arange(len(x)), k, shares
            by_k.append((tokens[at], seconds[at]))
        torch.manual_seed(self._how.seed)
        actor, (shift, scale) = actor_of(self._how.hidden, len(by_k)), standard_of(x)
        own_tokens, own_seconds = (torch.stack(one, 1) for one in zip(*by_k, strict=True))
        sizes = self._repeated(self._steps.sizes)
        ascend(actor, (x - shift) * scale, sizes, own_tokens, own_seconds, self._how)
        return replace(network_of(actor, shift, scale), size=size)

    def _expected(self, network: Network) -> tuple[Tensor, Tensor, Tensor]:
        """[N, F] features that the log's policy and the newest ones see in the steps to fit on,
        [N, K + 1, J] tokens of a request that these let expect, and [N, K + 1, J] its seconds."""
        features = _features_of(network, self._log, self._budgets, self._how.seed + len(self._seen))
        self._seen = [self._seen[0], *self._seen[1:], features[self._held]]
        del self._seen[1 : len(self._seen) - _MOST_FEATURES + 1]
        raw = torch.cat(self._seen)
        shift, scale = standard_of(raw)
        x, num = (raw - shift) * scale, len(self._seen)
        whole = expected_tokens(x, self._steps.times(num), self._how)
        drafted, stays = (self._repeated(one).flatten(1) for one in (self._whole, self._cut))
        shape = len(raw), self._log.max_draft, self._budgets.num_shares
        kept = chances_of(x, drafted, stays, self._how).view(shape)
        kept[..., -1] = 1.0
        kept = nn.functional.pad(kept, (0, 0, 1, 0))
        return raw, 1 + kept * (whole - 1)[..., None], self._repeated(self._seconds)

    def _inputs(self, raw: Tensor, ks: Tensor) -> Tensor:
        """[N, I] ``policies.network.SIZE_NAMES``."""
        halves = self._repeated(self._halves).gather(1, ks[:, None])
        return torch.cat((raw, ks[:, None] / max(self._log.max_draft, 1), halves), 1)

    def _repeated(self, of_steps: Tensor) -> Tensor:
        num = len(self._seen)
        return of_steps.repeat(num, *[1] * (of_steps.dim() - 1))


def _features_of(network: Network, log: ReplayedLog, budgets: BudgetScores, seed: int) -> Tensor:
    """[S, F] features before every step, as a network makes them."""
    size, saved, most = network.size, SavedTimes(log.table), max(log.max_draft, 1)

    def cut(at: int, features: list[float], k: int) -> list[int] | None:
        if size is None:
            return None
        share = size.best(size_inputs(features, log.steps[at].batch, k, most, saved))
        return cut_rows(log, at, k, share, budgets.num_shares)

    return features_of(log, lambda _, row: min(network.best(row), log.max_draft), seed, cut)


def _choices(layers: Network | Size, inputs: Tensor) -> Tensor:
    """[N] best choices by raw inputs [N, I]."""
    actor, (shift, scale) = actor_from(layers)
    with torch.no_grad():
        found: Tensor = actor((inputs - shift) * scale).argmax(1)
    return found


ALONE = "K alone"


def judge_size(
    network: Network, alone: Network, log: ReplayedLog, rows: Rows, budgets: BudgetScores
) -> PolicyGate:
    """What a network with a size brings over K alone, on held-out steps: over ``alone``, or its own
    K without the size, whichever is faster there. So one that verifies everything brings nothing.

    Args:
        rows: [S] steps on which both were fitted.
    """
    held_out, steps = ~rows, log.rows(~rows)
    ours = played(network, log, budgets).rows(held_out)
    others = (played(one, log).rows(held_out) for one in (alone, replace(network, size=None)))
    theirs = max(others, key=lambda one: speed_of(steps, one.tokens, one.seconds))
    return compare(steps, ours, theirs, ALONE)
