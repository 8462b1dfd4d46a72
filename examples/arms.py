"""The arms of a comparison: what each may draft with, on one server.

``plain`` decodes without drafts. ``static`` is what a team deploys the day before: the first
drafter frozen, and an index that sees the request alone. ``index`` is static with the index over
recent traffic. ``tuned`` is index with the newest weights. Beside them stands the drafter alone,
without any index, frozen and newest: the comparison that others publish.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

Arm = Literal["plain", "static", "index", "tuned", "drafter_alone_static", "drafter_alone_tuned"]
ARMS: tuple[Arm, ...] = ("plain", "static", "index", "tuned")
ALONE: tuple[Arm, ...] = ("drafter_alone_static", "drafter_alone_tuned")
ALL_ARMS: tuple[Arm, ...] = (*ARMS, *ALONE)


class ArmsError(ValueError):
    """The server lacks a drafter that an arm needs; the text says which, and what to set."""


@dataclass(frozen=True, slots=True)
class Setup:
    """How the requests of one arm are drafted for."""

    drafters: tuple[str, ...]
    """Kinds; empty: plain decoding."""
    version: int | None
    """Version of the drafter that learns; ``None``: any."""


def setups(drafters: Iterable[dict[str, Any]], static: int, newest: int) -> dict[Arm, Setup]:
    """The setup of every arm.

    Args:
        drafters: what ``GET /admin/drafter`` says of the server's drafters.
        static: version of the frozen weights.
        newest: version of the tuned ones.

    Raises:
        ArmsError: a drafter is missing.
    """
    known = list(drafters)
    learns = _kind(known, "that learns", learns=True)
    index = {"learns": False, "draws": False}  # wherever it looks
    alone = _kind(known, "that looks up the request alone", **index, shares_text=False)
    recent = _kind(known, "that looks up recent traffic", **index, shares_text=True)
    return {
        "plain": Setup((), None),
        "static": Setup((learns, alone), static),
        "index": Setup((learns, recent), static),
        "tuned": Setup((learns, recent), newest),
        "drafter_alone_static": Setup((learns,), static),
        "drafter_alone_tuned": Setup((learns,), newest),
    }


def _kind(drafters: list[dict[str, Any]], what: str, **traits: bool) -> str:
    for drafter in drafters:
        if all(drafter[name] == value for name, value in traits.items()):
            return str(drafter["kind"])
    raise ArmsError(
        f"the arms need a drafter {what}, and this server has only "
        f"{', '.join(drafter['kind'] for drafter in drafters) or 'none'}; start it with "
        f"--config compare"
    )
