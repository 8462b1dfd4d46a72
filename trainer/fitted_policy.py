"""The fitted draft policy of a run, as it is published with a version of the drafter."""

from __future__ import annotations

import logging
from pathlib import Path

from buffer.files import read_regular
from policies.ltd import CALIBRATION_KEY
from policies.network import MAX_BYTES, Network

log = logging.getLogger(__name__)


def policy_path(run_dir: Path) -> Path:
    """Where ``trainer policy`` writes it."""
    return run_dir / "policy" / "ltd.safetensors"


def fitted_policy(run_dir: Path) -> dict[str, str]:
    """What the calibration of the next version says of the policy: nothing if there is none, or if
    the file cannot be used, which is logged."""
    path = policy_path(run_dir)
    try:
        network = Network.from_bytes(read_regular(path, MAX_BYTES + 1, follow=True))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        log.warning("the policy in %s is not published: %s", path, error)
        return {}
    return {CALIBRATION_KEY: network.to_text()}
