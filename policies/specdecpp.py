"""SpecDec++: stop where a network says that some token of the draft will probably be rejected.

With ``c_j`` the predicted probability that position j is kept if all before it are, a draft ends
before the first position with ``1 - c_1 c_2 ... c_j > h``. ``trainer policy --method specdecpp``
fits the network to traces; it comes from ``policy.specdecpp.weights``, or with the drafter's
version, in the same swap. With a version that brings none, nothing is cut, and the figures that a
head is fitted to are noted.

Source: Huang et al. 2024, arXiv:2405.19715; what the network sees differs, see
``policies.confidence_head``.
"""

from __future__ import annotations

from typing import Any, ClassVar, Self

from configs.policies import CuttingSettings
from configs.schema import PolicySettings
from policies.allocation import Allocation, Cut
from policies.confidence_head import FILE, MAX_BYTES, NO_HEAD, Head
from policies.cutting import CuttingPolicy
from policies.interface import PolicyContext
from policies.lengths import drafter_for
from policies.published import Published, network_of_file

CALIBRATION_KEY = "specdecpp"
"""Of the head, in the calibration that comes with a version."""


class SpecDecPpPolicy(CuttingPolicy):
    """Cuts by a head's prediction that nothing was rejected so far."""

    kind = "specdecpp"
    cut = Cut("head", cumulative=True)
    device_cuts: ClassVar = (cut,)

    def __init__(
        self,
        context: PolicyContext,
        drafter: str,
        draft_k: int,
        random_share: float,
        how: CuttingSettings,
        most_risk: float,
        head: Head | None,
        *,
        takes_published: bool = True,
    ) -> None:
        """
        Args:
            head: ``None``: none until one is published with a version.
            takes_published: have those that come with versions instead.
        """
        super().__init__(context, drafter, draft_k, random_share, how)
        self._threshold = 1 - most_risk
        self._published = Published(
            CALIBRATION_KEY, FILE, Head.from_bytes, self.drafter, head, takes_published
        )

    @classmethod
    def from_settings(cls, settings: PolicySettings, context: PolicyContext) -> Self:
        """Read ``policy.drafter``, ``policy.draft_k``, ``policy.random_share``, ``policy.cutting``
        and ``policy.specdecpp``.

        Raises:
            SettingsError: ``policy.specdecpp.weights`` cannot be used.
        """
        head = cls.check(settings, drafter_for(settings.drafter, context))
        return cls(
            context, settings.drafter, settings.draft_k, settings.random_share, settings.cutting,
            settings.specdecpp.most_risk, head,
            takes_published=settings.specdecpp.weights is None,
        )  # fmt: skip

    @classmethod
    def check(cls, settings: PolicySettings, drafter: str | None = None) -> Head | None:
        """The head that ``policy.specdecpp.weights`` names; ``None``: it names none.

        Args:
            drafter: kind that the policy drafts with, if it is known.

        Raises:
            SettingsError: it cannot be used.
        """
        return network_of_file(
            "policy.specdecpp.weights", settings.specdecpp.weights, Head.from_bytes, MAX_BYTES,
            "trainer policy --method specdecpp", drafter,
        )  # fmt: skip

    def allocation(self) -> Allocation | None:
        """The network's cut, once there is one; before that, drafts are left whole."""
        head = self._published.network
        if head is None:
            return Allocation(self.cut, 0.0, head=NO_HEAD)
        return Allocation(self.cut, self._threshold, head=head)

    def forget(self, calibration: dict[str, Any]) -> None:
        """Take the head that comes with the version, if any."""
        super().forget(calibration)
        self._published.on_swap(calibration)

    def refused(self, drafter: str) -> str | None:
        """See ``TakesPublished``."""
        return self._published.problem if drafter == self.drafter else None

    def state(self) -> dict[str, Any]:
        """Also whether there is a head, how old it is, and why the version's own was refused."""
        return {**super().state(), **self._published.figures(self.version)}
