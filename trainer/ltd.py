"""Fits the network of the policy ``ltd`` on a replayed log.

Two ways. **PPO** in the replay environment, as the paper does it: an actor and a critic, rewards of
the actions that were tried. **Full information**: a log says what *every* K would have brought in
every step, so nothing needs to be tried. What one step would have brought is mostly chance, though:
a network that is fitted to the gains themselves learns these by heart. So a first one learns how
likely each position is to be kept, given the features, from all positions that were verified; and
the policy maximises the gain that this one expects, sum over K of probability times advantage. The
features depend on which K ran before, so after a first fit on the logged ones both are repeated on
those that the fitted policies see, all of them together (Ross, Gordon and Bagnell 2011,
arXiv:1011.0686): a policy that is fitted to the features of the one before it alone is lost among
those that it makes itself.

Shapes: S steps, F features, A actions (K = 0 to A - 1), H hidden units.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from policies.evaluation import best_ks, off_policy_gain, rate_of
from policies.features import NUM_FEATURES, Features
from policies.logged import LoggedRow
from policies.network import Network
from policies.off_policy import Estimate, block_steps
from policies.replay_environment import ReplayEnvironment
from policies.replayed_log import ReplayedLog

Ks = NDArray[np.int64]
Rows = NDArray[np.bool_]

_RESAMPLES = 1000
_LEAST_DEVIATION = 1e-3
"""Of a feature. One that never varied says nothing: in service it may, as the step times of a
single load do, and would drown the others if it were divided by next to nothing."""


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


@dataclass(frozen=True, slots=True)
class Ppo:
    """How to fit by proximal policy optimisation (Schulman et al. 2017, arXiv:1707.06347)."""

    hidden: int = 32
    total_steps: int = 40_000
    rollout: int = 2048
    minibatch: int = 256
    epochs: int = 10
    lr: float = 1e-3
    """Falls to 0."""
    gamma: float = 0.9
    gae_lambda: float = 0.95
    clip: float = 0.2
    entropy: float = 0.01
    value: float = 0.5
    grad_norm: float = 0.5
    seed: int = 0


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
    actor, held = _actor(how.hidden, log.max_draft + 1), torch.from_numpy(rows)
    steps = _Steps.of(log.rows(rows))
    network = _fitted(actor, [one[held] for one in features], steps, how)
    for number in range(1, how.rounds):
        features.append(features_of(log, partial(_best, network), how.seed + number))
        network = _fitted(actor, [one[held] for one in features], steps, how)
    return network


class _Steps(NamedTuple):
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
        reached, kept = torch.zeros(2, len(log.steps), log.max_draft)
        for at, step in enumerate(log.steps):
            for row in step.rows:
                reached[at, : min(row.num_accepted + 1, row.num_verified)] += 1
                kept[at, : row.num_accepted] += 1
                if row.replayed and row.num_accepted == row.num_verified:
                    reached[at] += _chances(row, log.max_draft, before=True)
                    kept[at] += _chances(row, log.max_draft, before=False)
        seconds = torch.from_numpy(log.seconds).float() / batches
        return cls(torch.from_numpy(log.sizes), seconds, reached, kept)

    def times(self, num: int) -> Self:
        return type(self)(*(one.repeat(num, *[1] * (one.dim() - 1)) for one in self))


def _chances(row: LoggedRow, most: int, *, before: bool) -> Tensor:
    """[most] probability that a draft that was kept whole, had it been longer, would have reached
    each further position, or kept it, as far as it was replayed."""
    start, stop = min(row.num_verified, most), min(len(row.replayed), most)
    kept = torch.tensor(row.replayed[start:stop]).cumprod(0)
    found = torch.zeros(most)
    found[start:stop] = torch.cat((torch.ones(1), kept))[:-1] if before else kept
    return found


def _fitted(
    actor: nn.Sequential, features: Sequence[Tensor], steps: _Steps, how: FullInformation
) -> Network:
    """Fit to the features of the same steps under several policies."""
    every = torch.cat(list(features))
    shift, scale = _standard(every)
    x, steps = (every - shift) * scale, steps.times(len(features))
    _ascend(actor, x, steps, _expected_tokens(x, steps, how), how)
    return _network(actor, shift, scale)


def _expected_tokens(x: Tensor, steps: _Steps, how: FullInformation) -> Tensor:
    """[S, A] tokens of a request that the features of each step let expect at every K: by a network
    of hazards, fitted to these steps, that is told of every position that was verified.

    Args:
        x: [S, F] standardised features.
    """
    hazards = _actor(how.hidden, steps.kept.shape[1])
    optimizer = torch.optim.AdamW(hazards.parameters(), how.lr, weight_decay=how.decay)
    for number in range(how.passes):
        for group in optimizer.param_groups:
            group["lr"] = how.lr * (1 - number / how.passes)
        for drawn in torch.split(torch.randperm(len(x)), how.minibatch):
            odds, num = hazards(x[drawn]), steps.reached[drawn]
            losses = num * nn.functional.softplus(odds) - steps.kept[drawn] * odds
            loss = losses.sum() / num.sum().clamp_min(1)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    with torch.no_grad():
        survivals = torch.sigmoid(hazards(x)).cumprod(1)
    return 1 + nn.functional.pad(survivals.cumsum(1), (1, 0))


def _ascend(
    actor: nn.Sequential, x: Tensor, steps: _Steps, tokens: Tensor, how: FullInformation
) -> None:
    """Maximise the expected gain.

    Args:
        tokens: [S, A] expected of a request.
    """
    optimizer = torch.optim.Adam(actor.parameters(), how.lr)
    sizes, seconds = steps.sizes, steps.seconds
    num_sizes = int(sizes.max()) + 1
    for epoch in range(how.epochs):
        law = torch.softmax(actor(x), dim=1)
        with torch.no_grad():
            speeds = _speeds((law * tokens).sum(1), (law * seconds).sum(1), sizes, num_sizes)
        gain = tokens - speeds[sizes][:, None] * seconds
        left = 1 - epoch / how.epochs
        entropy = -(law * law.clamp_min(1e-9).log()).sum(1).mean()
        loss = -((law * gain).sum(1).mean() + how.entropy * left * entropy)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        for group in optimizer.param_groups:
            group["lr"] = how.lr * left
        optimizer.step()


def _speeds(tokens: Tensor, seconds: Tensor, sizes: Tensor, num_sizes: int) -> Tensor:
    """[num_sizes] tokens over seconds by size of batch; 0 where there is none."""
    sums = torch.zeros(2, num_sizes).index_add(1, sizes, torch.stack((tokens, seconds)))
    return sums[0] / sums[1].clamp_min(1e-12)


def fit_ppo(log: ReplayedLog, rows: Rows, how: Ppo) -> Network:
    """Learn by trying, in one environment.

    Args:
        rows: [S] steps to try on; a stretch of them follows the one before as if they were one log.
    """
    log = log.rows(rows)
    torch.manual_seed(how.seed)
    numbers = torch.Generator().manual_seed(how.seed)
    environment = ReplayEnvironment(log, seed=how.seed)
    ks = np.minimum([step.draft_k for step in log.steps], log.max_draft)
    shift, scale = _standard(features_of(log, lambda at, _: int(ks[at]), how.seed))
    actor, critic = _actor(how.hidden, log.max_draft + 1), _actor(how.hidden, 1)
    parameters = [*actor.parameters(), *critic.parameters()]
    optimizer = torch.optim.Adam(parameters, how.lr)
    num_updates = max(how.total_steps // how.rollout, 1)
    observation = torch.from_numpy(environment.reset(seed=how.seed)[0])
    for update in range(num_updates):
        for group in optimizer.param_groups:
            group["lr"] = how.lr * (1 - update / num_updates)
        tried = _Tried.by(actor, critic, environment, observation, (shift, scale), how, numbers)
        observation = tried.next_observation
        for _ in range(how.epochs):
            order = torch.randperm(how.rollout, generator=numbers)
            for drawn in torch.split(order, how.minibatch):
                loss = _ppo_loss(actor, critic, tried, drawn, how)
                optimizer.zero_grad()
                loss.backward()  # type: ignore[no-untyped-call]
                nn.utils.clip_grad_norm_(parameters, how.grad_norm)
                optimizer.step()
    return _network(actor, shift, scale)


@dataclass(frozen=True, slots=True)
class _Tried:
    """One rollout of N steps."""

    x: Tensor
    """[N, F] standardised features."""
    actions: Tensor
    log_probs: Tensor
    """[N] of the actions, when they were taken."""
    advantages: Tensor
    """[N] standardised."""
    returns: Tensor
    next_observation: Tensor

    @classmethod
    def by(
        cls,
        actor: nn.Sequential,
        critic: nn.Sequential,
        environment: ReplayEnvironment,
        observation: Tensor,
        standard: tuple[Tensor, Tensor],
        how: Ppo,
        numbers: torch.Generator,
    ) -> _Tried:
        shift, scale = standard
        xs, actions, rewards, ends = [], [], [], []
        with torch.no_grad():
            for _ in range(how.rollout):
                x = (observation - shift) * scale
                law = torch.softmax(actor(x), dim=0)
                action = int(torch.multinomial(law, 1, generator=numbers))
                following, reward, _, is_over, _ = environment.step(action)
                xs.append(x)
                actions.append(action)
                rewards.append(reward)
                ends.append(is_over)
                observation = torch.from_numpy(environment.reset()[0] if is_over else following)
            stacked = torch.stack(xs)
            values = critic(torch.cat((stacked, ((observation - shift) * scale)[None])))[:, 0]
            chosen = torch.tensor(actions)
            log_probs = torch.log_softmax(actor(stacked), dim=1).gather(1, chosen[:, None])[:, 0]
        advantages = _advantages(torch.tensor(rewards), torch.tensor(ends), values, how)
        standardised = (advantages - advantages.mean()) / (advantages.std() + 1e-8)
        returns = advantages + values[:-1]
        return cls(stacked, chosen, log_probs, standardised, returns, observation)


def _advantages(rewards: Tensor, ends: Tensor, values: Tensor, how: Ppo) -> Tensor:
    """[N] generalised advantage estimates (Schulman et al. 2016, arXiv:1506.02438). An episode is
    cut, not over: what comes after it is estimated by the value of the step itself."""
    found, following = torch.zeros_like(rewards), 0.0
    for t in reversed(range(len(rewards))):
        next_value = values[t] if ends[t] else values[t + 1]
        delta = float(rewards[t] + how.gamma * next_value - values[t])
        following = delta + how.gamma * how.gae_lambda * (0.0 if ends[t] else following)
        found[t] = following
    return found


def _ppo_loss(
    actor: nn.Sequential, critic: nn.Sequential, tried: _Tried, rows: Tensor, how: Ppo
) -> Tensor:
    logs = torch.log_softmax(actor(tried.x[rows]), dim=1)
    chosen = logs.gather(1, tried.actions[rows][:, None])[:, 0]
    ratio = (chosen - tried.log_probs[rows]).exp()
    advantages = tried.advantages[rows]
    clipped = ratio.clamp(1 - how.clip, 1 + how.clip)
    policy = -torch.minimum(ratio * advantages, clipped * advantages).mean()
    value = (critic(tried.x[rows])[:, 0] - tried.returns[rows]).square().mean()
    entropy = -(logs.exp() * logs).sum(1).mean()
    loss: Tensor = policy + how.value * value - how.entropy * entropy
    return loss


# ---- networks and features -----------------------------------------------------------------------


def features_of(
    log: ReplayedLog, choose: Callable[[int, list[float]], int], seed: int = 0
) -> Tensor:
    """[S, F] features before every step.

    Args:
        choose: (number of the step, its features) -> K.
    """
    rng, features = random.Random(seed), Features(max(log.max_draft, 1))
    shares = log.seconds / log.seconds[:, :1]
    rows = []
    for at, step in enumerate(log.steps):
        row = features.vector(step.batch, shares[at].tolist(), step.groups, step.context)
        rows.append(row)
        k = choose(at, row)
        features.observe(k, *log.outcome(at, k, rng))
    return torch.tensor(rows)


def _actor(hidden: int, num_outputs: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(NUM_FEATURES, hidden), nn.Tanh(), nn.Linear(hidden, num_outputs))


def _standard(features: Tensor) -> tuple[Tensor, Tensor]:
    spread = features.std(0)
    scale = torch.where(spread > _LEAST_DEVIATION, 1 / spread.clamp_min(_LEAST_DEVIATION), 0.0)
    return features.mean(0), scale


def _network(actor: nn.Sequential, shift: Tensor, scale: Tensor) -> Network:
    first, second = actor[0], actor[2]
    assert isinstance(first, nn.Linear) and isinstance(second, nn.Linear)
    tensors = (shift, scale, first.weight, first.bias, second.weight, second.bias)
    return Network(*(tensor.detach().float().numpy().copy() for tensor in tensors))


def _best(network: Network, _at: int, features: list[float]) -> int:
    scores = network.scores(features)
    return max(range(len(scores)), key=scores.__getitem__)


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
        )


def judge_network(network: Network, log: ReplayedLog, rows: Rows) -> PolicyGate:
    """Compare on the steps that were held out; the network plays all of them, so that its features
    are those of a server that never stopped.

    Args:
        rows: [S] steps on which the network was fitted, and on which the best fixed K is chosen.
    """
    held_out = log.rows(~rows)
    fixed = best_ks(held_out, log.rows(rows))
    return compare_ks(held_out, chosen_ks(network, log)[~rows], fixed)


def chosen_ks(network: Network, log: ReplayedLog) -> Ks:
    """[S] K that the network plays in all steps of a log, one after the other."""
    chosen: list[int] = []

    def choose(at: int, features: list[float]) -> int:
        chosen.append(_best(network, at, features))
        return chosen[-1]

    features_of(log, choose)
    return np.array(chosen)


def compare_ks(held_out: ReplayedLog, ks: Ks, others: Ks, against: str = FIXED) -> PolicyGate:
    """Compare decisions on the steps that were held out.

    Args:
        ks: [S] of the policy that is judged.
        others: [S] of what it is compared with, which ``against`` names.
    """
    counts = np.bincount(ks)
    return PolicyGate(
        rate=rate_of(held_out, ks),
        fixed_rate=rate_of(held_out, others),
        low=_lower_bound(held_out, ks, others),
        off_policy=off_policy_gain(held_out, ks, others),
        distinct_ks=int((counts >= 0.01 * len(ks)).sum()),
        against=against,
    )


def _lower_bound(log: ReplayedLog, ks: Ks, fixed: Ks) -> float:
    """2.5th percentile of the quotient of both speeds over resampled blocks of steps, each load at
    its share of the tokens."""
    at, rng = np.arange(len(ks)), np.random.default_rng(0)
    work = np.array([step.tokens for step in log.steps])
    times = np.zeros((2, _RESAMPLES))
    for size in np.unique(log.sizes):
        rows = log.sizes == size
        num = int(rows.sum())
        starts = np.arange(0, num, block_steps(num))
        drawn = rng.integers(0, len(starts), (_RESAMPLES, len(starts)))
        for which, chosen in enumerate((ks, fixed)):
            pair = np.stack((log.tokens[at, chosen][rows], log.seconds[at, chosen][rows]))
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
