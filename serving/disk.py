"""What a server that cannot write to its disk does without. Serving itself needs no disk."""

from __future__ import annotations

import logging
from collections.abc import Iterator

from buffer.files import why_unwritable
from configs.schema import Settings

log = logging.getLogger(__name__)


def warn_without_disk(settings: Settings) -> None:
    """Log what will be missing if ``run_dir`` cannot be written, before anything is loaded."""
    problem = why_unwritable(settings.run_dir)
    if problem is not None:
        log.warning(
            "run_dir %s cannot be written (%s). Serving starts nevertheless, without it: %s. Make "
            "room there, or choose another run_dir; what is missing is tried again as long as the "
            "server runs",
            settings.run_dir,
            problem,
            "; ".join(_missing(settings)),
        )


def _missing(settings: Settings) -> Iterator[str]:
    yield "there is no server.json, and the next start measures step times again"
    if settings.drafter.kind == "none":
        return
    if settings.capture.enabled:
        yield (
            "traces, which capture.enabled asks for, are lost and counted "
            '(traces_total{result="failed"}), so that nothing can be learnt from them'
        )
    if settings.swap.enabled:
        yield (
            "versions in use and rolled back, for which swap.enabled needs the folder, are not "
            "recorded, and a drafter that is not there yet is made in memory alone"
        )
