"""Fits the network of K of the policy ``ltd`` on a replayed log, and judges fitted policies.

Two ways. **PPO** in the replay environment (``trainer.ppo``), as the paper does it: an actor and a
critic, rewards of the actions that were tried. **Full information**: a log says what *every* K
would have brought in every step, so nothing needs to be tried. What one step would have brought is
mostly chance, though: a network that is fitted to the gains themselves learns these by heart. So a
first one learns how likely each position is to be kept, given the features, from all positions that
were verified; and the policy maximises the gain that this one expects, sum over K of probability
times advantage. The features depend on which K ran before, so after a first fit on the logged ones
both are repeated on those that the fitted policies see, all of them together (Ross, Gordon and
Bagnell 2011, arXiv:1011.0686): a policy that is fitted to the features of the one before it alone
is lost among those that it makes itself. ``trainer.sizes`` fits K and a verification budget.

Shapes: S steps, F features, A actions (K = 0 to A - 1), H hidden units.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import NamedTuple, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from policies.budgets import BudgetScores
from policies.cut_estimate import off_policy_gain_of
from policies.evaluation import best_ks, speed_of
from policies.logged import Continuations, Floats, LoggedRow
from policies.network import Network
from policies.off_policy import Estimate, block_steps
from policies.played_pair import Ks, PairPlay
from policies.replayed_log import ReplayedLog
from trainer.adam import Adam
from trainer.ltd_networks import actor_of, best_k, features_of, network_of, played, standard_of

Rows = NDArray[np.bool_]

_RESAMPLES = 1000


@dataclass(frozen=True, slots=True)
class FullInformation:
    """How to fit from what every K would have brought."""

    hidden: int = 32
    epochs: int = 300
    passes: int = 60
    """Over the steps, by the network that predicts acceptance,"""
    minibatch: int = 512
    """in updates of so many."""
    rounds: int = 4
    """Fits; the features of the second and later ones are those of the policies before, too."""
    lr: float = 3e-3
    entropy: float = 0.003
    """Weight of the law's entropy at first; it falls to 0."""
    decay: float = 1e-2
    """Of the weights of the network that predicts acceptance."""
    seed: int = 0

    def times(self, effort: float) -> Self:
        """A shorter fit, which finds less.

        Args:
            effort: share of the updates, in (0, 1].
        """
        return replace(
            self,
            epochs=max(round(self.epochs * effort), 1),
            passes=max(round(self.passes * effort), 1),
            rounds=min(max(round(self.rounds * effort), 2), self.rounds),
        )


def fit_full_information(log: ReplayedLog, rows: Rows, how: FullInformation) -> Network:
    """Maximise the gain of some steps over the speed of their load, which rises as the policy does.

    At a given speed the gain of a step is tokens less seconds times speed; the policy that
    maximises it with its own speed has the largest quotient of tokens and seconds (Dinkelbach
    1967).

    Args:
        rows: [S] steps to fit on; the others only lead to the features of these.
    """
    torch.manual_seed(how.seed)
    ks = np.minimum([step.draft_k for step in log.steps], log.max_draft)
    features = [features_of(log, lambda at, _: int(ks[at]), how.seed)]
    actor, held = actor_of(how.hidden, log.max_draft + 1), torch.from_numpy(rows)
    steps = Steps.of(log.rows(rows))
    network = _fitted(actor, [one[held] for one in features], steps, how)
    for number in range(1, how.rounds):
        features.append(features_of(log, partial(best_k, network), how.seed + number))
        network = _fitted(actor, [one[held] for one in features], steps, how)
    return network


class Steps(NamedTuple):
    """What some steps of a log say, each of them N times."""

    sizes: Tensor
    """[S] int64, of their batches."""
    seconds: Tensor
    """[S, A] of a request at every K."""
    reached: Tensor
    """[S, A - 1] rows that reached each position,"""
    kept: Tensor
    """and those that kept it."""

    @classmethod
    def of(cls, log: ReplayedLog) -> Self:
        """All of them once."""
        batches = torch.tensor([float(step.batch) for step in log.steps])[:, None]
        # Counted in numpy: ten times as fast as in torch, row by row.
        reached, kept = np.zeros((2, len(log.steps), log.max_draft), np.float32)
        for at, step in enumerate(log.steps):
            for row in step.rows:
                reached[at, : min(row.num_accepted + 1, row.num_verified)] += 1
                kept[at, : row.num_accepted] += 1
                beyond = _beyond(row, step.may_cut, log.beyond)
                if beyond and row.num_accepted == row.num_verified:
                    reached[at] += _chances(row, beyond, log.max_draft, before=True).numpy()
                    kept[at] += _chances(row, beyond, log.max_draft, before=False).numpy()
        seconds = torch.from_numpy(log.seconds).float() / batches
        counts = map(torch.from_numpy, (reached, kept))
        return cls(torch.from_numpy(log.sizes), seconds, *counts)

    def times(self, num: int) -> Self:
        return type(self)(*(one.repeat(num, *[1] * (one.dim() - 1)) for one in self))


def _beyond(row: LoggedRow, may_cut: bool, beyond: Continuations) -> Sequence[float]:
    """[n] what is known of positions behind those that were verified, as probabilities to be kept,
    entries before them included: of a replay, or, where the device has cut a draft at what was
    least likely to be kept, of its figures. Empty: nothing."""
    if row.replayed or not may_cut or row.considered is None:
        return row.replayed
    found: list[float] = beyond.probabilities(row)[: row.considered.length].tolist()
    return found


def _chances(row: LoggedRow, chances: Sequence[float], most: int, *, before: bool) -> Tensor:
    """[most] probability that a draft that was kept whole, had it been longer, would have reached
    each further position, or kept it, as far as that is known."""
    start, stop = min(row.num_verified, most), min(len(chances), most)
    kept = torch.tensor(chances[start:stop]).cumprod(0)
    found = torch.zeros(most)
    found[start:stop] = torch.cat((torch.ones(1), kept))[:-1] if before else kept
    return found


def _fitted(
    actor: nn.Sequential, features: Sequence[Tensor], steps: Steps, how: FullInformation
) -> Network:
    """Fit to the features of the same steps under several policies."""
    every = torch.cat(list(features))
    shift, scale = standard_of(every)
    x, steps = (every - shift) * scale, steps.times(len(features))
    ascend(actor, x, steps.sizes, expected_tokens(x, steps, how), steps.seconds, how)
    return network_of(actor, shift, scale)


def expected_tokens(x: Tensor, steps: Steps, how: FullInformation) -> Tensor:
    """[S, A] tokens of a request that the features of each step let expect at every K: by a network
    of hazards, fitted to these steps, that is told of every position that was verified.

    Args:
        x: [S, F] standardised features.
    """
    survivals = chances_of(x, steps.reached, steps.kept, how).cumprod(1)
    return 1 + nn.functional.pad(survivals.cumsum(1), (1, 0))


def chances_of(x: Tensor, num: Tensor, kept: Tensor, how: FullInformation) -> Tensor:
    """[S, O] share that is kept of each of O things, by a network that is fitted to these counts.

    Args:
        x: [S, F] standardised features.
        num: [S, O] how many there were,
        kept: [S, O] and how many of them were kept.
    """
    network = actor_of(how.hidden, kept.shape[1], x.shape[1])
    optimizer = Adam(network.parameters(), weight_decay=how.decay)
    for number in range(how.passes):
        lr = how.lr * (1 - number / how.passes)
        for drawn in torch.split(torch.randperm(len(x)), how.minibatch):
            odds, weights = network(x[drawn]), num[drawn]
            losses = weights * nn.functional.softplus(odds) - kept[drawn] * odds
            (losses.sum() / weights.sum().clamp_min(1)).backward()
            optimizer.step(lr)
    with torch.no_grad():
        return torch.sigmoid(network(x))


def ascend(
    actor: nn.Sequential,
    x: Tensor,
    sizes: Tensor,
    tokens: Tensor,
    seconds: Tensor,
    how: FullInformation,
) -> None:
    """Maximise the expected gain.

    Args:
        x: [S, N] standardised inputs.
        sizes: [S] int64, of the batches.
        tokens: [S, A] expected of a request by every action,
        seconds: [S, A] and what it takes.
    """
    optimizer = Adam(actor.parameters())
    num_sizes = int(sizes.max()) + 1
    for epoch in range(how.epochs):
        law = torch.softmax(actor(x), dim=1)
        with torch.no_grad():
            speeds = _speeds((law * tokens).sum(1), (law * seconds).sum(1), sizes, num_sizes)
        gain = tokens - speeds[sizes][:, None] * seconds
        left = 1 - epoch / how.epochs
        entropy = -(law * law.clamp_min(1e-9).log()).sum(1).mean()
        loss = -((law * gain).sum(1).mean() + how.entropy * left * entropy)
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step(how.lr * left)


def _speeds(tokens: Tensor, seconds: Tensor, sizes: Tensor, num_sizes: int) -> Tensor:
    """[num_sizes] tokens over seconds by size of batch; 0 where there is none."""
    sums = torch.zeros(2, num_sizes).index_add(1, sizes, torch.stack((tokens, seconds)))
    return sums[0] / sums[1].clamp_min(1e-12)


# ---- the gate ------------------------------------------------------------------------------------


FIXED = "the best fixed K of each load"
"""What a gate compares with, in words."""


@dataclass(frozen=True, slots=True)
class PolicyGate:
    """A fitted policy against the best fixed K of each load, or against another policy, on steps
    that neither has seen."""

    rate: float
    """Tokens per second of the policy,"""
    fixed_rate: float
    """and of the K that were best on the steps that it was fitted on, or of the other policy."""
    low: float
    """Lower bound of rate / fixed_rate at 95 %, by resampling blocks of steps."""
    off_policy: Estimate | None
    """The same quotient from the steps in which the log did what either would do, with the times
    that these took; ``None`` if there are too few."""
    distinct_ks: int
    """Number of K that it plays in at least one step in a hundred: 1 is a constant."""
    against: str = FIXED
    """What it is compared with, in words."""
    verified: float = 1.0
    """Share of its draft tokens that is verified,"""
    distinct_shares: int = 1
    """and number of shares that it plays in at least one in a hundred of the steps that draft."""

    @property
    def gain(self) -> float:
        return self.rate / self.fixed_rate - 1

    @property
    def passed(self) -> bool:
        """It is faster on the replayed steps, and what the log itself took does not speak against
        that."""
        is_refuted = self.off_policy is not None and self.off_policy.high < 1
        return self.low > 1 and not is_refuted

    def to_line(self) -> str:
        verdict, own = "passed" if self.passed else "failed", self.off_policy
        estimate = (
            "too few steps for an off-policy estimate"
            if own is None
            else f"off-policy {100 * (own.value - 1):+.2f} % ({100 * (own.low - 1):+.2f} to "
            f"{100 * (own.high - 1):+.2f})"
        )
        return (
            f"gate {verdict}: {100 * self.gain:+.2f} % over {self.against} on held-out steps, at "
            f"least {100 * (self.low - 1):+.2f} % (95 %); {estimate}; plays {self.distinct_ks} K"
            f"{self._size()}"
        )

    def _size(self) -> str:
        if self.verified == 1:
            return ""
        shares = "share" if self.distinct_shares == 1 else "shares"
        return (
            f" and {self.distinct_shares} {shares}, {100 * self.verified:.0f} % of the draft "
            f"tokens verified"
        )


def judge_network(
    network: Network, log: ReplayedLog, rows: Rows, budgets: BudgetScores | None = None
) -> PolicyGate:
    """Compare on the steps that were held out; the network plays all of them, so that its features
    are those of a server that never stopped.

    Args:
        rows: [S] steps on which the network was fitted, and on which the best fixed K is chosen.
        budgets: for a network with a size, which is left out without them.
    """
    held_out = log.rows(~rows)
    fixed = PairPlay.of(held_out, best_ks(held_out, log.rows(rows)))
    return compare(held_out, played(network, log, budgets).rows(~rows), fixed)


def chosen_ks(network: Network, log: ReplayedLog) -> Ks:
    """[S] K that the network plays in all steps of a log, one after the other, where everything is
    verified."""
    return played(network, log).ks


def compare_ks(held_out: ReplayedLog, ks: Ks, others: Ks, against: str = FIXED) -> PolicyGate:
    """Compare decisions on the steps that were held out.

    Args:
        ks: [S] of the policy that is judged.
        others: [S] of what it is compared with, which ``against`` names.
    """
    ours, theirs = (PairPlay.of(held_out, one) for one in (ks, others))
    return compare(held_out, ours, theirs, against)


def compare(
    held_out: ReplayedLog, ours: PairPlay, theirs: PairPlay, against: str = FIXED
) -> PolicyGate:
    """Compare what two policies did on the steps that were held out.

    Args:
        against: names the second one.
    """
    counts, shares = np.bincount(ours.ks), np.bincount(ours.shares[ours.ks > 0], minlength=1)
    return PolicyGate(
        rate=speed_of(held_out, ours.tokens, ours.seconds),
        fixed_rate=speed_of(held_out, theirs.tokens, theirs.seconds),
        low=lower_bound(held_out, ours, theirs),
        off_policy=off_policy_gain_of(held_out, ours, theirs),
        distinct_ks=int((counts >= 0.01 * len(ours.ks)).sum()),
        against=against,
        verified=ours.verified,
        distinct_shares=max(int((shares >= 0.01 * max(shares.sum(), 1)).sum()), 1),
    )


def lower_bound(log: ReplayedLog, ours: PairPlay, theirs: PairPlay) -> float:
    """2.5th percentile of the quotient of both speeds over resampled blocks of steps, each load at
    its share of the tokens."""
    rng = np.random.default_rng(0)
    work = np.array([step.tokens for step in log.steps])
    times = np.zeros((2, _RESAMPLES))
    for size in np.unique(log.sizes):
        rows = log.sizes == size
        num = int(rows.sum())
        starts = np.arange(0, num, block_steps(num))
        drawn = rng.integers(0, len(starts), (_RESAMPLES, len(starts)))
        for which, one in enumerate((ours, theirs)):
            pair: Floats = np.stack((one.tokens[rows], one.seconds[rows]))
            sums = np.add.reduceat(pair, starts, axis=1)[:, drawn].sum(axis=2)
            times[which] += work[rows].sum() * sums[1] / sums[0]
    return float(np.percentile(times[1] / times[0], 2.5))


def split(log: ReplayedLog, held_out: float, stretch: int = 64) -> Rows:
    """[S] which steps are fitted on: stretches of consecutive ones; others, spread over the log,
    are held out.

    Raises:
        ValueError: the log is too short for both.
    """
    every = max(round(1 / held_out), 2)
    numbers = np.arange(len(log.steps)) // stretch
    rows: Rows = numbers % every != every - 1
    if rows.all():
        raise ValueError(
            f"{len(log.steps)} steps are too few to fit on some and judge on others; at least "
            f"{every * stretch} are needed"
        )
    return rows
