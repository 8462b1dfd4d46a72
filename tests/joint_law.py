"""Speculative sampling without an engine: many requests in step, and the law they should follow.

Target and drafter are tables of logits over contexts of two tokens, so the law of the first three
tokens (8 x 8 x 8 cells) is known exactly. Numbers, distributions, draws and rules are the very
functions that serving calls; ``Parts`` says where a test may plant a bug.

Shapes: R requests, K draft tokens, V vocabulary, C contexts.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from specops.rng import Stream, uniforms
from specops.sampling import SamplingRows, distribution, draw, sampling_rows
from specops.verify import Verdict, verify_block, verify_standard

V, LENGTH = 8, 3
NONE = V
"""Stands for the token before the first."""
CHUNK = 50_000
"""Requests in step at a time."""


@dataclass(frozen=True, slots=True)
class Setting:
    """How one run samples and drafts."""

    temperature: float
    truncates: bool
    """With top-p, top-k and min-p, all three."""
    num_draft: int
    adaptive: bool = False
    """Fewer are drafted after a rejection, and after an even draft token none."""

    def rows(self, dtype: torch.dtype) -> SamplingRows:
        top_k, top_p, min_p = (6, 0.9, 0.05) if self.truncates else (None, 1.0, 0.0)
        count = (V + 1) ** 2
        return sampling_rows(
            [self.temperature] * count,
            [top_k] * count,
            [top_p] * count,
            [min_p] * count,
            V,
            dtype=dtype,
        )

    @property
    def name(self) -> str:
        truncation = "truncated" if self.truncates else "whole"
        length = "adaptive K" if self.adaptive else f"K {self.num_draft}"
        return f"temperature {self.temperature} {truncation} {length}"


LENGTHS = ((0, False), (1, False), (3, False), (8, False), (4, True))
SETTINGS = tuple(
    Setting(temperature, truncates, num_draft, adaptive)
    for temperature in (0.3, 1.0, 1.5)
    for truncates in (False, True)
    for num_draft, adaptive in LENGTHS
)
REGIMES = ("close", "opposed", "swapped", "index")
"""The drafter is near the target; is its negative; is one and the other from round to round; names
one token for certain, as the suffix index does."""


@dataclass(frozen=True, slots=True)
class Tables:
    """Logits [C, V] after every context: target, and the drafters in force by round."""

    target: Tensor
    drafters: tuple[Tensor, ...]
    is_delta: bool


def tables_of(regime: str, seed: int = 0) -> Tables:
    generator = torch.Generator().manual_seed(seed)
    shape = ((V + 1) ** 2, V)
    target = 1.2 * torch.randn(shape, generator=generator)
    close = target + 0.5 * torch.randn(shape, generator=generator)
    drafters = {
        "close": (close,),
        "opposed": (-target,),
        "swapped": (close, -target),
        "index": (close,),
    }
    return Tables(target, drafters[regime], regime == "index")


@dataclass(frozen=True, slots=True)
class Seen:
    """All that a rule could look at in one round; most of it, it must not."""

    p: Tensor
    """[R, K + 1, V] target, shaped."""
    q: Tensor | None
    """[R, K, V] as the drafter handed it over; ``None`` for delta drafts."""
    draft: Tensor
    lens: Tensor
    draft_u: Tensor
    accept_u: Tensor
    next_u: Tensor
    p_raw: Tensor
    """[R, K + 1, V] target at temperature 1, whole."""
    q_after: Tensor
    """[R, V] drafter after its own last token."""

    def verdict(self, rule: str) -> Verdict:
        judge = verify_block if rule == "block" else verify_standard
        return judge(self.p, self.q, self.draft, self.lens, self.accept_u, self.next_u)


@dataclass(frozen=True, slots=True)
class Parts:
    """The steps of a round, each of which a test may replace."""

    draw_draft: Callable[[Tensor, Tensor], Tensor] = draw
    hand_over: Callable[[Tensor, Tensor], Tensor] = lambda drawn, raw: drawn
    """(q drawn from, q at temperature 1) -> q handed to the rule, [R, V] each."""
    verify: Callable[[Seen, str], Verdict] = Seen.verdict


RIGHT = Parts()


def expected_law(setting: Setting, tables: Tables) -> Tensor:
    """[V, V, V] float64: the target alone."""
    law = distribution(tables.target.double()[:, None], setting.rows(torch.float64))[:, 0]
    out = torch.zeros(V, V, V, dtype=torch.float64)
    for a, b, c in itertools.product(range(V), repeat=3):
        first, second = law[context_of(NONE, NONE)][a], law[context_of(NONE, a)][b]
        out[a, b, c] = first * second * law[context_of(a, b)][c]
    return out


def context_of(before: Any, last: Any) -> Any:
    return before * (V + 1) + last


def sample(
    setting: Setting,
    tables: Tables,
    rule: str,
    num_samples: int,
    parts: Parts = RIGHT,
    seed: int = 0,
) -> tuple[Tensor, float | None]:
    """Counts [V, V, V] of the first three tokens, and the acceptance rate."""
    shaped = _Shaped.of(setting, tables)
    counts = torch.zeros(V**3, dtype=torch.int64)
    totals = np.zeros(2, dtype=np.int64)
    for start in range(0, num_samples, CHUNK):
        keys = np.arange(start, min(start + CHUNK, num_samples)) + (seed << 40)
        tokens = _decode(setting, shaped, rule, parts, keys.astype(np.uint64), totals)
        cells = (tokens[:, 0] * V + tokens[:, 1]) * V + tokens[:, 2]
        counts += torch.bincount(cells, minlength=V**3)
    proposed, accepted = totals.tolist()
    return counts.view(V, V, V).double(), accepted / proposed if proposed else None


@dataclass(frozen=True, slots=True)
class _Shaped:
    """Distributions [C, V] after every context."""

    p: Tensor
    p_raw: Tensor
    q: tuple[Tensor, ...]
    q_raw: tuple[Tensor, ...]
    is_delta: bool

    @classmethod
    def of(cls, setting: Setting, tables: Tables) -> _Shaped:
        def shape(logits: Tensor, how: Setting) -> Tensor:
            return distribution(logits[:, None], how.rows(torch.float32))[:, 0]

        raw = replace(setting, temperature=1.0, truncates=False)
        drawn_from = replace(setting, temperature=0.0) if tables.is_delta else setting
        return cls(
            p=shape(tables.target, setting),
            p_raw=shape(tables.target, raw),
            q=tuple(shape(logits, drawn_from) for logits in tables.drafters),
            q_raw=tuple(shape(logits, raw) for logits in tables.drafters),
            is_delta=tables.is_delta,
        )


def _decode(
    setting: Setting,
    shaped: _Shaped,
    rule: str,
    parts: Parts,
    keys: np.ndarray[Any, Any],
    totals: np.ndarray[Any, Any],
) -> Tensor:
    """[R, LENGTH] tokens of requests that share nothing but their shape."""
    width = 2 + LENGTH + setting.num_draft + 1
    text = torch.full((len(keys), width), NONE)
    length = torch.full((len(keys),), 2)
    room = torch.full((len(keys),), setting.num_draft)
    round_number = 0
    while len(at := torch.nonzero(length < 2 + LENGTH)[:, 0]):
        round_number += 1
        seen = _round(
            setting, shaped, parts, keys[at.numpy()], text[at], length[at], room[at], round_number
        )
        verdict = parts.verify(seen, rule)
        kept = verdict.num_accepted_R
        totals += (int(seen.lens.sum()), int(kept.sum()))
        emitted = torch.cat((seen.draft, verdict.next_R[:, None]), dim=1)
        emitted = emitted.scatter(1, kept[:, None], verdict.next_R[:, None])
        where = (length[at][:, None] + torch.arange(emitted.shape[1])).clamp(max=width - 1)
        text[at[:, None], where] = emitted  # what lies beyond the kept ones is written over later
        length[at] += kept + 1
        if setting.adaptive:
            room[at] = torch.where(kept < seen.lens, 1, setting.num_draft)
    return text[:, 2 : 2 + LENGTH]


def _round(
    setting: Setting,
    shaped: _Shaped,
    parts: Parts,
    keys: np.ndarray[Any, Any],
    text: Tensor,
    length: Tensor,
    room: Tensor,
    round_number: int,
) -> Seen:
    num_draft, num_rows = setting.num_draft, len(keys)
    nonces = np.full(num_rows, round_number)

    def numbers(stream: Stream, count: int) -> Tensor:
        positions = length.numpy()[:, None] + np.arange(count)
        return torch.from_numpy(uniforms(keys, positions, nonces, stream))

    which = round_number % len(shaped.q)
    draft_u = numbers(Stream.DRAFT, num_draft)
    row = torch.arange(num_rows)
    before, last = text[row, length - 2], text[row, length - 1]
    contexts, drafted, handed = [], [], []
    lens, open_ = torch.zeros(num_rows, dtype=torch.int64), torch.ones(num_rows, dtype=torch.bool)
    for j in range(num_draft):
        context = context_of(before, last)
        law = shaped.q[which][context]
        token = parts.draw_draft(law, draft_u[:, j])
        open_ = open_ & (j < room)
        lens += open_
        if setting.adaptive:
            open_ = open_ & (token % 2 == 1)
        contexts.append(context)
        drafted.append(token)
        handed.append(parts.hand_over(law, shaped.q_raw[which][context]))
        before, last = last, token
    contexts.append(context_of(before, last))
    places = torch.stack(contexts, dim=1)
    none = torch.zeros((num_rows, 0), dtype=torch.int64)
    q = None if shaped.is_delta or not handed else torch.stack(handed, dim=1)
    return Seen(
        p=shaped.p[places],
        q=q,
        draft=torch.stack(drafted, dim=1) if drafted else none,
        lens=lens,
        draft_u=draft_u,
        accept_u=numbers(Stream.ACCEPT, num_draft),
        next_u=numbers(Stream.RESIDUAL, 1)[:, 0],
        p_raw=shaped.p_raw[places],
        q_after=shaped.q[which][contexts[-1]],
    )


def chi_squared_excess(counts: Tensor, law: Tensor) -> float:
    """Statistic over its p = 1e-9 limit (Wilson-Hilferty); above 1 the law is rejected.

    Cells that expect fewer than 5 are pooled; a count where the law is 0 rejects at once.
    """
    if counts[law == 0].sum() > 0:
        return float("inf")
    expected = law * counts.sum()
    small = expected < 5
    observed = torch.cat((counts[~small], counts[small].sum()[None]))
    wanted = torch.cat((expected[~small], expected[small].sum()[None])).clamp(min=1e-9)
    statistic = ((observed - wanted) ** 2 / wanted).sum()
    df = len(wanted) - 1
    limit = df * (1 - 2 / (9 * df) + 5.998 * (2 / (9 * df)) ** 0.5) ** 3
    return float(statistic / limit)
