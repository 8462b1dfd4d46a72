"""The fitted draft policies of a run, as they are published with a version of the drafter."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from buffer.files import read_regular
from policies import ltd, specdecpp
from policies.confidence_head import FILE as HEAD_FILE
from policies.confidence_head import Head
from policies.network import FILE as NETWORK_FILE
from policies.network import Network
from policies.published import Origin
from policies.weight_file import WeightFile, text_of

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class FittedKind:
    """A policy with a network that is fitted to traces."""

    key: str
    """Of the network, in the calibration that comes with a version."""
    file: str
    """Its name in ``run_dir/policy``."""
    weights: WeightFile
    check: Callable[[bytes], object]
    """Raises ValueError if a file cannot be used."""

    def path(self, run_dir: Path) -> Path:
        return run_dir / "policy" / self.file

    def is_usable(self, text: object, drafter: str) -> bool:
        """Whether a server would take what came with a version of this drafter."""
        try:
            blob = self.weights.blob_of(text)
            self.check(blob)
            origin = Origin.of_blob(blob)
        except ValueError:
            return False
        return origin is None or origin.drafter == drafter

    def text(self, run_dir: Path, drafter: str | None = None) -> str | None:
        """The file as it is, with what it says of the traces that it was fitted to; ``None``: there
        is none, it was fitted to another drafter, or it cannot be used, which is logged."""
        path = self.path(run_dir)
        try:
            blob = read_regular(path, self.weights.max_bytes + 1, follow=True)
            self.check(blob)
            origin = Origin.of_blob(blob)
        except FileNotFoundError:
            return None
        except (OSError, ValueError) as error:
            log.warning("the policy in %s is not published: %s", path, error)
            return None
        is_own = drafter is None or origin is None or origin.drafter == drafter
        return text_of(blob) if is_own else None


KINDS = {
    "ltd": FittedKind(ltd.CALIBRATION_KEY, "ltd.safetensors", NETWORK_FILE, Network.from_bytes),
    "specdecpp": FittedKind(
        specdecpp.CALIBRATION_KEY, "specdecpp.safetensors", HEAD_FILE, Head.from_bytes
    ),
}
"""By ``policy.kind``."""


def policy_path(run_dir: Path) -> Path:
    """Where ``trainer policy`` writes the network of ``ltd``."""
    return KINDS["ltd"].path(run_dir)


def head_path(run_dir: Path) -> Path:
    """Where it writes the head of ``specdecpp``."""
    return KINDS["specdecpp"].path(run_dir)


def fitted_policy(run_dir: Path, drafter: str | None = None) -> dict[str, str]:
    """What the calibration of the next version says of fitted policies: nothing of one that is not
    there, was fitted to another drafter, or whose file cannot be used, which is logged.

    Args:
        drafter: kind of the drafter whose version it is; ``None``: any.
    """
    found = {kind.key: kind.text(run_dir, drafter) for kind in KINDS.values()}
    return {key: text for key, text in found.items() if text is not None}
