"""A replayed log as a reinforcement-learning environment, by Gymnasium's API.

An episode is a stretch of consecutive steps. The state is ``policies.features.Features`` before a
step, the action is K, and the reward is what the step brings: by default tokens per second relative
to plain decoding at this load, as in Learning to Draft (arXiv:2603.01639, section 3). The mean of
such quotients is not the quotient of means that an operator sees; ``reward="advantage"`` is tokens
less the time's worth at a given speed, whose sum is right.

With ``policies.budgets`` a step has two decisions, and each environment leaves one of them to a
frozen partner: here K is the action and the partner chooses the share that is verified; in
``SizeEnvironment`` the share is the action, and the partner chooses K.

Gymnasium itself is not needed: spaces here have the members that algorithms use. Where it is
installed (extra ``rl``), ``trainer.gymnasium_env`` makes a real ``gymnasium.Env`` of it.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from policies.budgets import BudgetScores, SavedTimes, cut_rows, size_inputs
from policies.features import NUM_FEATURES, Features
from policies.network import SIZE_NAMES
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
SIZE_OBSERVATIONS = Box(0.0, 16.0, (len(SIZE_NAMES),))

ChooseShare = Callable[[list[float]], int]
"""Inputs of a size -> number of the share."""
ChooseK = Callable[[list[float]], int]
"""Features -> K."""


class ReplayEnvironment:
    """Plays stretches of a log."""

    observation_space: Box = OBSERVATIONS

    def __init__(
        self,
        log: ReplayedLog,
        episode_steps: int = 256,
        warm_steps: int = 32,
        reward: RewardKind = "rate",
        speeds: Sequence[float] | None = None,
        seed: int = 0,
        budgets: BudgetScores | None = None,
        share: ChooseShare | None = None,
    ) -> None:
        """
        Args:
            episode_steps: steps of an episode, fewer at the end of the log.
            warm_steps: logged steps before an episode from which its first features come.
            speeds: by size of batch, tokens per second that ``advantage`` is measured against;
                ``None``: plain decoding's.
            budgets: what every share would have brought; ``None``: everything is verified.
            share: chooses one; ``None``: the last, everything.

        Raises:
            ValueError: the log has no steps.
        """
        if not log.steps:
            raise ValueError("a log without steps cannot be replayed")
        self.action_space = Discrete(log.max_draft + 1)
        self._log, self._budgets, self._choose_share = log, budgets, share
        self._episode_steps, self._warm_steps = episode_steps, warm_steps
        whole = log.tokens[..., None], log.seconds[..., None]
        self._tokens, self._seconds = (
            whole if budgets is None else (budgets.tokens, budgets.seconds)
        )
        self._rewards = _rewards(log, self._tokens, self._seconds, reward, speeds)
        self._shares = log.seconds / log.seconds[:, :1]
        self._saved = SavedTimes(log.table)
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
            self._take_in(at, self._log.steps[at].draft_k, self._whole)
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
        k = int(action)
        return self._played(k, self._share_of(k))

    def _share_of(self, k: int) -> int:
        """The partner's choice."""
        if self._choose_share is None or not k:
            return self._whole
        return self._choose_share(self._size_inputs(k))

    def _size_inputs(self, k: int) -> list[float]:
        """Inputs of a size in the step to come."""
        batch = self._log.steps[self._at].batch
        most = max(self._log.max_draft, 1)
        return size_inputs(self._vector(), batch, k, most, self._saved)

    @property
    def _whole(self) -> int:
        """The share that cuts nothing."""
        return int(self._tokens.shape[2]) - 1

    def _played(self, k: int, share: int) -> tuple[Observation, float, bool, bool, dict[str, Any]]:
        at = self._at
        self._take_in(at, k, share)
        self._at += 1
        # What is not known of a share was scored as everything.
        guessed = self._log.extrapolated if self._budgets is None else self._budgets.extrapolated
        info = {
            "tokens": float(self._tokens[at, k, share]),
            "seconds": float(self._seconds[at, k, share]),
            "extrapolated": float(guessed.reshape(self._tokens.shape)[at, k, share]),
        }
        is_over = self._at >= self._end
        return self._observation(), float(self._rewards[at, k, share]), False, is_over, info

    def close(self) -> None:
        """Do nothing."""

    def _take_in(self, at: int, k: int, share: int) -> None:
        verified, accepted = self._log.outcome(at, k, self._rng)
        if share < self._whole:
            cut = cut_rows(self._log, at, k, share, self._whole + 1)
            if cut is not None:
                verified, accepted = cut, list(map(min, accepted, cut))
        self._features.observe(k, verified, accepted)

    def _vector(self) -> list[float]:
        """Features of the step to come."""
        at = min(self._at, len(self._log.steps) - 1)
        step, shares = self._log.steps[at], self._shares[at].tolist()
        return self._features.vector(step.batch, shares, step.groups, step.context)

    def _observation(self) -> Observation:
        return _clipped(self._vector())


class SizeEnvironment(ReplayEnvironment):
    """Plays stretches of a log, the share of the draft tokens that is verified as the action."""

    observation_space = SIZE_OBSERVATIONS

    def __init__(
        self,
        log: ReplayedLog,
        budgets: BudgetScores,
        draft_k: ChooseK,
        episode_steps: int = 256,
        warm_steps: int = 32,
        seed: int = 0,
    ) -> None:
        """
        Args:
            draft_k: chooses K of every step.

        Raises:
            ValueError: the log has no steps.
        """
        super().__init__(log, episode_steps, warm_steps, seed=seed, budgets=budgets)
        self.action_space = Discrete(budgets.num_shares)
        self._choose_k, self._k = draft_k, 0

    def step(self, action: int) -> tuple[Observation, float, bool, bool, dict[str, Any]]:
        """Decode a step with this share of the drafts that the partner has chosen.

        Raises:
            ValueError: there is no such share.
        """
        if not self.action_space.contains(action):
            raise ValueError(f"the share must be in 0..{self._whole}, got {action!r}")
        return self._played(self._k, int(action))

    def _observation(self) -> Observation:
        vector = self._vector()
        self._k = self._choose_k(vector)
        batch = self._log.steps[min(self._at, len(self._log.steps) - 1)].batch
        most = max(self._log.max_draft, 1)
        return _clipped(size_inputs(vector, batch, self._k, most, self._saved))


def _clipped(vector: list[float]) -> Observation:
    return np.clip(np.array(vector, np.float32), OBSERVATIONS.low, OBSERVATIONS.high)


def _rewards(
    log: ReplayedLog,
    tokens: NDArray[np.float64],
    seconds: NDArray[np.float64],
    kind: RewardKind,
    speeds: Sequence[float] | None,
) -> NDArray[np.float64]:
    """[S, K + 1, J]."""
    plain = log.plain_rate[:, None, None]
    if kind == "rate":
        rates: NDArray[np.float64] = tokens / seconds / plain
        return rates
    by_step = plain if speeds is None else np.array(speeds)[log.sizes][:, None, None]
    batches = np.array([step.batch for step in log.steps])[:, None, None]
    advantages: NDArray[np.float64] = (tokens - by_step * seconds) / batches
    return advantages
