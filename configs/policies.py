"""Settings of single policies, sections of ``policy``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from pydantic import Field

from configs.section import Section

Batch = Annotated[int, Field(ge=1)]
Length = Annotated[int, Field(ge=0, le=16)]
Tiers = Annotated[tuple[Length, ...], Field(min_length=1)]


class TableSettings(Section):
    """The policy ``table``."""

    lengths: Annotated[tuple[tuple[Batch, Length], ...], Field(min_length=1)] = (
        (1, 5),
        (8, 3),
        (32, 1),
    )
    """Pairs of (largest batch, K). A batch larger than all decodes plainly."""


class EmaTiersSettings(Section):
    """The policy ``ema_tiers``. Defaults are those of SGLang 0.5.23."""

    tiers: Annotated[tuple[tuple[Batch, Tiers], ...], Field(min_length=1)] = (
        (1, (1, 3, 5, 7)),
        (8, (0, 1, 3)),
        (32, (0, 1)),
        (64, (0,)),
    )
    """Pairs of (smallest batch, values of K in rising order)."""
    alpha: float = Field(0.2, gt=0, le=1)
    """Weight of a step in the moving average of accepted draft tokens."""
    warmup: int = Field(10, ge=1)
    """Steps before the first change of a tier."""
    interval: int = Field(5, ge=1)
    """Steps between changes after it."""


class UcbSettings(Section):
    """The policy ``ucb``."""

    window: int = Field(1000, ge=2)
    """Steps that count, for each size of batch."""
    width: float = Field(0.5, ge=0)
    """Factor on the width of confidence; 0: greedy."""


class ThompsonSettings(Section):
    """The policy ``thompson``."""

    half_life_steps: float = Field(400.0, gt=0)
    """Steps with drafts after which a round counts half."""
    refresh: int = Field(16, ge=1)
    """Steps for which the probabilities of K are kept; computing them takes 0.1 ms."""


class Exp3sSettings(Section):
    """The policy ``exp3s``."""

    mixing: float = Field(0.02, ge=0, le=1)
    """Share of steps with any K, all as likely. 1: always, for logs to judge policies on."""
    rate: float = Field(0.1, gt=0)
    """Learning rate of the weights' logarithms."""
    share: float = Field(1e-4, ge=0, lt=1)
    """Share of all weights that each K gets at every step, so that none is ever lost."""


class LtdSettings(Section):
    """The policy ``ltd`` (Learning to Draft)."""

    weights: Path | None = None
    """safetensors file of a policy, as ``trainer policy`` writes it. ``None``: the one that comes
    with the drafter's version; until there is one, the server decodes plainly."""
