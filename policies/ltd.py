"""Learning to Draft: K by a small network that was fitted to traces.

``trainer policy`` fits it on a replayed log (``policies.replay_environment``), by PPO as in the
paper, or from what every K would have brought in every step. The network comes from
``policy.ltd.weights``, or with the drafter's version: then both change in the same swap. With a
version without a network, or with one that is damaged or fitted to other features, it plays the K
that promises most tokens per second by the acceptance and the step times of late, so that there are
traces to fit one to.

Source: Zhang et al. 2026, arXiv:2603.01639. The paper learns depth and size of a tree for one
request from log probabilities of its tokens; here the draft is a chain, so there is one length, and
it is decided before anything is drafted, from figures of earlier steps, for batches of any size.
Step times are inputs instead of being learned by heart, so a policy fitted on one machine can move
to another.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Self

from configs.schema import PolicySettings
from policies.calibration import Calibration
from policies.features import Features
from policies.interface import Decision, Outcome, PolicyContext, StepObs
from policies.lengths import LengthPolicy, drafter_for, spread
from policies.network import FILE, MAX_BYTES, Network
from policies.published import Published, network_of_file

CALIBRATION_KEY = "ltd"
"""Of the network, in the calibration that comes with a version."""


class LtdPolicy(LengthPolicy):
    """Plays the K that the network scores highest."""

    kind = "ltd"

    def __init__(
        self,
        context: PolicyContext,
        drafter: str,
        network: Network | None,
        random_share: float,
        *,
        takes_published: bool = True,
    ) -> None:
        """
        Args:
            network: ``None``: none until one is published with a version.
            takes_published: have those that come with versions instead.
        """
        super().__init__(context, drafter)
        self._published = Published(
            CALIBRATION_KEY, FILE, Network.from_bytes, self.drafter, network, takes_published
        )
        self._random_share = random_share
        self._features = Features(max(context.max_draft, 1))
        self._groups: bytes | None = None
        self._context: int | None = None
        """See ``StepObs``: of the step that was observed or is planned."""

    @classmethod
    def from_settings(cls, settings: PolicySettings, context: PolicyContext) -> Self:
        """Read ``policy.drafter``, ``policy.random_share`` and ``policy.ltd``.

        Raises:
            SettingsError: ``policy.ltd.weights`` cannot be used.
        """
        network = cls.check(settings, drafter_for(settings.drafter, context))
        return cls(
            context, settings.drafter, network, settings.random_share,
            takes_published=settings.ltd.weights is None,
        )  # fmt: skip

    @classmethod
    def check(cls, settings: PolicySettings, drafter: str | None = None) -> Network | None:
        """The network that ``policy.ltd.weights`` names; ``None``: it names none.

        Args:
            drafter: kind that the policy drafts with, if it is known.

        Raises:
            SettingsError: it cannot be used.
        """
        return network_of_file(
            "policy.ltd.weights", settings.ltd.weights, Network.from_bytes, MAX_BYTES,
            "trainer policy", drafter,
        )  # fmt: skip

    def plan(self, obs: StepObs) -> Decision:
        """Draw K from the law for these requests."""
        if obs.groups != self._groups:
            self._ahead.clear()  # it was computed for others
        self._groups, self._context = obs.groups, obs.context
        return super().plan(obs)

    def observe(self, outcome: Outcome) -> None:
        """Learn, and compute the law of the next step for requests like these."""
        self._groups, self._context = outcome.rows.groups, outcome.context
        super().observe(outcome)

    def law(self, batch: int, max_k: int) -> Sequence[float]:
        """The K with the highest score among those that can be used."""
        network, shares = self._published.network, self.costs.shares(batch)
        if network is None:
            scores = self._features.rates(shares)
        else:
            scores = network.scores(
                self._features.vector(batch, shares, self._groups, self._context)
            )
        usable = range(min(max_k + 1, len(scores)))
        return spread(max(usable, key=scores.__getitem__), max_k, self._random_share)

    def learn(self, outcome: Outcome, law: Sequence[float]) -> None:
        """Update the features; the network itself is fitted elsewhere."""
        rows = outcome.rows
        self._features.observe(outcome.decision.draft_k, rows.num_verified, rows.num_accepted)

    def forget(self, calibration: dict[str, Any]) -> None:
        """Start the features from what was published with the version, and take the network that
        comes with it, if any."""
        self._features.forget(Calibration.of(calibration).acceptance)
        self._published.on_swap(calibration)

    def refused(self, drafter: str) -> str | None:
        """See ``TakesPublished``."""
        return self._published.problem if drafter == self.drafter else None

    def state(self) -> dict[str, Any]:
        """Whether there is a network, how old it is, and why the version's own was refused."""
        return self._published.figures(self.version)
