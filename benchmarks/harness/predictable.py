"""Forced acceptance without a hook: a target that walks a cycle of tokens, and a drafter that
predicts a fixed part of that cycle.

All matrices keep the sizes and dense kernels of their shape, so steps cost the same as with any
other weights; only the accepted tokens are known in advance. The engine verifies as usual, and
outputs are the target's own.

How it works: every layer but the last adds almost nothing to the residual stream, so the hidden
state is the embedding of the last token. The embedding of token i of the cycle is a vector of signs
rolled by i. The last layer's SwiGLU rolls it once more (its gates are held open by a coordinate
that is 1 in every embedding), so the head's argmax is token i + 1. The drafter does the same with
its fused features. Its head is negated for some tokens of the cycle, so its proposals for them are
rejected.

Imports nothing of the project, so that ``side.py`` can use it with any version of the engine.
"""

from __future__ import annotations

import math
import random
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

CYCLE = 48
"""Number of tokens in the cycle."""
MISSES = frozenset((0, 3, 13, 16, 17, 23, 24, 27, 28, 33, 34, 38, 44))
"""Positions of the cycle whose tokens the drafter never proposes. Chosen so that K = 4 emits 3.0
tokens per step, and K = 1, 2, 3 emit 1.71, 2.29, 2.67: within 0.03 of what independent tokens with
an acceptance rate of 0.74 would emit."""
FIRST_TOKEN = 16
"""Id of the cycle's first token; a reduced draft vocabulary contains the whole cycle."""
_GATE = 8.0
"""SiLU input of an open gate."""
_QUIET = 2e-5
"""Std of the output projections of attention and MLP; small, to preserve the residual stream."""


def expected_tokens_per_step(draft_k: int, num_rounds: int = 4800) -> float:
    """Tokens emitted per round and request with K = ``draft_k``."""
    emitted = 0
    for _ in range(num_rounds):
        ahead = ((emitted + n) % CYCLE in MISSES for n in range(1, draft_k + 1))
        emitted += next((n for n, is_missed in enumerate(ahead) if is_missed), draft_k) + 1
    return emitted / num_rounds


def prompts(num_prompts: int, length: int, vocab_size: int, seed: int = 0) -> list[list[int]]:
    """Random prompts without a common prefix that end on a token of the cycle."""
    numbers = random.Random(f"{seed} {num_prompts} {length}")
    return [
        [*numbers.choices(range(vocab_size), k=length - 1), FIRST_TOKEN + numbers.randrange(CYCLE)]
        for _ in range(num_prompts)
    ]


def is_continuation(last: int, token_ids: list[int]) -> bool:
    """True if ``token_ids`` continue the cycle after token ``last``."""
    start = last - FIRST_TOKEN
    return token_ids == [FIRST_TOKEN + (start + n) % CYCLE for n in range(1, len(token_ids) + 1)]


@dataclass(frozen=True, slots=True)
class _Roll:
    """One roll of the H coordinates of a hidden state, in blocks of ``CYCLE``."""

    hidden: int
    num_used: int
    """Coordinates 1 .. num_used are rolled; coordinate 0 is 1 in every embedding."""
    cycle_CH: Tensor
    """[48, H] float32, embeddings of the cycle's tokens."""

    @property
    def rms(self) -> float:
        return math.sqrt((1 + self.num_used) / self.hidden)

    def after(self) -> list[int]:
        """New index of each used coordinate, in coordinate order."""
        offsets = range(self.num_used)
        return [1 + n - n % CYCLE + (n % CYCLE + 1) % CYCLE for n in offsets]


@cache
def _roll_of(hidden: int) -> _Roll:
    blocks = (hidden - 1) // CYCLE
    if blocks < 1:
        raise ValueError(f"a hidden size of at least {CYCLE + 1} is needed, got {hidden}")
    best: tuple[float, Tensor] | None = None
    for seed in range(64):
        numbers = torch.Generator().manual_seed(seed)
        signs = torch.randint(2, (blocks, CYCLE), generator=numbers) * 2.0 - 1
        rolled_CBC = torch.stack([signs.roll(n, dims=1) for n in range(CYCLE)])
        alike = (rolled_CBC.flatten(1) @ signs.flatten())[1:].max().item()
        if best is None or alike < best[0]:
            best = alike, rolled_CBC.flatten(1)
    assert best is not None
    cycle = torch.zeros(CYCLE, hidden)
    cycle[:, 0] = 1
    cycle[:, 1 : 1 + blocks * CYCLE] = best[1]
    return _Roll(hidden, blocks * CYCLE, cycle)


@torch.no_grad()
def make_target_predictable(model: Any) -> None:
    """Make a Llama or Qwen3 model with random weights walk the cycle, in place.

    Raises:
        ValueError: the hidden size is below 49.
    """
    roll = _roll_of(model.config.hidden_size)
    for layer in model.model.layers:
        layer.self_attn.o_proj.weight.normal_(std=_QUIET)
        layer.mlp.down_proj.weight.normal_(std=_QUIET)
    mlp = model.model.layers[-1].mlp
    _roll_by(mlp.gate_proj.weight, mlp.up_proj.weight, mlp.down_proj.weight, roll)
    tables = {t.data_ptr(): t for t in (model.model.embed_tokens.weight, model.lm_head.weight)}
    for table_VH in tables.values():  # one if they are tied
        table_VH.normal_()
        table_VH[FIRST_TOKEN : FIRST_TOKEN + CYCLE] = roll.cycle_CH.to(table_VH)


@torch.no_grad()
def make_drafter_predictable(tensors: Mapping[str, Tensor], hidden: int) -> None:
    """Make a random EAGLE-3 drafter predict the cycle, by changing its bundle tensors in place.

    Args:
        tensors: named as in a bundle. A reduced vocabulary must hold the target's first ids
            (``d2t`` all 0).
        hidden: H.
    """
    roll = _roll_of(hidden)
    fc_HF = tensors["fc.weight"]
    fc_HF.normal_(std=_QUIET)
    num_taps = fc_HF.shape[1] // hidden
    moves = [(0, 0), *zip(range(1, roll.num_used + 1), roll.after(), strict=True)]
    source, to = (torch.tensor(ids, device=fc_HF.device) for ids in zip(*moves, strict=True))
    for tap in range(num_taps):
        fc_HF[to, tap * hidden + source] = 1 / num_taps
    tensors["o_proj.weight"].normal_(std=_QUIET)
    tensors["down_proj.weight"].normal_(std=_QUIET)
    gate, up = tensors["gate_up_proj.weight"].chunk(2)
    _roll_by(gate, up, tensors["down_proj.weight"], roll)
    head_VH = tensors["lm_head.weight"]
    head_VH.normal_()
    head_VH[FIRST_TOKEN : FIRST_TOKEN + CYCLE] = roll.cycle_CH.to(head_VH)
    head_VH[[FIRST_TOKEN + n for n in MISSES]] *= -1


def _roll_by(gate_IH: Tensor, up_IH: Tensor, down_HI: Tensor, roll: _Roll) -> None:
    """Make a SwiGLU add the rolled vector and subtract the vector itself, after an RMS norm."""
    if len(gate_IH) < roll.num_used:
        raise ValueError(f"{roll.num_used} units are needed, the MLP has {len(gate_IH)}")
    units = torch.arange(roll.num_used, device=gate_IH.device)
    gate_IH[units] = 0
    gate_IH[units, 0] = _GATE * roll.rms  # the normed coordinate 0 is 1 / rms
    up_IH[units] = 0
    up_IH[units, 1 + units] = 1
    gain = roll.rms / float(torch.nn.functional.silu(torch.tensor(_GATE)))
    down_HI[:, units] = 0
    down_HI[1 + units, units] = -gain
    down_HI[torch.tensor(roll.after(), device=gate_IH.device), units] = gain
