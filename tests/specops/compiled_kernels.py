"""Prints as JSON how often each kernel is specialised for greedy and sampled rounds of many shapes.

Nothing is compiled and no GPU is needed: Triton's requests for compilation are counted. Runs in its
own process, without the interpreter.
"""

from __future__ import annotations

import json
import sys
from collections import Counter
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import torch
from triton.runtime.jit import JITFunction

from specops.allocation import CutValues, HeadWeights
from specops.allocation_triton import confidence, cut_drafts, pack_rows
from specops.attention import DecodePass, Places
from specops.attention_triton import attend_pages, places_of
from specops.best_ids_triton import best_ids
from specops.capture_pack import new_ring
from specops.capture_pack_triton import pack_kept_rows
from specops.draft_sampling import DraftLaw
from specops.draft_sampling_triton import sample_draft
from specops.lane_penalties import LaneRequests, new_tables
from specops.lane_penalties_triton import adjust_rows, count_tokens
from specops.lanes import Column, Field, Input, LaneState
from specops.lanes_triton import close_round, open_round
from specops.linear import Norm
from specops.matches import BLOCK, Bounds, RingText
from specops.matches_triton import text_drafts
from specops.rng import Numbering
from specops.rope import Heads, RopeTable
from specops.rope_triton import rope_and_write
from specops.rows_triton import norm_pair
from specops.sampling import SamplingRows
from specops.verify_logits import LogitVerdict, Rule
from specops.verify_logits_triton import verify_logits
from tests.specops.no_device import use_no_device

VOCAB, HEADS, DIM, PAGE, MOST = 4096, 2, 16, 16, 16


def count_instead_of_compiling() -> Counter[str]:
    """From now on, launches do nothing, and each specialisation is counted once."""
    found: Counter[str] = Counter()
    run = JITFunction.run

    def note(self: Any, key: Any, _signature: Any, device: int, *_: Any) -> Any:
        found[self.fn.__name__] += 1
        self.device_caches[device][0][key] = SimpleNamespace()
        return self.device_caches[device][0][key]

    def launch(self: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> Any:
        return run(self, *args, grid=grid, warmup=True, **options)

    use_no_device()
    JITFunction._do_compile = note
    JITFunction.run = launch
    return found


def bookkeeping(
    size: int, num_draft: int, best_RQ: torch.Tensor, verdicts: list[LogitVerdict]
) -> None:
    """Rounds with a neural drafter and rounds with given drafts, greedy and sampled."""
    drafted = best_RQ.new_zeros((size, VOCAB), dtype=torch.bfloat16)
    best_ids(drafted, best_RQ.new_zeros(VOCAB))
    best_ids(drafted)
    # As many lanes as a server of this size, and a different number of pages for each size.
    ints, floats = torch.zeros((len(Field), 65), dtype=torch.int64), torch.zeros((3, 65))
    state = LaneState(ints, floats, torch.zeros((65, 60 + size), dtype=torch.int32))
    inputs = torch.zeros((64, Input.TOKENS + MOST), dtype=torch.int64)[:size]
    outputs = torch.zeros((64, Column.TOKENS + 3 * MOST), dtype=torch.int64)[:size]
    logq = torch.zeros((size, num_draft))
    for is_given in (True, False):
        opened = open_round(state, inputs, num_draft, PAGE, Rule.BLOCK, is_given=is_given)
        draft = opened.block_RQ[:, 1:]
        close_round(state, opened, draft, best_RQ, None, outputs)
        for verdict, logq_RK in zip(verdicts, (None, logq), strict=True):
            close_round(state, opened, draft, verdict, logq_RK, outputs)


def one_round(size: int, num_draft: int) -> None:
    """The launches of rounds of one shape, with fields laid out as in lanes."""
    ints = torch.zeros((7, size), dtype=torch.int64)
    floats = torch.ones((3, size))
    sampling = SamplingRows(floats[0], ints[0], floats[1], floats[2], truncates=True)
    numbering = Numbering(ints[1], ints[2], ints[3])
    flags, lens, drafts = ints[4] != 0, ints[5].clone(), ints.new_zeros((size, num_draft))
    logits = torch.zeros((size, num_draft + 1, VOCAB))
    law = None
    if num_draft:
        sample_draft(logits[:, 0].contiguous(), sampling, numbering, flags)
        law = DraftLaw(logits[:, 1:].contiguous(), sampling, flags, None)
        some_certain = replace(law, certain_RK=drafts != 0)
        verify_logits(logits, sampling, drafts, lens, ints[6], numbering, some_certain, False)
    verdicts = [
        verify_logits(logits, sampling, drafts, lens, ints[6], numbering, drafted, False)
        for drafted in (None, law)
    ]
    lanes = torch.zeros((size, 2 + 16), dtype=torch.int64)[:, 0]
    asks, tables = LaneRequests(lanes, ints[4], ints[5]), new_tables(size + 1, VOCAB, 512, "cpu")
    adjust_rows(logits, drafts, asks, tables)
    count_tokens(logits.argmax(-1), lens, asks, tables)
    bookkeeping(size, num_draft, best_ids(logits), verdicts)
    if num_draft:
        from_text(size, num_draft)
        cut(size, num_draft)
    pool = torch.zeros((8 * PAGE, HEADS, DIM))
    pages, first = torch.zeros((size, 8), dtype=torch.int32), ints[1].int()
    q = torch.zeros((size * (num_draft + 1), HEADS, DIM))
    for first_key in (0, 1):
        decode = DecodePass(pages, first, PAGE, first_key=first_key)
        attend_pages(q, pool, pool, decode, 1.0, num_parts=2)
    places_of(decode, num_draft + 1)
    drafted_rows(decode, places_of(decode, num_draft + 1, by_step=True), pool)
    ring = new_ring(2048, 2, DIM, "cpu", is_fp8=False, pinned=False)
    rows = q.bfloat16()
    pack_kept_rows(rows[:, :1], rows[:, 1], first, first, first, ring)


def from_text(size: int, num_draft: int) -> None:
    """Drafts from text, with and without a ring, and with fields laid out as in lanes."""
    texts, fields = torch.zeros((65, 300), dtype=torch.int32), torch.zeros((12, size)).long()
    spaces = torch.zeros(2, dtype=torch.int32)
    ring = RingText(torch.zeros(2 * BLOCK, dtype=torch.int32), spaces, spaces.long())
    for found in (None, ring):
        text_drafts(
            texts, fields[0].int(), fields[Field.LENGTH], fields[Field.SPACE], found, num_draft,
            Bounds(2, 12),
        )  # fmt: skip


def cut(size: int, num_draft: int) -> None:
    """A cut by a head, the figures that it reads, of rows of one part and of several, and the rows
    that are left."""
    for vocab in (VOCAB, 32 * VOCAB):
        confidence(torch.zeros((size, vocab), dtype=torch.bfloat16))
    figures, noted = torch.zeros((size, num_draft, 3)), torch.zeros((64, 1 + 3 * MOST))[:size]
    shapes = ((5,), (5,), (16, 5), (16,), (16,), ())
    head = HeadWeights(*(torch.zeros(shape) for shape in shapes))
    lens = cut_drafts(
        figures, torch.zeros((8, size)).long()[3], torch.zeros((3, size))[1],
        CutValues(*torch.zeros(3)), head, noted, score="head", cumulative=size % 2 == 0,
    )  # fmt: skip
    pack_rows(lens, num_draft, size * num_draft // 2)


def drafted_rows(decode: DecodePass, steps: Places, pool: torch.Tensor) -> None:
    """The launches between products in the passes of draft rows."""
    norm = Norm(torch.ones(DIM), 1e-6)
    hidden = torch.zeros((len(decode.first_R), DIM))
    qkv = torch.zeros((len(hidden), 3 * HEADS * DIM))
    angles = RopeTable(*torch.zeros((2, 8 * PAGE, DIM // 2)))
    for positions, slots, first in zip(steps.positions, steps.slots, steps.first, strict=True):
        norm_pair(positions, torch.zeros((VOCAB, DIM)), hidden, norm, norm)
        heads = Heads(HEADS, HEADS)
        q = rope_and_write(qkv, heads, angles, positions, slots, pool, pool)
        attend_pages(q, pool, pool, replace(decode, first_R=first), 1.0, num_parts=2)


if __name__ == "__main__":
    kernels = count_instead_of_compiling()
    for size in (1, 2, 3, 4, 8, 16, 64):
        for num_draft in (0, 1, 2, 5, 8, 15):
            one_round(size, num_draft)
    json.dump(kernels, sys.stdout)
