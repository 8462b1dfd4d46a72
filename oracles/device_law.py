"""``joint_law`` on the device that programs run on, through the functions they call: kernels on a
GPU, torch definitions on a CPU. Random numbers are generated where they are used, as in serving.

Shapes: R requests, K draft tokens, V cells of the distribution, C contexts, D draft vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from oracles.joint_law import (
    Held,
    Played,
    Setting,
    Tables,
    V,
    counted,
    decode_in_step,
    draft_chain,
)
from specops import device as faces
from specops.draft_sampling import Drafted, DraftLaw, VocabMap, join_laws, vocab_map
from specops.rng import Numbering
from specops.sampling import SamplingRows
from specops.verify_logits import LogitVerdict, Rule

_ABSENT = -1e4
"""Logit of tokens outside the cells; their probability is 0 even in float64."""
_ALIGNED = 16
"""Rows of logits start at multiples of this, as with any real vocabulary; other alignments would
recompile the kernels."""


@dataclass(frozen=True, slots=True)
class Layout:
    """Token ids of the distribution's cells in the vocabularies of target and drafter."""

    size: int = V
    """Size of the target's vocabulary."""
    ids_V: tuple[int, ...] = tuple(range(V))
    drafted: tuple[int, ...] | None = None
    """Cells in the drafter's reduced vocabulary; ``None``: it uses the target's vocabulary."""

    @property
    def chunk(self) -> int:
        """Requests simulated at a time; they need 4 GB at K = 8, including scratch memory."""
        return min(1_000_000, 100_000_000 // self.size)


SMALL = Layout()
REDUCED = Layout(drafted=(0, 2, 3, 5, 7))
WIDE = Layout(12_288, (0, 1, 4_095, 4_096, 6_000, 8_191, 8_192, 12_287))
"""Three of the parts that kernels split real vocabularies into, with cells at their edges."""


@dataclass(frozen=True, slots=True)
class Faces:
    """The functions that programs call; a test may replace each."""

    sample_draft: Callable[..., Drafted] = faces.sample_draft
    verify_logits: Callable[..., LogitVerdict] = faces.verify_logits
    numbering: Callable[[Numbering], Numbering] = lambda right: right


RIGHT = Faces()


class _Prepared:
    """Tables and parameters of one run, on the device."""

    def __init__(
        self,
        setting: Setting,
        tables: Tables,
        layout: Layout,
        rule: Rule,
        chunk: int,
        device: torch.device,
        *,
        as_served: bool,
    ) -> None:
        self.setting, self.rule, self.size = setting, rule, layout.size
        self.ids_V = torch.tensor(layout.ids_V, device=device)
        self.cells = torch.zeros(layout.size, dtype=torch.int64, device=device)
        self.cells[self.ids_V] = torch.arange(V, device=device)
        self.target = _laid_out(tables.target.to(device), layout.size, self.ids_V)
        self.vocab: VocabMap | None = None
        self.draft_size, places, known = layout.size, self.ids_V, torch.arange(V, device=device)
        if layout.drafted is not None:
            known = torch.tensor(layout.drafted, device=device)
            self.draft_size = len(known)
            places = torch.arange(self.draft_size, device=device)
            self.vocab = vocab_map(self.ids_V[known] - places, layout.size)
        drafters = [table.to(device)[:, known] for table in tables.drafters]
        self.drafters = [_laid_out(table, self.draft_size, places) for table in drafters]
        self.best = [known[table.argmax(dim=-1)] for table in drafters]
        self.is_delta = tables.is_delta
        one = setting.rows(torch.float32, 1, layout.size)
        self._rows = replace(
            one,
            temperature_R=one.temperature_R.to(device).repeat(chunk),
            top_k_R=one.top_k_R.to(device).repeat(chunk),
            top_p_R=one.top_p_R.to(device).repeat(chunk),
            min_p_R=one.min_p_R.to(device).repeat(chunk),
            truncates=as_served or one.truncates,
        )
        self._rules = torch.full((chunk,), int(rule), device=device)

    def rows(self, count: int) -> SamplingRows:
        rows = self._rows
        return replace(
            rows,
            temperature_R=rows.temperature_R[:count],
            top_k_R=rows.top_k_R[:count],
            top_p_R=rows.top_p_R[:count],
            min_p_R=rows.min_p_R[:count],
        )

    def rules(self, count: int) -> Tensor:
        return self._rules[:count]


def _laid_out(table_CV: Tensor, size: int, ids: Tensor) -> Tensor:
    """[C, padded size]: the table's columns placed at these ids."""
    width = -(-size // _ALIGNED) * _ALIGNED
    wide = torch.full((len(table_CV), width), _ABSENT, device=table_CV.device)
    return wide.index_copy_(1, ids, table_CV.float())


def sample(
    setting: Setting,
    tables: Tables,
    rule: Rule,
    num_samples: int,
    device: torch.device | str = "cpu",
    layout: Layout = SMALL,
    parts: Faces = RIGHT,
    seed: int = 0,
    *,
    as_served: bool = True,
) -> tuple[Tensor, float | None]:
    """Counts [V, V, V] of the first three tokens, and the acceptance rate.

    Args:
        rule: ``MATCH`` decodes requests that have a seed, so random numbers do not depend on the
            round.
        as_served: one program serves all requests, so its kernels always assume that
            distributions may be truncated; ``False``: they assume it only if one is.
    """
    where, chunk = torch.device(device), min(layout.chunk, num_samples)
    prepared = _Prepared(setting, tables, layout, rule, chunk, where, as_served=as_served)

    def decode(start: int, end: int) -> tuple[Tensor, Tensor]:
        keys = torch.arange(start, end, device=where) + (seed << 40)

        def play(held: Held, round_number: int) -> Played:
            return _round(prepared, parts, keys[held.at_R], held, round_number)

        return decode_in_step(setting, end - start, play, where)

    return counted(num_samples, chunk, decode)


def _round(
    prepared: _Prepared, parts: Faces, keys_R: Tensor, held: Held, round_number: int
) -> Played:
    """The work of ``serving.engine.rounds`` between its passes."""
    count = len(keys_R)
    rows, rules = prepared.rows(count), prepared.rules(count)
    by_match = rules == int(Rule.MATCH)
    nonce = 0 if prepared.rule == Rule.MATCH else round_number
    numbering = parts.numbering(
        Numbering(keys_R, torch.full_like(keys_R, nonce), held.length_R.contiguous())
    )
    which = round_number % len(prepared.drafters)
    kept: list[Tensor] = []
    drawn: list[Drafted] = []

    def choose(context_R: Tensor, j: int) -> Tensor:
        if prepared.is_delta:
            return prepared.best[which][context_R]
        kept.append(prepared.drafters[which][context_R])
        here = replace(numbering, positions_R=numbering.positions_R + j)
        logits = kept[-1][:, : prepared.draft_size]
        drawn.append(parts.sample_draft(logits, rows, here, by_match, prepared.vocab))
        return prepared.cells[drawn[-1].tokens_R]

    chain = draft_chain(prepared.setting, held, choose)
    law = None
    if kept:
        logits = torch.stack(kept, dim=1)[..., : prepared.draft_size]
        law = DraftLaw(logits, rows, by_match, prepared.vocab, join_laws(drawn))
    verdict = parts.verify_logits(
        prepared.target[chain.contexts_RK1][..., : prepared.size],
        rows,
        prepared.ids_V[chain.tokens_RK],
        chain.lens_R,
        rules,
        numbering,
        law,
    )
    next_R = prepared.cells[verdict.next_R]
    return Played(chain.tokens_RK, chain.lens_R, verdict.num_accepted_R, next_R)
