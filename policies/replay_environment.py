"""A replayed log as a reinforcement-learning environment, by Gymnasium's API.

An episode is a stretch of consecutive steps. The state is ``policies.features.Features`` before a
step, the action is K, and the reward is what the step brings: by default tokens per second relative
to plain decoding at this load, as in Learning to Draft (arXiv:2603.01639, section 3). The mean of
such quotients is not the quotient of means that an operator sees; ``reward="advantage"`` is tokens
less the time's worth at a given speed, whose sum is right.

Gymnasium itself is not needed: spaces here have the members that algorithms use. Where it is
installed (extra ``rl``), ``trainer.gymnasium_env`` makes a real ``gymnasium.Env`` of it.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from policies.features import NUM_FEATURES, Features
from policies.replayed_log import ReplayedLog

Observation = NDArray[np.float32]
RewardKind = Literal["rate", "advantage"]


@dataclass(frozen=True, slots=True)
class Discrete:
    """Actions 0, 1, ... n - 1."""

    n: int

    def contains(self, action: Any) -> bool:
        return isinstance(action, int | np.integer) and bool(0 <= action < self.n)


@dataclass(frozen=True, slots=True)
class Box:
    """Vectors between two bounds."""

    low: float
    high: float
    shape: tuple[int, ...]

    def contains(self, vector: Any) -> bool:
        if np.shape(vector) != self.shape:
            return False
        return bool(np.min(vector) >= self.low) and bool(np.max(vector) <= self.high)


OBSERVATIONS = Box(0.0, 16.0, (NUM_FEATURES,))


class ReplayEnvironment:
    """Plays stretches of a log."""

    observation_space = OBSERVATIONS

    def __init__(
        self,
        log: ReplayedLog,
        episode_steps: int = 256,
        warm_steps: int = 32,
        reward: RewardKind = "rate",
        speeds: Sequence[float] | None = None,
        seed: int = 0,
    ) -> None:
        """
        Args:
            episode_steps: steps of an episode, fewer at the end of the log.
            warm_steps: logged steps before an episode from which its first features come.
            speeds: by size of batch, tokens per second that ``advantage`` is measured against;
                ``None``: plain decoding's.

        Raises:
            ValueError: the log has no steps.
        """
        if not log.steps:
            raise ValueError("a log without steps cannot be replayed")
        self.action_space = Discrete(log.max_draft + 1)
        self._log = log
        self._episode_steps, self._warm_steps = episode_steps, warm_steps
        self._rewards = _rewards(log, reward, speeds)
        self._shares = log.seconds / log.seconds[:, :1]
        self._rng = random.Random(seed)
        self._features = Features(max(log.max_draft, 1))
        self._at = self._end = 0

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Observation, dict[str, Any]]:
        """Begin an episode at a random step.

        Args:
            options: ``{"start": step}`` begins at that one.
        """
        if seed is not None:
            self._rng.seed(seed)
        num_steps = len(self._log.steps)
        latest = max(num_steps - self._episode_steps, 0)
        start = (options or {}).get("start")
        self._at = self._rng.randint(0, latest) if start is None else int(start)
        self._end = min(self._at + self._episode_steps, num_steps)
        self._features.forget()
        for at in range(max(0, self._at - self._warm_steps), self._at):
            self._take_in(at, self._log.steps[at].draft_k)
        return self._observation(), {"step": self._at}

    def step(self, action: int) -> tuple[Observation, float, bool, bool, dict[str, Any]]:
        """Decode a step with K = ``action``.

        Returns:
            The next state, the reward, whether the log has ended (it never does for the sake of the
            task), whether the episode has, and the step's tokens, seconds and extrapolated tokens.

        Raises:
            ValueError: there is no such K.
        """
        if not self.action_space.contains(action):
            raise ValueError(f"K must be in 0..{self._log.max_draft}, got {action!r}")
        at, k = self._at, int(action)
        self._take_in(at, k)
        self._at += 1
        info = {
            "tokens": float(self._log.tokens[at, k]),
            "seconds": float(self._log.seconds[at, k]),
            "extrapolated": float(self._log.extrapolated[at, k]),
        }
        is_over = self._at >= self._end
        return self._observation(), float(self._rewards[at, k]), False, is_over, info

    def close(self) -> None:
        """Do nothing."""

    def _take_in(self, at: int, k: int) -> None:
        verified, accepted = self._log.outcome(at, k, self._rng)
        self._features.observe(k, verified, accepted)

    def _observation(self) -> Observation:
        at = min(self._at, len(self._log.steps) - 1)
        step, shares = self._log.steps[at], self._shares[at].tolist()
        vector = self._features.vector(step.batch, shares, step.groups, step.context)
        return np.clip(np.array(vector, np.float32), OBSERVATIONS.low, OBSERVATIONS.high)


def _rewards(
    log: ReplayedLog, kind: RewardKind, speeds: Sequence[float] | None
) -> NDArray[np.float64]:
    """[S, K + 1]."""
    plain = log.plain_rate[:, None]
    if kind == "rate":
        rates: NDArray[np.float64] = log.tokens / log.seconds / plain
        return rates
    by_step = plain if speeds is None else np.array(speeds)[log.sizes][:, None]
    batches = np.array([step.batch for step in log.steps])[:, None]
    advantages: NDArray[np.float64] = (log.tokens - by_step * log.seconds) / batches
    return advantages
