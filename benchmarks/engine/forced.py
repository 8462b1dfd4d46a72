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
from dataclasses import replace
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from serving.engine.rounds import Rounds
from specops.lanes import Field, OpenedRound
from specops.verify_logits import LogitVerdict

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

    def forced(
        self: Rounds, logits: Tensor, opened: OpenedRound, drafts: Any, key: Any
    ) -> LogitVerdict | Tensor:
        verdict = verify(self, logits, opened, drafts, key)
        if not key.num_draft:
            return verdict
        fields = opened.ints_FR
        number = (fields[Field.NONCE] + (fields[Field.KEY] & (NUM_ROUNDS - 1))) % NUM_ROUNDS
        accepted_R = torch.minimum(kept.index_select(0, number), opened.lens_R)
        if not isinstance(verdict, Tensor):
            return replace(verdict, num_accepted_R=accepted_R)
        next_R = verdict.gather(1, accepted_R[:, None])[:, 0]
        nothing = torch.zeros_like(drafts.tokens_RK, dtype=torch.float32)
        return LogitVerdict(accepted_R, next_R, nothing, nothing, None, None)

    with mock.patch.object(Rounds, "_verify", forced):
        yield
