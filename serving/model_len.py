"""How long a request may be: what the settings say, within the positions of the target."""

from __future__ import annotations

from typing import Any

from configs.choices import SettingsError
from configs.schema import Settings
from targets.fits import num_positions

USUAL_TOKENS = 2048
"""Maximum number of tokens of a request where the settings leave it open."""


def model_len(settings: Settings) -> int:
    """Maximum number of tokens of a request, by settings from ``with_model_len``."""
    return settings.engine.max_model_len or USUAL_TOKENS


def with_model_len(settings: Settings, config: Any) -> Settings:
    """Settings whose ``engine.max_model_len`` is a number that the target can serve.

    Args:
        config: Hugging Face config of the target.

    Raises:
        SettingsError: the settings ask for more than the target's positions.
    """
    engine, positions = settings.engine, num_positions(config)
    wanted = engine.max_model_len
    if wanted is not None and positions is not None and wanted > positions:
        raise SettingsError(
            f"engine.max_model_len {wanted} is above the {positions} positions that the target "
            f"was made for (max_position_embeddings in its config.json); lower it to {positions} "
            f"or less"
        )
    if wanted is None:
        room = None if engine.num_pages is None else engine.num_pages * engine.page_size
        wanted = min(most for most in (USUAL_TOKENS, positions, room) if most is not None)
    engine = engine.model_copy(update={"max_model_len": wanted})
    return settings.model_copy(update={"engine": engine})
