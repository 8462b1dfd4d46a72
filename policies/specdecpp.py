"""SpecDec++: stop where a network says that some token of the draft will probably be rejected.

With ``c_j`` the predicted probability that position j is kept if all before it are, a draft ends
before the first position with ``1 - c_1 c_2 ... c_j > h``. ``trainer policy --method specdecpp``
fits the network to traces; it comes from ``policy.specdecpp.weights``, or with the drafter's
version, in the same swap. Until there is one, the server decodes plainly.

Source: Huang et al. 2024, arXiv:2405.19715; what the network sees differs, see
``policies.confidence_head``.
"""

from __future__ import annotations

from typing import Any, ClassVar, Self

from configs.policies import CuttingSettings
from configs.schema import PolicySettings
from policies.allocation import Allocation, Cut
from policies.confidence_head import MAX_BYTES, Head
from policies.cutting import CuttingPolicy
from policies.interface import PolicyContext
from policies.weight_file import weights_of

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
            head: ``None``: plain decoding until one is published with a version.
            takes_published: replace it by those that come with versions.
        """
        super().__init__(context, drafter, draft_k, random_share, how)
        self._threshold, self._head = 1 - most_risk, head
        self._takes_published = takes_published
        self._problem: str | None = None
        """Why the head of the last version was refused."""

    @classmethod
    def from_settings(cls, settings: PolicySettings, context: PolicyContext) -> Self:
        """Read ``policy.drafter``, ``policy.draft_k``, ``policy.random_share``, ``policy.cutting``
        and ``policy.specdecpp``.

        Raises:
            SettingsError: ``policy.specdecpp.weights`` cannot be used.
        """
        path = settings.specdecpp.weights
        head = weights_of(
            "policy.specdecpp.weights", path, Head.from_bytes, MAX_BYTES,
            "trainer policy --method specdecpp",
        )  # fmt: skip
        return cls(
            context, settings.drafter, settings.draft_k, settings.random_share, settings.cutting,
            settings.specdecpp.most_risk, head, takes_published=path is None,
        )  # fmt: skip

    def allocation(self) -> Allocation | None:
        """The network's cut, once there is one."""
        if self._head is None:
            return None
        return Allocation(self.cut, self._threshold, head=self._head)

    def forget(self, calibration: dict[str, Any]) -> None:
        """Take the head that comes with the version; one that is damaged changes nothing."""
        super().forget(calibration)
        if not self._takes_published or CALIBRATION_KEY not in calibration:
            return
        try:
            self._head = Head.from_text(calibration[CALIBRATION_KEY])
            self._problem = None
        except ValueError as error:
            self._problem = str(error)

    def state(self) -> dict[str, Any]:
        """Also whether there is a head, and what was wrong with the last one."""
        return {
            **super().state(), "has_weights": self._head is not None, "problem": self._problem,
        }  # fmt: skip
