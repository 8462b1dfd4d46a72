"""One policy for ordinary requests, and one for each arm of a comparison.

An arm is a set of drafters together with the versions of those that learn. What is known of one
arm misleads in another: acceptance is counted by the length of the match that the arm's own
drafters found, a pause of one arm would silence the next one, and other weights accept otherwise.
So every arm has a policy of its own, as if it had a server of its own. It is built when the arm is
first asked for; a server that nobody asks holds the ordinary policy only.

What steps take does not depend on weights, and turns of a comparison are short. A server with a
newer version would know from before the swap what its steps take, and so does its arm: it starts
from the times of the arm with the same drafters that was asked for last. Those of the ordinary
policy do not serve: it may have decoded beside a trainer, which a comparison does without.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from policies.interface import CostSample, DraftPolicy, LearnsTimes, TakesPublished

MAX_ARMS = 16
"""Arms that are remembered; beyond it the one that was not asked for longest is forgotten."""


class ArmPolicies:
    """The policies of one server. Used by the engine's thread, except ``figures``."""

    def __init__(
        self, ordinary: DraftPolicy, make: Callable[[frozenset[str]], DraftPolicy]
    ) -> None:
        """
        Args:
            ordinary: decides for requests that do not choose their drafters.
            make: kinds of drafters -> a new policy that decides among them.
        """
        self.ordinary = ordinary
        self._make = make
        self._samples: Sequence[CostSample] = ()
        self._in_force: dict[str, tuple[int, dict[str, Any]]] = {}
        """Version and calibration of the weights in force, by kind."""
        self._arms: dict[tuple[frozenset[str], tuple[int, ...]], DraftPolicy] = {}
        """The arm that was asked for last comes last."""

    @property
    def wants_profile(self) -> bool:
        """Whether step times should be measured at start-up."""
        return self.ordinary.wants_profile

    def calibrate(self, samples: Sequence[CostSample]) -> None:
        """Take in step times measured at start-up, for all policies."""
        self._samples = samples
        self.ordinary.calibrate(samples)

    def on_swap(self, drafter: str, version: int, calibration: dict[str, Any]) -> None:
        """Tell the ordinary policy, and decide by the new version's arms from now on.

        Args: as ``DraftPolicy.on_swap`` has them.
        """
        self._in_force[drafter] = version, calibration
        self.ordinary.on_swap(drafter, version, calibration)

    def refused(self, drafter: str) -> str | None:
        """As the ordinary policy says, if networks are published for it."""
        policy = self.ordinary
        return policy.refused(drafter) if isinstance(policy, TakesPublished) else None

    def of(self, drafters: frozenset[str]) -> DraftPolicy:
        """The policy of the arm with these kinds of drafters and the versions in force."""
        key = drafters, tuple(version for version, _ in self._in_force.values()) or (0,)
        policy = self._arms.pop(key, None) or self._new(drafters)
        self._arms[key] = policy
        if len(self._arms) > MAX_ARMS:
            del self._arms[next(iter(self._arms))]
        return policy

    def figures(self) -> dict[str, Any]:
        """The ordinary policy's, and under ``arms`` those of every arm. Called by any thread."""
        arms = {
            f"{'+'.join(sorted(kinds)) or 'none'} at version {'+'.join(map(str, versions))}": (
                policy.figures()
            )
            for (kinds, versions), policy in list(self._arms.items())
        }
        return self.ordinary.figures() | ({"arms": arms} if arms else {})

    def _new(self, drafters: frozenset[str]) -> DraftPolicy:
        policy = self._make(drafters)
        policy.calibrate(self._samples)
        alike = [known for (kinds, _), known in self._arms.items() if kinds == drafters]
        if alike and isinstance(policy, LearnsTimes):
            policy.start_from(alike[-1])
        for kind, (version, calibration) in self._in_force.items():
            if kind in drafters:
                policy.on_swap(kind, version, calibration)
        return policy
