"""From settings to a policy."""

from __future__ import annotations

from collections.abc import Sequence

from configs.schema import PolicySettings
from policies.acceptance import MAX_DRAFT
from policies.fixed import FixedPolicy
from policies.goodput import GoodputPolicy
from policies.interface import DraftPolicy


def build_policy(
    settings: PolicySettings, drafters: Sequence[str], seed: int, max_draft: int = MAX_DRAFT
) -> DraftPolicy:
    """The configured policy; without any drafter, plain decoding.

    Args:
        drafters: kinds that the server has, e.g. ``("eagle3", "suffix")``.
        max_draft: largest K the engine runs.
    """
    if not drafters or max_draft == 0:
        return FixedPolicy("none", 0)
    if settings.kind == "fixed":
        return FixedPolicy(settings.drafter, settings.draft_k)
    return GoodputPolicy(
        explore=settings.explore,
        half_life_rounds=settings.half_life_rounds,
        margin=settings.margin,
        max_draft=max_draft,
        seed=seed,
    )
