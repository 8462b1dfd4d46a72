"""A simulated server whose requests differ, and what its policy is told of that."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np

from configs.schema import PolicySettings
from policies.catalog import build_policy
from policies.groups import group_of
from tests.policies.simulated import NEURAL, Noise, Simulation, World, arms, fixed_speed

EASY, HARD = 1.6, -2.2
WORLD = World(
    eagle=(0.7,) * 8, difficulties=(EASY, HARD), has_index=False, request_tokens=60,
    noise=Noise(0.05, 0.002, 0.02),
)  # fmt: skip
GREEDY, WARM = group_of(0, 0.0), group_of(0, 1.0)
TEMPERATURES = {EASY: GREEDY, HARD: WARM}
TENANTS = {EASY: group_of(1, 0.7), HARD: group_of(2, 0.7)}


class Reads:
    """Passes everything on to a policy, in a server whose steps take longer where texts are long.
    Requests of one difficulty have texts of one length."""

    def __init__(self, policy, texts, token_s, *, tells):
        self._policy, self._texts, self._token_s, self._tells = policy, texts, token_s, tells
        self.server: Any = None
        self.seconds = 0.0

    def __getattr__(self, name):
        return getattr(self._policy, name)

    @property
    def _lengths(self):
        return [self._texts[hard] for hard in self.server._difficulty]

    @property
    def _context(self):
        return int(np.mean(self._lengths)) if self._tells else None

    def plan(self, obs):
        return self._policy.plan(replace(obs, context=self._context))

    def observe(self, outcome):
        read_s = self._token_s * sum(self._lengths)
        self.seconds += read_s
        self._policy.observe(
            replace(outcome, step_s=outcome.step_s + read_s, context=self._context)
        )


def made(world, seed=0):
    policy = build_policy(PolicySettings(), {"eagle3": NEURAL}, seed, 8, {})
    policy.calibrate(world.profile())
    return policy


def lead(world, seed, steps=800):
    """Speed over that of the best single K on the same requests."""
    server = Simulation(made(world, seed), seed)
    server.run(world, 200)
    totals = server.run(world, steps)
    fixed = [fixed_speed(world, *arm, tokens=totals.by_difficulty) for arm in arms(world)]
    return totals.speed / max(fixed)


def lead_of_reader(seed, batch, *, tells, steps=800, read_s=0.03):
    """Likewise where one request in two has a long text, and the target reads it at every step.

    Args:
        read_s: seconds that this takes for each; a plain step without takes 0.01.
    """
    world = replace(WORLD, batch=batch, difficulties=(0.0, 1e-6))
    texts, token_s = {0.0: 200, 1e-6: 64000}, read_s / 64000
    policy = Reads(made(world, seed), texts, token_s, tells=tells)
    policy.server = server = Simulation(policy, seed)
    server.run(world, 200)
    policy.seconds = 0.0
    totals = server.run(world, steps)

    def seconds(k):
        rounds = {d: n / world.expected("eagle3", 0, d, k) for d, n in totals.by_difficulty.items()}
        read_s = token_s * sum(n * texts[d] for d, n in rounds.items())
        return sum(rounds.values()) / batch * world.seconds("eagle3", k)[0] + read_s

    return min(map(seconds, range(1, 9))) / (totals.seconds + policy.seconds)
