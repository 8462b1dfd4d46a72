"""Proximal policy optimisation of the networks of ``ltd``, in one replay environment.

Shapes: N steps of a rollout, F inputs.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from policies.network import Network
from policies.replay_environment import ReplayEnvironment
from policies.replayed_log import ReplayedLog
from trainer.adam import Adam
from trainer.ltd_networks import Standard, actor_of, features_of, network_of, standard_of

Rows = NDArray[np.bool_]


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

    def times(self, effort: float) -> Self:
        """A shorter fit, which finds less.

        Args:
            effort: share of the steps, in (0, 1].
        """
        return replace(self, total_steps=round(self.total_steps * effort))


def fit_ppo(log: ReplayedLog, rows: Rows, how: Ppo) -> Network:
    """Learn K by trying, in one environment, where everything is verified.

    Args:
        rows: [S] steps to try on; a stretch of them follows the one before as if they were one log.
    """
    log = log.rows(rows)
    torch.manual_seed(how.seed)
    ks = np.minimum([step.draft_k for step in log.steps], log.max_draft)
    standard = standard_of(features_of(log, lambda at, _: int(ks[at]), how.seed))
    actor = actor_of(how.hidden, log.max_draft + 1)
    improve(actor, ReplayEnvironment(log, seed=how.seed), standard, how)
    return network_of(actor, *standard)


def improve(
    actor: nn.Sequential, environment: ReplayEnvironment, standard: Standard, how: Ppo
) -> None:
    """Fit an actor to the actions of an environment, with a critic of its own.

    Args:
        standard: of the observations.
    """
    numbers = torch.Generator().manual_seed(how.seed)
    critic = actor_of(how.hidden, 1, len(standard[0]))
    parameters = [*actor.parameters(), *critic.parameters()]
    optimizer = Adam(parameters)
    num_updates = max(how.total_steps // how.rollout, 1)
    observation = torch.from_numpy(environment.reset(seed=how.seed)[0])
    for update in range(num_updates):
        lr = how.lr * (1 - update / num_updates)
        tried = _Tried.by(actor, critic, environment, observation, standard, how, numbers)
        observation = tried.next_observation
        for _ in range(how.epochs):
            order = torch.randperm(how.rollout, generator=numbers)
            for drawn in torch.split(order, how.minibatch):
                loss = _ppo_loss(actor, critic, tried, drawn, how)
                loss.backward()  # type: ignore[no-untyped-call]
                nn.utils.clip_grad_norm_(parameters, how.grad_norm)
                optimizer.step(lr)


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
        standard: Standard,
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
    deltas = rewards + how.gamma * torch.where(ends, values[:-1], values[1:]) - values[:-1]
    found, following = [], 0.0
    for delta, is_end in zip(reversed(deltas.tolist()), reversed(ends.tolist()), strict=True):
        following = delta + how.gamma * how.gae_lambda * (0.0 if is_end else following)
        found.append(following)
    return torch.tensor(found[::-1])


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
