"""The dashboard is the one that is kept, and names what is reported and nothing else."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from reporting.dashboard import GOLDEN, as_json, figures_of
from reporting.names import FIGURES, PER_DRAFTER, TABLES, is_known, pattern_of


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of the package, on import
def test_the_dashboard_is_the_one_that_is_kept() -> None:
    """After a wanted change: python -m reporting.dashboard --print --project PROJECT > the file."""
    assert as_json() == GOLDEN.read_text()


def test_the_dashboard_names_every_figure_and_table() -> None:
    names, patterns, tables = figures_of(GOLDEN.read_text())

    shown = {pattern_of(n) if "{" in n or n in PER_DRAFTER else n for n in FIGURES}
    assert names | patterns == shown
    assert tables == set(TABLES)


def test_a_dashboard_that_cannot_be_saved_is_a_line(tmp_path: Path) -> None:
    unknown = {name: text for name, text in os.environ.items() if not name.startswith("WANDB_")}
    saved = subprocess.run(
        [sys.executable, "-m", "reporting.dashboard", "--entity", "team"],
        env=unknown | {"HOME": str(tmp_path), "NETRC": str(tmp_path / "netrc")},
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
    )
    assert saved.returncode == 1
    assert "the dashboard is not saved: No API key configured" in saved.stderr
    assert "Traceback" not in saved.stderr


def test_figures_of_positions_and_domains_are_known_by_their_pattern() -> None:
    assert is_known("trainer/alpha_3") and is_known("domain/code/speedup_over_static")
    assert not is_known("trainer/alpha") and not is_known("domain/code/loss")
    assert re.fullmatch(pattern_of("server/draft_k"), "server/draft_k")
