"""From running requests to the packed tensors of one pass.

Shapes: R decode requests, K draft tokens, T packed rows, S positions of the slot table.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from drafters.protocol import Draft
from serving.engine.scheduler import Chunk
from serving.engine.sequence import Sequence
from specops.attention import PagedPass, make_group
from specops.penalties import Adjustments, token_lists
from specops.rng import Stream, uniforms
from specops.sampling import SamplingRows, sampling_rows


@dataclass(frozen=True, slots=True)
class StepRows:
    """The rows of one target pass: decode requests first, then prompt chunks."""

    ids_T: Tensor
    positions_T: Tensor
    paged: PagedPass
    num_query: int
    """Rows of each decode request, K + 1."""


def step_rows(
    batch: list[Sequence], draft: Draft | None, chunks: tuple[Chunk, ...], device: torch.device
) -> StepRows:
    """Anchor and draft tokens of every decode request, and the tokens of every chunk."""
    num_query = 1 + (draft.tokens_RK.shape[1] if draft else 0)
    ids, positions, slots, groups = [], [], [], []
    at = 0
    if batch:
        anchors = torch.tensor([len(s.tokens) - 1 for s in batch], device=device)
        last = torch.tensor([s.tokens[-1] for s in batch], device=device)[:, None]
        block = last if draft is None else torch.cat((last, draft.tokens_RK), dim=1)
        positions_RQ = anchors[:, None] + torch.arange(num_query, device=device)
        table = slot_table(batch, num_query - 1, device)
        groups.append(make_group(0, table, positions_RQ))
        ids.append(block.reshape(-1))
        positions.append(positions_RQ.reshape(-1))
        slots.append(table.gather(1, positions_RQ).reshape(-1))
        at = len(batch) * num_query
    for chunk in chunks:
        own = torch.from_numpy(chunk.sequence.slots[: chunk.end]).to(device)
        where = torch.arange(chunk.start, chunk.end, device=device)
        groups.append(make_group(at, own[None], where[None]))
        ids.append(torch.tensor(chunk.sequence.tokens[chunk.start : chunk.end], device=device))
        positions.append(where)
        slots.append(own[chunk.start :])
        at += chunk.end - chunk.start
    paged = PagedPass(torch.cat(slots), tuple(groups))
    return StepRows(torch.cat(ids), torch.cat(positions), paged, num_query)


def slot_table(batch: list[Sequence], num_draft: int, device: torch.device) -> Tensor:
    """[R, S] int64 slots of positions 0 .. longest anchor + K; short requests padded with 0."""
    width = max(len(s.tokens) for s in batch) + num_draft
    table = np.zeros((len(batch), width), dtype=np.int64)
    for row, sequence in zip(table, batch, strict=True):
        slots = sequence.slots[:width]
        row[: len(slots)] = slots
    return torch.from_numpy(table).to(device)


def sampling_of(batch: list[Sequence], vocab_size: int, device: torch.device) -> SamplingRows:
    """Sampling parameters of the R requests as tensors."""
    params = [s.request.sampling for s in batch]
    return sampling_rows(
        [p.temperature for p in params],
        [p.top_k for p in params],
        [p.top_p for p in params],
        [p.min_p for p in params],
        vocab_size,
        device,
    )


def adjustments_of(batch: list[Sequence], device: torch.device) -> Adjustments | None:
    """Biases and penalties of a batch; ``None``, at no cost, where no request has any.

    Only lists that a penalty of their request looks at are packed.
    """
    rows = [row for row, s in enumerate(batch) if s.request.sampling.adjusts_logits]
    if not rows:
        return None
    own = [batch[row] for row in rows]
    params = [s.request.sampling for s in own]

    def column(values: list[float]) -> Tensor:
        return torch.tensor(values, dtype=torch.float64, device=device)

    return Adjustments(
        rows_A=torch.tensor(rows, device=device),
        presence_A=column([p.presence_penalty for p in params]),
        frequency_A=column([p.frequency_penalty for p in params]),
        repetition_A=column([p.repetition_penalty for p in params]),
        prompt=token_lists([prompt_that_counts(s) for s in own], device),
        generated=token_lists([completion_that_counts(s) for s in own], device),
        biased=token_lists([[token for token, _ in p.logit_bias] for p in params], device),
        bias_T=column([bias for p in params for _, bias in p.logit_bias]),
    )


def prompt_that_counts(sequence: Sequence) -> list[int]:
    """Its prompt, if a penalty looks at it."""
    counts = sequence.request.sampling.repetition_penalty != 1
    return sequence.tokens[: sequence.num_prompt] if counts else []


def completion_that_counts(sequence: Sequence) -> list[int]:
    """Its completion, if a penalty looks at it."""
    counts = sequence.request.sampling.penalizes
    return sequence.tokens[sequence.num_prompt :] if counts else []


def uniforms_of(batch: list[Sequence], count: int, stream: Stream, device: torch.device) -> Tensor:
    """[R, count] float64 numbers for the positions after each anchor.

    Requests verified by ``match`` draw once a position (nonce 0), so their output does not depend
    on how rounds fell; the others draw afresh every round.
    """
    keys = np.array([s.key for s in batch], dtype=np.uint64)
    nonces = np.array([0 if s.matches_target else s.num_rounds + 1 for s in batch])
    starts = np.array([len(s.tokens) for s in batch])
    numbers = uniforms(keys, starts[:, None] + np.arange(count), nonces, stream)
    return torch.from_numpy(numbers).to(device)
