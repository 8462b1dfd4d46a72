"""The replay environment as a ``gymnasium.Env``, for algorithms from elsewhere (extra ``rl``)."""

from __future__ import annotations

from typing import Any

import gymnasium
import numpy as np

from policies.replay_environment import ReplayEnvironment


class ReplayGym(gymnasium.Env[Any, Any]):
    """Passes everything on to a ``ReplayEnvironment``."""

    def __init__(self, inner: ReplayEnvironment) -> None:
        self._inner = inner
        self.metadata = {"render_modes": []}
        own = inner.observation_space
        self.observation_space = gymnasium.spaces.Box(own.low, own.high, own.shape, np.float32)
        self.action_space = gymnasium.spaces.Discrete(inner.action_space.n)

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Any, dict[str, Any]]:
        super().reset(seed=seed)
        return self._inner.reset(seed=seed, options=options)

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        return self._inner.step(int(action))
