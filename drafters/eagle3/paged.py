"""EAGLE-3 in a running engine: drafter KV in pages that share the target's slot numbers.

Shapes as in ``drafters.protocol``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from drafters.eagle3.fused import FusedEagle3, supports
from drafters.eagle3.model import Eagle3
from drafters.protocol import CommittedRows, Draft
from specops.attention import DecodePass, Group, PagedPass, make_group, paged_attention
from specops.device import decode_attention, places_of
from specops.draft_sampling import vocab_map
from specops.sampling import SamplingRows, distribution, draw

_PADDED_ROWS = 16  # requests that catch up on more rows than this get an attention group alone


class PagedEagle3:
    """One drafter module, its KV pool and its version."""

    kind = "eagle3"

    def __init__(self, module: Eagle3, embed: torch.nn.Module, num_slots: int) -> None:
        """
        Args:
            module: weights in serving dtype and device; edited in place by swaps.
            embed: the target's token embedding module (with its own scaling, if it has one).
            num_slots: slots of the target's KV pool; the drafter's pool uses the same numbers.
        """
        c = module.config
        weight = module.lm_head.weight
        self.module = module
        self.embed = embed
        self.version = 0
        shape = (num_slots, c.num_kv_heads, c.head_dim)
        self.keys = torch.zeros(shape, dtype=weight.dtype, device=weight.device)
        self.values = torch.zeros_like(self.keys)
        self.scale = c.head_dim**-0.5
        d2t = module.d2t
        self.vocab = None if d2t is None else vocab_map(d2t, c.target_vocab_size)
        """Of a reduced draft vocabulary."""
        self._fused: FusedEagle3 | None = None

    def run(
        self,
        embeds: Tensor,
        hidden: Tensor,
        angles: tuple[Tensor, Tensor],
        paged: PagedPass | DecodePass,
    ) -> Tensor:
        """Outputs g [T, H] of T packed rows; writes their K/V. ``angles``: from ``rope``."""

        def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            if isinstance(paged, DecodePass):
                return decode_attention(q, k, v, self.keys, self.values, paged, self.scale)
            return paged_attention(q, k, v, self.keys, self.values, paged, self.scale)

        out: Tensor = self.module(embeds, hidden, *angles, attend)
        return out

    def ingest(self, rows: CommittedRows) -> Tensor:
        """Compute the committed rows; returns g of each request's anchor, [R, H]."""
        order, groups = _committed_groups(rows)
        hidden = self.module.fuse(rows.features_TmH.flatten(1))
        embeds = self.embed(rows.ids_T).to(hidden.dtype)
        positions = rows.positions_T
        slots = torch.cat([rows.slots_RS[r, p] for r, p in _per_request(rows)])
        if order is not None:
            embeds, hidden, positions = embeds[order], hidden[order], positions[order]
            slots = slots[order]
        angles = self.module.rope(positions)
        out = self.run(embeds, hidden, angles, PagedPass(slots, groups))
        return out[_anchor_index(rows, groups, out.device)]

    def propose(
        self,
        rows: CommittedRows,
        num_draft: int,
        sampling: SamplingRows,
        greedy_rows: Tensor | None,
        uniforms_RK: Tensor | None,
    ) -> Draft:
        """See ``Drafter.propose``."""
        ends = torch.tensor(rows.counts_R, device=rows.ids_T.device).cumsum(0)
        anchors = rows.positions_T[ends - 1]
        output = self.ingest(rows)
        steps = self._drafted_steps(rows, anchors, num_draft)
        tokens: list[Tensor] = []
        dists: list[Tensor | None] = []
        for j in range(num_draft):
            if j:
                embeds = self.embed(tokens[-1]).to(output.dtype)
                output = self.run(embeds, output, *next(steps))
            drawn, dist = self._choose(output, j, sampling, greedy_rows, uniforms_RK)
            tokens.append(drawn)
            dists.append(dist)
        q = None if greedy_rows is None else torch.stack([d for d in dists if d is not None], 1)
        lens = (num_draft,) * len(rows.counts_R)
        return Draft(self.kind, torch.stack(tokens, 1), lens, q, self.version)

    def fuse(self, num_positions: int, **options: Any) -> str | None:
        """Compute passes of fixed shape by few launches from now on, where that computes the same;
        returns why not.

        Args:
            num_positions: positions of all rows are below it.
            options: of ``FusedEagle3``.
        """
        reason = supports(self.module, self.embed)
        if reason is None:
            self._fused = FusedEagle3(self.module, self.embed, num_positions, **options)
        return reason

    @property
    def is_fused(self) -> bool:
        """Passes of fixed shape run our operations, not the module's own code."""
        return self._fused is not None

    def draft_ahead(
        self, outputs_RH: Tensor, at: DecodePass, num_draft: int, choose: Callable[..., Tensor]
    ) -> Tensor:
        """Draft after anchors whose rows are in already; nothing here depends on a value.

        Args:
            outputs_RH: output of each anchor's row.
            at: one row for each request, at the position after its anchor.
            choose: (logits [R, Vd], number of the drafted token) -> target ids [R].

        Returns:
            [R, num_draft] int64.
        """
        tokens = [choose(self._logits(outputs_RH, None), 0)]
        if num_draft == 1:
            return tokens[0][:, None]
        steps = places_of(at, num_draft - 1, by_step=True)
        each = zip(steps.positions, steps.slots, steps.first, strict=True)
        for ahead, (positions_R, slots_R, first_R) in enumerate(each, start=1):
            here = replace(at, first_R=first_R)
            outputs_RH, squares = self._pass(tokens[-1], outputs_RH, positions_R, slots_R, here)
            tokens.append(choose(self._logits(outputs_RH, squares), ahead))
        return torch.stack(tokens, dim=1)

    def take_in(self, ids_T: Tensor, features_TmH: Tensor, at: DecodePass) -> Tensor:
        """Compute rows that the target has just verified; returns their outputs [T, H].

        Args:
            ids_T: [T] int64 tokens of the rows.
            features_TmH: [T, m, H] target rows of the positions before.
        """
        fuse = self.module.fuse if self._fused is None else self._fused.fuse
        hidden = fuse(features_TmH.flatten(1))
        rows = places_of(at, at.num_query(len(ids_T)))
        return self._pass(ids_T, hidden, rows.positions.flatten(), rows.slots.flatten(), at)[0]

    def _pass(
        self,
        ids_T: Tensor,
        hidden: Tensor,
        positions_T: Tensor,
        slots_T: Tensor,
        at: DecodePass,
    ) -> tuple[Tensor, Tensor | None]:
        """A pass of fixed shape: outputs g [T, H], and their squares where ``_logits`` wants them;
        writes the rows' K/V."""
        if self._fused is None:
            embeds = self.embed(ids_T).to(hidden.dtype)
            return self.run(embeds, hidden, self.module.rope(positions_T), at), None

        def attend(q: Tensor) -> Tensor:
            return decode_attention(q, None, None, self.keys, self.values, at, self.scale)

        return self._fused.forward(
            ids_T, hidden, positions_T, slots_T, attend, self.keys, self.values
        )

    def _logits(self, outputs: Tensor, squares: Tensor | None) -> Tensor:
        if self._fused is None:
            return self.module.logits(outputs)
        return self._fused.logits(outputs, squares)

    def _drafted_steps(
        self, rows: CommittedRows, anchors_R: Tensor, num_draft: int
    ) -> Iterator[tuple[tuple[Tensor, Tensor], PagedPass]]:
        """Angles and pages of the drafted rows at anchor + 1, anchor + 2, ...: where they lie does
        not depend on what is drafted, so all are prepared at once."""
        ahead = torch.arange(1, num_draft, device=anchors_R.device)
        positions_RK = anchors_R[:, None] + ahead
        slots_RK = rows.slots_RS.gather(1, positions_RK)
        cos, sin = self.module.rope(positions_RK)
        whole = make_group(0, rows.slots_RS, positions_RK, first_key=1)
        for j in range(num_draft - 1):
            one = slice(j, j + 1)
            group = Group(0, 1, rows.slots_RS, positions_RK[:, one], whole.mask_RQS[:, :, one])
            yield (cos[:, j], sin[:, j]), PagedPass(slots_RK[:, j], (group,))

    def _choose(
        self,
        output: Tensor,
        step: int,
        sampling: SamplingRows,
        greedy_rows: Tensor | None,
        uniforms_RK: Tensor | None,
    ) -> tuple[Tensor, Tensor | None]:
        """Draft token [R] of each request and, unless all are greedy, its distribution [R, V].

        A row that drafts its argmax gets a one-hot distribution: q is what was really drawn from.
        """
        logits = self.module.logits(output)
        if greedy_rows is None:
            return self.module.to_target_ids(logits.argmax(-1)), None
        assert uniforms_RK is not None, "sampled rows need uniforms"
        logits = logits if logits.dtype == torch.float64 else logits.float()
        dist = distribution(self._spread(logits)[:, None], sampling)[:, 0]
        best = torch.zeros_like(dist).scatter_(-1, dist.argmax(-1, keepdim=True), 1.0)
        dist = torch.where(greedy_rows[:, None], best, dist)
        return draw(dist, uniforms_RK[:, step]), dist

    def _spread(self, logits: Tensor) -> Tensor:
        """[R, Vd] -> [R, V], -inf where the draft vocabulary has no token."""
        if self.module.d2t is None:
            return logits
        ids = torch.arange(logits.shape[-1], device=logits.device) + self.module.d2t
        shape = (len(logits), self.module.config.target_vocab_size)
        return logits.new_full(shape, float("-inf")).index_copy_(1, ids, logits)


def _per_request(rows: CommittedRows) -> list[tuple[int, Tensor]]:
    pieces = torch.split(rows.positions_T, list(rows.counts_R))
    return list(enumerate(pieces))


def _committed_groups(rows: CommittedRows) -> tuple[Tensor | None, tuple[Group, ...]]:
    """Attention groups of the committed rows: one padded group, and long catch-ups alone.

    Returns a gather order that puts the rows (short ones padded on the left by repeating their
    first row) into group order, or ``None`` when they already are.
    """
    starts = [0]
    for count in rows.counts_R:
        starts.append(starts[-1] + count)
    short = [r for r, n in enumerate(rows.counts_R) if n <= _PADDED_ROWS]
    long = [r for r, n in enumerate(rows.counts_R) if n > _PADDED_ROWS]
    order: list[int] = []
    groups: list[Group] = []
    width = max((rows.counts_R[r] for r in short), default=0)
    for members, num_query in [(short, width), *(([r], rows.counts_R[r]) for r in long)]:
        if not members:
            continue
        at = len(order)
        for r in members:
            order += [starts[r]] * (num_query - rows.counts_R[r])
            order += range(starts[r], starts[r + 1])
        index = torch.tensor(order[at:], device=rows.ids_T.device)
        positions = rows.positions_T[index].view(len(members), num_query)
        groups.append(make_group(at, rows.slots_RS[members], positions, first_key=1))
    if order == list(range(starts[-1])):
        return None, tuple(groups)
    return torch.tensor(order, device=rows.ids_T.device), tuple(groups)


def _anchor_index(rows: CommittedRows, groups: tuple[Group, ...], device: torch.device) -> Tensor:
    """[R] packed index, in group order, of each request's last row."""
    short = [r for r, n in enumerate(rows.counts_R) if n <= _PADDED_ROWS]
    long = [r for r, n in enumerate(rows.counts_R) if n > _PADDED_ROWS]
    ends: dict[int, int] = {}
    at = 0
    width = max((rows.counts_R[r] for r in short), default=0)
    for r in short:
        at += width
        ends[r] = at - 1
    for r in long:
        at += rows.counts_R[r]
        ends[r] = at - 1
    return torch.tensor([ends[r] for r in range(len(rows.counts_R))], device=device)
