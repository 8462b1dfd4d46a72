"""The fitted draft policies of a run, as they are published with a version of the drafter."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path

from buffer.files import read_regular
from policies import ltd, specdecpp
from policies.confidence_head import MAX_BYTES as MOST_HEAD_BYTES
from policies.confidence_head import Head
from policies.network import MAX_BYTES, Network
from policies.weight_file import text_of

log = logging.getLogger(__name__)


def policy_path(run_dir: Path) -> Path:
    """Where ``trainer policy`` writes the network of ``ltd``."""
    return run_dir / "policy" / "ltd.safetensors"


def head_path(run_dir: Path) -> Path:
    """Where it writes the head of ``specdecpp``."""
    return run_dir / "policy" / "specdecpp.safetensors"


def fitted_policy(run_dir: Path) -> dict[str, str]:
    """What the calibration of the next version says of fitted policies: nothing of one that is not
    there, or whose file cannot be used, which is logged."""
    found = {
        ltd.CALIBRATION_KEY: _text(policy_path(run_dir), MAX_BYTES, Network.from_bytes),
        specdecpp.CALIBRATION_KEY: _text(head_path(run_dir), MOST_HEAD_BYTES, Head.from_bytes),
    }
    return {key: text for key, text in found.items() if text is not None}


def _text(path: Path, most_bytes: int, check: Callable[[bytes], object]) -> str | None:
    """The file as it is, with what it says of the traces that it was fitted to."""
    try:
        blob = read_regular(path, most_bytes + 1, follow=True)
        check(blob)
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        log.warning("the policy in %s is not published: %s", path, error)
        return None
    return text_of(blob)
