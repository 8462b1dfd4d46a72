"""The live watch and the default policy together: trials of equal versions silence nobody."""

from __future__ import annotations

from statistics import fmean

from configs.schema import PolicySettings
from policies.catalog import build_policy
from policies.rollback import Action, SwapWatch
from tests.policies.simulated import (
    NEURAL,
    Noise,
    Simulation,
    World,
    best_fixed_speed,
    calibration,
    fixed_speed,
)

WORLD = World(
    batch=32,
    eagle=tuple(0.6 * 0.97**j for j in range(8)),
    difficulties=(-1.5, -0.7, 0.0, 0.7, 1.5),
    request_tokens=200,
    plain_s=0.00125,
    verify_per_token_s=1.5e-6,
    draft_s=0.00018,
    cold_s=0.025,
    noise=Noise(0.15, 0.02, 0.005),
    untimed_share=0.35,
    has_index=False,
)
"""A small target on a fast GPU that decodes 32 requests. All their rows take twenty plain steps."""
STEPS, VERSIONS = 500, 5


class Watched(Simulation):
    """A server whose watch exchanges weights; rows of weights that come back are computed again."""

    def __init__(self, policy, seed):
        super().__init__(policy, seed)
        self.watch, self.former, self.new, self.num_exchanges = SwapWatch(200, 0.15), 0, 0, 0

    def publish(self, version, world):
        """Swap, unless a trial is under way."""
        if self.watch.state not in ("trial", "confirming"):
            self.former, self.new = self.new, version
            self.swap(version, calibration(world))

    def _decode(self, world):
        decided = super()._decode(world)
        decision, rows, *_ = decided
        if decision.draft_k:
            proposed, kept = sum(rows.num_verified), sum(rows.num_accepted)
            action = self.watch.observe(self.version, proposed, kept, world.batch)
            if action not in (Action.KEEP_GOING, Action.ACCEPT):
                self.num_exchanges += 1
                goes_on = self.new if action is Action.RETURN_TO_NEW else self.former
                self.swap(goes_on, calibration(world))
                self.forget(world)
        return decided


def served(seed):
    """Speed relative to the best arm, while equal versions come every ``STEPS`` steps."""
    policy = build_policy(PolicySettings(), {"eagle3": NEURAL}, seed, max_draft=8)
    policy.calibrate(WORLD.profile())
    server = Watched(policy, seed)
    server.publish(1, WORLD)
    server.run(WORLD, STEPS)
    tokens = seconds = 0.0
    for version in range(2, VERSIONS + 2):
        server.publish(version, WORLD)
        part = server.run(WORLD, STEPS)
        tokens, seconds = tokens + part.tokens, seconds + part.seconds
    return tokens / seconds / best_fixed_speed(WORLD), server.num_exchanges


def test_equal_versions_are_tried_at_little_cost():
    assert best_fixed_speed(WORLD) > 1.2 * fixed_speed(WORLD, "none", 0)
    found = [served(seed) for seed in (2, 3)]
    assert fmean(speed for speed, _ in found) > 0.9
    assert fmean(num for _, num in found) <= 12
