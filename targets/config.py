"""Load the config of a target, without torch, and without ``transformers`` where possible."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from targets.own_config import read_own_config


def load_config(folder: Path) -> Any:
    """The config in ``folder``, with the names and values of Hugging Face's: an ``OwnConfig`` where
    that says the same, otherwise that of ``transformers``. Runs no code from the folder."""
    own = read_own_config(folder)
    if own is not None:
        return own
    from transformers import AutoConfig

    return AutoConfig.from_pretrained(folder, trust_remote_code=False)
