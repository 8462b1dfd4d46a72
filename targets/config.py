"""Load the config of a target, without torch, and without ``transformers`` where possible."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from targets.own_config import read_own_config

_MOST_CHARACTERS = 400
"""Of what ``transformers`` says against a config: of an unknown model it tells a page."""


def load_config(folder: Path) -> Any:
    """The config in ``folder``, with the names and values of Hugging Face's: an ``OwnConfig`` where
    that says the same, otherwise that of ``transformers``. Runs no code from the folder.

    Raises:
        ValueError: see ``their_config``.
    """
    own = read_own_config(folder)
    return their_config(folder) if own is None else own


def their_config(folder: Path) -> Any:
    """The config of ``transformers`` for the model in ``folder``. Runs no code from there.

    Raises:
        ValueError: it cannot be used; says why in a line.
    """
    from huggingface_hub.errors import StrictDataclassError
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except (OSError, ValueError, KeyError, TypeError, StrictDataclassError) as error:
        said = " ".join(str(error).split())
        what = said if len(said) <= _MOST_CHARACTERS else f"{said[:_MOST_CHARACTERS]} ..."
        raise ValueError(f"{folder / 'config.json'} cannot be used: {what}") from error
