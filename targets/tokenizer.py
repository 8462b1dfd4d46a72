"""Load the tokenizer of a target, without torch: a process that only speaks HTTP needs no more."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import AutoTokenizer


def load_tokenizer(folder: Path) -> Any:
    """Tokenizer in ``folder``; runs no code from the folder."""
    return AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
