"""Inputs and outputs of the programs of rounds, on the device and on the host."""

from __future__ import annotations

from itertools import cycle

import numpy as np
import torch
from numpy.typing import NDArray

from serving.engine.cuda_graphs import Graphs, Landing
from specops.lanes import Column, Input
from targets.target import Target

Integers = NDArray[np.int64]
MOST_LOGPROBS = 20
"""Maximum number of alternatives per token."""
_MOST_SCORED = 4
"""Largest K of a round that finds log probabilities: each further K is one more program for every
size and drafter, and most servers never run it."""


class RoundBuffers:
    """Inputs and outputs of the programs, at fixed addresses, and their copies on the host.

    The copies are used in turn. A round is launched before the last one is read, but after the one
    before that was, so two of each would do; the third is for a step that failed in between.
    """

    def __init__(self, max_batch: int, max_draft: int, target: Target, graphs: Graphs) -> None:
        device = target.device
        inputs = (max_batch, Input.TOKENS + max_draft)
        outputs = (max_batch, Column.TOKENS + 3 * max_draft)
        self.inputs = torch.zeros(inputs, dtype=torch.int64, device=device)
        self.outputs = torch.zeros(outputs, dtype=torch.int64, device=device)
        self._padding = max_batch
        """The lane of no request."""
        self._graphs = graphs
        self._copies = cycle([_Copies(graphs, inputs, outputs) for _ in range(3)])
        self._now = next(self._copies)
        self.num_top = min(MOST_LOGPROBS, target.vocab_size)
        self.most_scored = min(_MOST_SCORED, max_draft)
        shape = (max_batch * (self.most_scored + 1), 1 + 2 * self.num_top)
        self.scores = torch.zeros(shape, dtype=torch.float64, device=device)

    def upload(
        self,
        size: int,
        lanes: list[int],
        given: list[list[int]] | None,
        picked: list[int] | None = None,
    ) -> None:
        """Upload which lanes take part, and what host drafters propose for them.

        Args:
            size: that of the program; the rows behind ``lanes`` are padding.
            picked: number of the drafter of each, if a mix drafts; ``None``: the first.
        """
        self._now = next(self._copies)
        news = self._now.news[:size]
        news[:, Input.LANE] = self._padding
        news[: len(lanes), Input.LANE] = lanes
        news[:, Input.DRAFTED : Input.TOKENS] = 0
        if picked is not None:
            news[: len(lanes), Input.PICKED] = picked
        if given is not None:
            lens = list(map(len, given))
            most = max(lens)
            padded = [tokens + [0] * (most - len(tokens)) for tokens in given]
            news[: len(lanes), Input.DRAFTED] = lens
            news[: len(lanes), Input.TOKENS : Input.TOKENS + most] = padded
        self.inputs[:size].copy_(self._now.inputs[:size], non_blocking=True)

    def download(self, size: int) -> tuple[Integers, Landing]:
        """Start a copy of the outcome of the round that was uploaded last."""
        now = self._now
        landed = self._graphs.copy_to(now.outputs[:size], self.outputs[:size], now.landing)
        return now.outcome[:size], landed


class _Copies:
    """What a round reads and writes, on the host."""

    def __init__(self, graphs: Graphs, inputs: tuple[int, int], outputs: tuple[int, int]) -> None:
        self.inputs, self.outputs = graphs.on_host(inputs), graphs.on_host(outputs)
        self.news: Integers = self.inputs.numpy()
        self.outcome: Integers = self.outputs.numpy()
        self.landing = graphs.landing()
