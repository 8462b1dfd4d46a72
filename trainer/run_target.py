"""Which weights the target of a run has. Imports no torch: they are hashed while it is imported."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path

from buffer.fingerprint import target_fingerprint
from buffer.run_target import RunTarget, read_run_target
from configs.schema import Settings
from targets.find import checked_folder

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Place:
    """The target's weights that a trainer begins with."""

    folder: Path
    fingerprint: str


def target_of_run(settings: Settings) -> Place:
    """The target in the settings, or the weights that took its place in this run.

    Raises:
        ValueError: they cannot be used; the message says why.
    """
    folder = checked_folder(settings.target, settings.target_cache)
    fingerprint = target_fingerprint(folder)
    now = read_run_target(settings.run_dir)
    if now is None or fingerprint not in now.former:
        return Place(folder, fingerprint)
    place = place_of(now)
    log.info("the target has the weights in %s now, no longer those in %s", place.folder, folder)
    return place


def place_of(target: RunTarget) -> Place:
    """Where the weights are that the run's target has now.

    Raises:
        ValueError: its folder is gone or holds other weights by now.
    """
    what = f"the weights that the run's target has now, in {target.folder or 'memory alone'},"
    folder = Path(target.folder)
    if not target.folder or not folder.is_dir():
        raise ValueError(f"{what} are not to be found; start the server with weights that are")
    checked_folder(target.folder)
    found = target_fingerprint(folder)
    if found != target.fingerprint:
        raise ValueError(
            f"{what} are {target.fingerprint[:12]}, but {found[:12]} is there by now; keep the "
            f"folder as it was until the next update"
        )
    return Place(folder, found)
