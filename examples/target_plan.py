"""Budget of a run of ``examples.train_target``, and its clock."""

from __future__ import annotations

import time
from dataclasses import dataclass, field

from examples.corpus import Domain

SHARES: dict[Domain, float] = {"python": 0.45, "c": 0.25, "docs": 0.30}
MAX_EPOCHS = 30.0
"""Largest number of passes over a domain. Python, which has the most text, takes over the rest.

30 is too many for docs: the bundled target's held-out loss there was 2.18 after 13 epochs and 2.28
after 28, while code kept improving. Lower it before training another target.
"""


@dataclass(frozen=True, slots=True)
class Plan:
    """Budget and shapes of a run. The defaults are the bundled target's."""

    seconds: float = 540.0
    """Length of the whole run, from the start of ``main``."""
    reading_s: float = 48.0
    """Text not read within this time is left out."""
    closing_s: float = 25.0
    """Reserved for the last evaluation, the samples and saving."""
    max_chars: int = 200_000_000
    """Maximum characters of text per domain."""
    tokenizer_chars: int = 16_000_000
    """Text the tokenizer is trained on, sampled from all domains by their shares."""
    shares: dict[Domain, float] = field(default_factory=SHARES.copy)
    """Share of each domain in the training tokens; a domain that is not named is not read."""
    vocab: int = 4096
    """At most 32,768: ids are kept in 16 bits."""
    num_layers: int = 16
    hidden: int = 256
    intermediate: int = 624
    num_heads: int = 4
    num_kv_heads: int = 2
    head_dim: int = 64
    context: int = 1024
    rows: int = 128
    """Sequences per step; 131,072 tokens by default."""
    muon_lr: float = 5e-3
    adam_lr: float = 3e-3
    weight_decay: float = 0.1
    warmup_steps: int = 100
    decay_from: float = 0.4
    """Fraction of the training time after which the learning rate falls linearly to zero."""
    checkpoint_every_s: float = 110.0
    heldout_windows: int = 400
    """Evaluation windows of ``context`` tokens per domain."""
    graph: bool = True
    """On a GPU, replay the whole step as one graph."""


SMALL = Plan(
    seconds=240, reading_s=75, closing_s=15, max_chars=2_000_000, tokenizer_chars=1_000_000,
    num_layers=2, hidden=128, intermediate=256, num_heads=2, num_kv_heads=1, context=128, rows=16,
    checkpoint_every_s=30, heldout_windows=32,
)  # fmt: skip

LARGE = Plan(
    seconds=270, reading_s=24, closing_s=18, max_chars=80_000_000, tokenizer_chars=12_000_000,
    shares={"python": 0.6, "c": 0.4}, vocab=16_384, num_layers=32, hidden=1024, intermediate=3072,
    num_heads=16, num_kv_heads=8, head_dim=128, rows=32, muon_lr=2.5e-3, adam_lr=2e-3,
    warmup_steps=40, checkpoint_every_s=600, heldout_windows=100, graph=False,
)  # fmt: skip
"""520 million parameters: 32 layers of Qwen3-0.6B's shape. No graph: a step of 32,768 tokens takes
long enough to hide its launches, and a graph would hold 50 GB of activations a second time."""


@dataclass(frozen=True, slots=True)
class Clock:
    """Time used and time left of a run."""

    plan: Plan
    started: float
    """Monotonic seconds."""

    @property
    def elapsed_s(self) -> float:
        return time.monotonic() - self.started

    @property
    def training_left_s(self) -> float:
        return self.plan.seconds - self.plan.closing_s - self.elapsed_s

    def say(self, text: str) -> None:
        print(f"{self.elapsed_s:7.1f} s  {text}", flush=True)
