"""How every published figure is written down."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from examples.machine import machine


def write_result(out: Path, figures: Mapping[str, Any]) -> None:
    """Figures with the hardware, versions and commit that they were measured on."""
    out.write_text(json.dumps({**figures, "machine": machine()}, indent=2) + "\n")
