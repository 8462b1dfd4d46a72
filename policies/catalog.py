"""Every kind of draft policy, one line each, and how settings become a policy.

To add a kind, write one file with a class that implements ``policies.interface.DraftPolicy`` and
has a classmethod ``from_settings(settings: PolicySettings, context: PolicyContext)``, and add its
line to ``CATALOG``; ``policy.kind`` then selects it. The class reads its own keys of the settings'
``policy`` section. Unless it says ``wants_guard = False``, a ``policies.guard.Guard`` keeps it from
drafting where plain decoding is faster.
"""

from __future__ import annotations

import pkgutil
from collections.abc import Mapping
from typing import Any

from configs.choices import known
from configs.schema import PolicySettings
from policies.allocation import Cut
from policies.fixed import FixedPolicy
from policies.guard import Guard
from policies.interface import DrafterTraits, DraftPolicy, PolicyContext

CATALOG = {
    "goodput": "policies.goodput:GoodputPolicy",
    "fixed": "policies.fixed:FixedPolicy",
    "table": "policies.table:TablePolicy",
    "ema_tiers": "policies.ema_tiers:EmaTiersPolicy",
    "ucb": "policies.ucb:UcbPolicy",
    "thompson": "policies.thompson:ThompsonPolicy",
    "exp3s": "policies.exp3s:Exp3sPolicy",
    "hedge": "policies.hedge:HedgePolicy",
    "ltd": "policies.ltd:LtdPolicy",
    "confidence": "policies.confidence:ConfidencePolicy",
    "adaedl": "policies.adaedl:AdaEdlPolicy",
    "specdecpp": "policies.specdecpp:SpecDecPpPolicy",
    "ragged": "policies.ragged:RaggedPolicy",
}
"""Values of ``policy.kind`` -> module and class. Text, so that a kind is one line without an import
and only the module in use is loaded."""


def policy_class(settings: PolicySettings) -> Any:
    """The class of the configured kind.

    Raises:
        SettingsError: ``policy.kind`` is not in the catalog.
    """
    known("policy.kind", settings.kind, CATALOG)
    return pkgutil.resolve_name(CATALOG[settings.kind])


def check_policy(settings: PolicySettings) -> None:
    """Check what the configured kind reads besides its settings, such as files of weights, by the
    classmethod ``check`` of its class if it has one: before a target is loaded for it.

    Raises:
        SettingsError: it cannot be used.
    """
    check = getattr(policy_class(settings), "check", None)
    if check is not None:
        check(settings)


def cuts_of(settings: PolicySettings) -> tuple[Cut, ...]:
    """Ways in which the configured kind lets the device cut drafts, for which programs are made at
    start-up: ``device_cuts`` of its class, or what its classmethod ``cuts_by`` says; none for most.

    Raises:
        SettingsError: ``policy.kind`` is not in the catalog, or a file that it names cannot be
            used.
    """
    found = policy_class(settings)
    by_settings = getattr(found, "cuts_by", None)
    return tuple(
        getattr(found, "device_cuts", ()) if by_settings is None else by_settings(settings)
    )


def uncut(settings: PolicySettings) -> PolicySettings | None:
    """Settings with which the configured kind cuts nothing, by the classmethod ``uncut`` of its
    class; ``None``: it always does."""
    found = getattr(policy_class(settings), "uncut", None)
    if not cuts_of(settings):
        return settings
    return None if found is None else found(settings)


def build_policy(
    settings: PolicySettings,
    drafters: Mapping[str, DrafterTraits],
    seed: int,
    max_draft: int,
    mixes: Mapping[str, tuple[str, ...]] | None = None,
) -> DraftPolicy:
    """The configured policy, held to plain decoding's speed unless it has a floor of its own or the
    settings say otherwise; or plain decoding where nothing can be drafted.

    Args:
        drafters: traits by kind of every drafter the server holds.
        seed: seed of exploration.
        max_draft: largest K the engine runs, 0..16.
        mixes: see ``PolicyContext``; ``None``: there are none.

    Raises:
        SettingsError: ``policy.kind`` is not in the catalog.
    """
    found = policy_class(settings)
    if not drafters or max_draft == 0:
        return FixedPolicy("none", 0)
    context = PolicyContext(drafters, max_draft, seed, mixes or {})
    policy: DraftPolicy = found.from_settings(settings, context)
    if settings.guard and getattr(found, "wants_guard", True):
        return Guard(policy, context, settings.drafter, settings.probe_share)
    return policy
