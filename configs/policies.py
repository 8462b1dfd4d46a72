"""Settings of single policies, sections of ``policy``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

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


class HedgeSettings(Section):
    """The policy ``hedge``."""

    rate: float = Field(0.2, gt=0)
    """Learning rate of the weights' logarithms."""
    mixing: float = Field(0.05, ge=0, le=1)
    """Share of stretches that hear every drafter alike: in one step if the server can mix them, or
    else one after the other."""
    share: float = Field(1e-3, ge=0, lt=1)
    """Share of all weights that each drafter gets at every step, so that none is ever lost."""
    stretch_steps: int = Field(16, ge=1)
    """Steps before the next drafter is drawn; one that was idle must catch up first."""
    half_life_steps: float = Field(64.0, gt=0)
    """Steps of a drafter after which its acceptance counts half."""


SizeUse = Literal["off", "play", "note"]


class LtdSettings(Section):
    """The policy ``ltd`` (Learning to Draft)."""

    weights: Path | None = None
    """safetensors file of a policy, as ``trainer policy`` writes it. ``None``: the one that comes
    with the drafter's version; until there is one, K is the one that promises most tokens per
    second by the acceptance of late."""
    size: SizeUse = "play"
    """Share of the draft tokens that is verified, where the policy has a network for it. ``play``:
    that network decides; on a GPU programs that cut drafts are made at start-up, unless ``weights``
    is a file without it. ``note``: as ``play``, and traces keep the drafter's figures of every
    draft, to which such a network can be fitted. ``off``: everything is verified."""


class CuttingSettings(Section):
    """What the policies share whose drafts are cut on the device, request by request."""

    packed: bool = True
    """Verify packed rows, without those that were cut, so that cutting saves work of the target.
    Off: verification computes all rows, and cutting saves nothing; for comparisons."""
    headroom: float = Field(1.25, ge=1)
    """Room for packed rows, relative to the mean length that cuts have left lately. Where cuts
    leave more, the least confident positions of the batch go."""
    slack: float = Field(0.25, ge=0)
    """Draft tokens of room for each request in addition."""


class ConfidenceSettings(Section):
    """The policy ``confidence``."""

    threshold: float = Field(0.4, gt=0, le=1)
    """A draft ends before the first position whose likeliest token is less probable."""


class AdaEdlSettings(Section):
    """The policy ``adaedl``. Defaults are those of the paper."""

    threshold: float = Field(0.4, gt=0, le=1)
    """The first threshold on the bound; the paper does not give one."""
    gamma: float = Field(0.2, gt=0)
    """Factor on the entropy in the bound on acceptance."""
    alpha: float = Field(0.9, gt=0, le=1)
    """Share of accepted tokens that is aimed at."""
    beta1: float = Field(0.5, ge=0, lt=1)
    """Weight of the past in the average of that share."""
    beta2: float = Field(0.9, ge=0, lt=1)
    """Weight of the former threshold when it moves."""
    epsilon: float = Field(0.01, gt=0)
    """By how much it moves."""


class SpecDecPpSettings(Section):
    """The policy ``specdecpp`` (SpecDec++)."""

    weights: Path | None = None
    """safetensors file of a head, as ``trainer policy --method specdecpp`` writes it. ``None``: the
    one that comes with the drafter's version; until there is one, drafts are not cut."""
    most_risk: float = Field(0.3, gt=0, lt=1)
    """A draft ends before the predicted probability that a token of it is rejected gets larger."""


class RaggedSettings(Section):
    """The policy ``ragged``; its other settings are those of ``goodput``."""

    extra: int = Field(2, ge=1, le=16)
    """Tokens that are drafted for each request beyond K, of which as many are verified as K makes
    for the batch."""
