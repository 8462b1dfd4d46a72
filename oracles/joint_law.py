"""Speculative sampling without an engine: many requests in lockstep, and the joint distribution
(the law) that they should follow.

Target and drafter are tables of logits over contexts of two tokens, so the law of the first three
tokens (8 x 8 x 8 cells) is known exactly. Random numbers, distributions, draws and rules come from
the functions that serving calls; ``Parts`` holds those that a test may replace to plant a bug.
``device_law`` does the same with the kernels.

Shapes: R requests, K draft tokens, V vocabulary, C contexts.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from enum import Enum
from typing import Any

import numpy as np
import torch
from torch import Tensor

from specops.rng import Stream, uniforms
from specops.sampling import SamplingRows, distribution, draw, sampling_rows
from specops.verify import Verdict, verify_block, verify_standard

V, LENGTH = 8, 3
NONE = V
"""Stands for the tokens before the first."""
CHUNK = 50_000
"""Requests simulated at a time."""


class Cut(Enum):
    """Truncation of a distribution: (top-k, top-p, min-p)."""

    NOTHING = (None, 1.0, 0.0)
    ALL = (6, 0.9, 0.05)
    TOP_K = (4, 1.0, 0.0)
    TOP_P = (None, 0.9, 0.0)
    MIN_P = (None, 1.0, 0.1)

    @property
    def title(self) -> str:
        titles = {Cut.NOTHING: "whole", Cut.ALL: "truncated"}
        return titles.get(self, self.name.lower().replace("_", "-"))


@dataclass(frozen=True, slots=True)
class Setting:
    """Sampling and drafting settings of one run."""

    temperature: float
    cut: Cut
    num_draft: int
    adaptive: bool = False
    """Draft fewer tokens after a rejection, and none after an even draft token."""

    def rows(
        self, dtype: torch.dtype, count: int = (V + 1) ** 2, vocab_size: int = V
    ) -> SamplingRows:
        """Sampling rows for ``count`` equal requests."""
        top_k, top_p, min_p = self.cut.value
        return sampling_rows(
            [self.temperature] * count,
            [top_k] * count,
            [top_p] * count,
            [min_p] * count,
            vocab_size,
            dtype=dtype,
        )

    @property
    def sampling(self) -> str:
        """Name of the distribution, which does not depend on the drafter."""
        return f"temperature {self.temperature} {self.cut.title}"

    @property
    def name(self) -> str:
        length = "adaptive K" if self.adaptive else f"K {self.num_draft}"
        return f"{self.sampling} {length}"


LENGTHS = ((0, False), (1, False), (3, False), (8, False), (4, True))
"""Pairs of (K, whether the draft length is adaptive)."""


def _settings() -> Iterator[Setting]:
    """For each temperature, the untruncated distribution at every length, then the cuts in turn.
    Each cut is combined with every temperature and, across temperatures, nearly every length."""
    cuts = itertools.cycle((Cut.ALL, Cut.TOP_K, Cut.TOP_P, Cut.MIN_P))
    for temperature in (0.3, 1.0, 1.5):
        yield from (Setting(temperature, Cut.NOTHING, *length) for length in LENGTHS)
        yield from (Setting(temperature, next(cuts), *length) for length in LENGTHS)


SETTINGS = tuple(_settings())
REGIMES = ("close", "opposed", "swapped", "index")
"""The drafter is close to the target; is the target's negative; alternates between the two by
round; proposes one token with certainty, as the suffix index does."""


@dataclass(frozen=True, slots=True)
class Tables:
    """Logits [C, V] after every context: the target, and the drafters that alternate by round."""

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
    """Everything a verification rule could read in one round, including what it must not use."""

    p: Tensor
    """[R, K + 1, V] target distributions, after temperature and truncation."""
    q: Tensor | None
    """[R, K, V] draft distributions as handed over; ``None`` for delta drafts."""
    draft: Tensor
    lens: Tensor
    draft_u: Tensor
    accept_u: Tensor
    next_u: Tensor
    p_raw: Tensor
    """[R, K + 1, V] target distributions at temperature 1, untruncated."""
    q_after: Tensor
    """[R, V] draft distribution after the last draft token."""

    def verdict(self, rule: str) -> Verdict:
        judge = verify_block if rule == "block" else verify_standard
        return judge(self.p, self.q, self.draft, self.lens, self.accept_u, self.next_u)


@dataclass(frozen=True, slots=True)
class Parts:
    """The steps of a round; a test may replace each."""

    draw_draft: Callable[[Tensor, Tensor], Tensor] = draw
    hand_over: Callable[[Tensor, Tensor], Tensor] = lambda drawn, raw: drawn
    """(q drawn from, q at temperature 1) -> q handed to the rule, [R, V] each."""
    verify: Callable[[Seen, str], Verdict] = Seen.verdict


RIGHT = Parts()


def expected_law(setting: Setting, tables: Tables) -> Tensor:
    """[V, V, V] float64: joint distribution of the first three tokens under the target alone."""
    law = distribution(tables.target.double()[:, None], setting.rows(torch.float64))[:, 0]
    token = torch.arange(V)
    first, second = law[context_of(NONE, NONE)], law[context_of(NONE, token)]
    third = law[context_of(token[:, None], token)]
    return first[:, None, None] * second[:, :, None] * third


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

    def decode(start: int, end: int) -> tuple[Tensor, Tensor]:
        keys = (np.arange(start, end) + (seed << 40)).astype(np.uint64)

        def play(held: Held, round_number: int) -> Played:
            seen = _round(setting, shaped, parts, keys[held.at_R.numpy()], held, round_number)
            verdict = parts.verify(seen, rule)
            return Played(seen.draft, seen.lens, verdict.num_accepted_R, verdict.next_R)

        return decode_in_step(setting, end - start, play)

    return counted(num_samples, CHUNK, decode)


def counted(
    num_samples: int, chunk: int, decode: Callable[[int, int], tuple[Tensor, Tensor]]
) -> tuple[Tensor, float | None]:
    """Counts [V, V, V] of the first three tokens, and the acceptance rate.

    Args:
        decode: (first sample, end) -> what ``decode_in_step`` returns.
    """
    counts, totals = torch.zeros(V**3, dtype=torch.int64), torch.zeros(2, dtype=torch.int64)
    for start in range(0, num_samples, chunk):
        tokens, of_chunk = decode(start, min(start + chunk, num_samples))
        cells = (tokens[:, 0] * V + tokens[:, 1]) * V + tokens[:, 2]
        counts += torch.bincount(cells, minlength=V**3).cpu()
        totals += of_chunk.cpu()
    proposed, accepted = totals.tolist()
    return counts.view(V, V, V).double(), accepted / proposed if proposed else None


@dataclass(frozen=True, slots=True)
class Held:
    """Unfinished requests at the start of a round."""

    at_R: Tensor
    """[R] int64, indices among the simulated requests."""
    before_R: Tensor
    last_R: Tensor
    """The last two tokens."""
    length_R: Tensor
    """Position of the next token."""
    room_R: Tensor
    """Largest number of draft tokens."""


@dataclass(frozen=True, slots=True)
class Played:
    """Outcome of one round."""

    draft_RK: Tensor
    lens_R: Tensor
    num_accepted_R: Tensor
    next_R: Tensor


def decode_in_step(
    setting: Setting,
    num_requests: int,
    play: Callable[[Held, int], Played],
    device: torch.device | str = "cpu",
) -> tuple[Tensor, Tensor]:
    """Decode independent requests in lockstep. The host synchronises once per round, to learn which
    requests continue.

    Args:
        play: (unfinished requests, round number from 1) -> outcome of drafting and verification.

    Returns:
        [R, LENGTH] tokens, and [2] the numbers of proposed and accepted tokens.
    """
    width = 2 + LENGTH + setting.num_draft + 1
    text = torch.full((num_requests, width), NONE, device=device)
    length = torch.full((num_requests,), 2, device=device)
    room = torch.full((num_requests,), setting.num_draft, device=device)
    totals = torch.zeros(2, dtype=torch.int64, device=device)
    round_number = 0
    while len(at := torch.nonzero(length < 2 + LENGTH)[:, 0]):
        round_number += 1
        here = length[at]
        held = Held(at, text[at, here - 2], text[at, here - 1], here, room[at])
        played = play(held, round_number)
        kept = played.num_accepted_R
        totals += torch.stack((played.lens_R.sum(), kept.sum()))
        emitted = torch.nn.functional.pad(played.draft_RK, (0, 1))
        emitted = emitted.scatter(1, kept[:, None], played.next_R[:, None])
        place = torch.arange(emitted.shape[1], device=device)
        where = (here[:, None] + place).clamp(max=width - 1)
        text[at[:, None], where] = emitted  # whatever follows the kept tokens is overwritten later
        length[at] = here + kept + 1
        if setting.adaptive:
            room[at] = torch.where(kept < played.lens_R, 1, setting.num_draft)
    return text[:, 2 : 2 + LENGTH], totals


@dataclass(frozen=True, slots=True)
class Chain:
    """One round's drafts."""

    tokens_RK: Tensor
    lens_R: Tensor
    contexts_RK1: Tensor
    """Contexts after 0 .. K draft tokens."""


def draft_chain(setting: Setting, held: Held, choose: Callable[[Tensor, int], Tensor]) -> Chain:
    """Draft for every request.

    Args:
        choose: (contexts [R], index of the draft token) -> tokens [R].
    """
    before, last, room = held.before_R, held.last_R, held.room_R
    lens, open_ = torch.zeros_like(room), torch.ones_like(room, dtype=torch.bool)
    contexts, tokens = [context_of(before, last)], []
    for j in range(setting.num_draft):
        tokens.append(choose(contexts[-1], j))
        open_ = open_ & (j < room)
        lens = lens + open_
        if setting.adaptive:
            open_ = open_ & (tokens[-1] % 2 == 1)
        before, last = last, tokens[-1]
        contexts.append(context_of(before, last))
    drafted = torch.stack(tokens, dim=1) if tokens else room.new_zeros((len(room), 0))
    return Chain(drafted, lens, torch.stack(contexts, dim=1))


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

        raw = replace(setting, temperature=1.0, cut=Cut.NOTHING)
        drawn_from = replace(setting, temperature=0.0) if tables.is_delta else setting
        return cls(
            p=shape(tables.target, setting),
            p_raw=shape(tables.target, raw),
            q=tuple(shape(logits, drawn_from) for logits in tables.drafters),
            q_raw=tuple(shape(logits, raw) for logits in tables.drafters),
            is_delta=tables.is_delta,
        )


def _round(
    setting: Setting,
    shaped: _Shaped,
    parts: Parts,
    keys: np.ndarray[Any, Any],
    held: Held,
    round_number: int,
) -> Seen:
    nonces = np.full(len(keys), round_number)

    def numbers(stream: Stream, count: int) -> Tensor:
        positions = held.length_R.numpy()[:, None] + np.arange(count)
        return torch.from_numpy(uniforms(keys, positions, nonces, stream))

    which = round_number % len(shaped.q)
    draft_u = numbers(Stream.DRAFT, setting.num_draft)
    handed: list[Tensor] = []

    def choose(context: Tensor, j: int) -> Tensor:
        law = shaped.q[which][context]
        handed.append(parts.hand_over(law, shaped.q_raw[which][context]))
        return parts.draw_draft(law, draft_u[:, j])

    chain = draft_chain(setting, held, choose)
    places = chain.contexts_RK1
    return Seen(
        p=shaped.p[places],
        q=None if shaped.is_delta or not handed else torch.stack(handed, dim=1),
        draft=chain.tokens_RK,
        lens=chain.lens_R,
        draft_u=draft_u,
        accept_u=numbers(Stream.ACCEPT, setting.num_draft),
        next_u=numbers(Stream.RESIDUAL, 1)[:, 0],
        p_raw=shaped.p_raw[places],
        q_after=shaped.q[which][places[:, -1]],
    )


def chi_squared_excess(counts: Tensor, law: Tensor) -> float:
    """Chi-squared statistic over its p = 1e-9 limit (Wilson-Hilferty); above 1 the law is rejected.

    Cells with an expected count below 5 are pooled. A count where the law is 0 rejects immediately;
    if all cells are pooled, nothing else can reject.
    """
    if counts[law == 0].sum() > 0:
        return float("inf")
    expected = law * counts.sum()
    small = expected < 5
    observed = torch.cat((counts[~small], counts[small].sum()[None]))
    wanted = torch.cat((expected[~small], expected[small].sum()[None])).clamp(min=1e-9)
    statistic = ((observed - wanted) ** 2 / wanted).sum()
    df = max(1, len(wanted) - 1)
    limit = df * (1 - 2 / (9 * df) + 5.998 * (2 / (9 * df)) ** 0.5) ** 3
    return float(statistic / limit)


def law_excess(counts: Tensor, law: Tensor) -> float:
    """The largest ``chi_squared_excess`` of all three tokens, of the first two and of the last two.
    A bug in every round shows in the fewer cells of two tokens with a third of the samples."""
    both = counts, law
    pairs = [tuple(x.sum(dim=dim) for x in both) for dim in (0, 2)]
    return max(chi_squared_excess(*one) for one in (both, *pairs))
