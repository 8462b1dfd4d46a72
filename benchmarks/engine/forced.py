"""Synthetic acceptance: how many draft tokens are kept does not depend on what they are.

Verification runs and costs what it costs, then its verdict on the number of kept tokens is replaced
by an entry of a fixed table, picked by the request's key and its number of rounds. It is that of
drafts whose every token survives with probability 0.74: over 64 rounds of K = 4, exactly 2 of 4
tokens are kept, so 3 are committed a round. What comes out is no text of the target any more.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from serving.rounds import Rounds

_SURVIVORS = (47, 35, 26, 20, 14, 11, 8, 6)
"""Of 64 rounds, how many keep at least 1, 2, ... 8 tokens. The first four add up to 2 * 64."""
NUM_ROUNDS = 64


def table() -> list[int]:
    """Tokens kept in each of 64 rounds if enough are drafted, in a random fixed order."""
    kept = [sum(number < alive for alive in _SURVIVORS) for number in range(NUM_ROUNDS)]
    random.Random(0).shuffle(kept)
    return kept


@contextmanager
def forced_acceptance(device: torch.device) -> Iterator[None]:
    """Rounds of engines that are built within keep what the table says."""
    verify = Rounds._verify
    kept = torch.tensor(table(), device=device)

    def forced(self: Rounds, logits: Tensor, rows: Any, drafts: Any, lens: Tensor, key: Any) -> Any:
        accepted, following = verify(self, logits, rows, drafts, lens, key)
        if not key.num_draft:
            return accepted, following
        number = (rows.nonce_R + (rows.key_R & (NUM_ROUNDS - 1))) % NUM_ROUNDS
        wanted = kept.index_select(0, number)
        return torch.minimum(wanted, lens).to(accepted.dtype), following

    with mock.patch.object(Rounds, "_verify", forced):
        yield
