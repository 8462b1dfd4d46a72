"""Verification of draft chains from logits in a few kernels; see ``specops.verify_logits``.

The rows' laws are computed first (``laws_triton``), then

* ``_judge``: p and q of each draft token, the draft tokens before the first unsound row, to which
  the chain is shortened, and pi of block verification;
* ``_overlap``, for dense drafts only: sums over v of min(p, q) and of min(pi p, q), part by part.
  It reads only the drafter's tokens, so a small draft vocabulary costs little;
* ``_stop``: where the chain stops, and the sums of the residual there, part by part;
* ``_emit``: the next token, and the log probabilities of the emitted tokens.

A certain draft token of a dense draft (``DraftLaw.certain_RK``) is judged as one of a delta draft,
and the kernels do not read its row of the drafter's logits.

The logits are read once, those of the K draft rows a second time for dense drafts, and one row of
each request once more. The host reads nothing back.

Shapes: R requests, K draft tokens, V target vocabulary, D draft vocabulary, P parts of a row.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from specops.draft_sampling import DraftLaw, RowLaws
from specops.laws_triton import (
    PER_REQUEST,
    TILES,
    Tiles,
    check_packed,
    choose_part,
    first_beyond,
    is_sound,
    join_rows,
    rate_of,
    uniform,
    weight,
)
from specops.rng import Numbering, Stream
from specops.sampling import SamplingRows
from specops.verify_logits import LogitVerdict, check_shapes

_PER_REQUEST = (
    *PER_REQUEST, "q_temperature_ptr", "q_greedy_ptr", "accepted_ptr", "next_ptr", "certain_ptr",
)  # fmt: skip


def _places(num_draft: int) -> int:
    """K + 1 rounded up; the same up to 15 draft tokens, so that they share one compiled kernel."""
    return max(16, int(triton.next_power_of_2(num_draft + 1)))


@triton.jit
def _log_weight(x, ids, top, cut, mass, last, rate):
    """Log probabilities of tokens under their rows' laws, float64."""
    is_kept = (x > cut) | ((x == cut) & (ids <= last))
    gap = tl.where(is_kept, x, top).to(tl.float64) - top.to(tl.float64)
    logp = gap * rate.to(tl.float64) - tl.log(mass.to(tl.float64))
    return tl.where(is_kept, logp, float("-inf"))


@triton.jit(do_not_specialize=["K"], do_not_specialize_on_alignment=_PER_REQUEST)
def _judge(
    logits_ptr, request_stride, row_stride, temperature_ptr, law_ptr, last_ptr, draft_ptr, lens_ptr,
    q_ptr, q_request_stride, q_row_stride, q_temperature_ptr, q_greedy_ptr, q_law_ptr, q_last_ptr,
    certain_ptr, t2d_ptr, logp_ptr, keep_ptr, pi_ptr, judged_ptr, K,
    K_UP: tl.constexpr, DENSE: tl.constexpr, HAS_MAP: tl.constexpr, Q_GREEDY: tl.constexpr,
    HAS_CERTAIN: tl.constexpr,
):  # fmt: skip
    """One request: log p of each draft token, how many of them are judged, the acceptance of each
    by the standard rule, and pi."""
    request = tl.program_id(0).to(tl.int64)
    place = tl.arange(0, K_UP)
    num_drafted = tl.load(lens_ptr + request)
    is_drafted = place < num_drafted
    token = tl.load(draft_ptr + request * K + place, mask=is_drafted, other=0)
    rate, _ = rate_of(temperature_ptr, temperature_ptr, request, False)
    row = request * (K + 1) + place
    at = logits_ptr + request * request_stride + place * row_stride + token
    x = tl.load(at, mask=is_drafted, other=0.0).to(tl.float32)
    top = tl.load(law_ptr + row * 3, mask=is_drafted, other=0.0)
    cut = tl.load(law_ptr + row * 3 + 1, mask=is_drafted, other=0.0)
    mass = tl.load(law_ptr + row * 3 + 2, mask=is_drafted, other=1.0)
    last = tl.load(last_ptr + row, mask=is_drafted, other=0)
    has_law = is_sound(top)
    top = tl.where(has_law, top, 0.0)
    logp = _log_weight(tl.where(has_law, x, 0.0), token, top, cut, mass, last, rate)
    logp = tl.where(has_law, logp, float("-inf"))
    ratio = logp
    if DENSE:
        own = token
        if HAS_MAP:
            own = tl.load(t2d_ptr + token, mask=is_drafted, other=0).to(tl.int64)
        q_rate, _ = rate_of(q_temperature_ptr, q_greedy_ptr, request, Q_GREEDY)
        row = request * K + place
        is_drawn = is_drafted
        if HAS_CERTAIN:  # log q of the others is 0
            is_drawn = is_drafted & (tl.load(certain_ptr + row, mask=is_drafted, other=0) == 0)
        at = q_ptr + request * q_request_stride + place * q_row_stride + own
        is_known = is_drawn & (own >= 0)
        x = tl.load(at, mask=is_known, other=0.0).to(tl.float32)
        top = tl.load(q_law_ptr + row * 3, mask=is_drawn, other=0.0)
        has_law = has_law & is_sound(top)
        top, x = tl.where(is_sound(top), top, 0.0), tl.where(is_sound(top), x, 0.0)
        mass = tl.load(q_law_ptr + row * 3 + 2, mask=is_drawn, other=1.0)
        # The token was sampled, so it survived truncation.
        logq = (x.to(tl.float64) - top.to(tl.float64)) * q_rate.to(tl.float64)
        ratio = logp - logq + tl.log(mass.to(tl.float64))
    tl.store(logp_ptr + request * K + place, tl.where(is_drafted, logp, 0.0), mask=place < K)
    num_judged = tl.min(tl.where(is_drafted & (has_law == 0), place, num_drafted), axis=0)
    tl.store(judged_ptr + request, num_judged.to(tl.int64))
    is_drafted = place < num_judged
    # pi_i = product of the ratios since it was last capped at 1.
    before = (place[None, :] <= place[:, None]) & is_drafted[None, :]
    steps = tl.sum(tl.where(before, ratio[None, :], 0.0), axis=1)
    on_row = tl.sum(tl.where(place[:, None] == place[None, :], steps[:, None], 0.0), axis=0)
    highest = tl.max(tl.where(before, on_row[None, :], 0.0), axis=1)
    pi = tl.exp(steps - tl.maximum(highest, 0.0))
    tl.store(keep_ptr + request * K + place, tl.exp(tl.minimum(ratio, 0.0)), mask=is_drafted)
    tl.store(pi_ptr + request * (K + 1) + 1 + place, pi, mask=is_drafted)
    tl.store(pi_ptr + request * (K + 1), tl.full((), 1.0, tl.float64))


@triton.jit(do_not_specialize=["K"], do_not_specialize_on_alignment=_PER_REQUEST)
def _overlap(
    logits_ptr, request_stride, row_stride, temperature_ptr, law_ptr, last_ptr, lens_ptr,
    q_ptr, q_request_stride, q_row_stride, q_temperature_ptr, q_greedy_ptr, q_law_ptr, q_last_ptr,
    certain_ptr, d2t_ptr, pi_ptr, overlap_ptr, draft_size, K, num_parts,
    PART: tl.constexpr, HAS_MAP: tl.constexpr, Q_GREEDY: tl.constexpr, HAS_CERTAIN: tl.constexpr,
):  # fmt: skip
    """One part of one drafted row: sums of min(p, q) and of min(pi p, q); nothing if the draft
    token is certain."""
    row, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    request, place = row // K, row % K
    if place >= tl.load(lens_ptr + request):
        return
    if HAS_CERTAIN:  # noqa: SIM102  (known when compiled; what is inside is not)
        if tl.load(certain_ptr + row) != 0:
            return
    own = part * PART + tl.arange(0, PART)
    is_own = own < draft_size
    q_at = q_ptr + request * q_request_stride + place * q_row_stride + own
    q_x = tl.load(q_at, mask=is_own, other=float("-inf")).to(tl.float32)
    ids = own.to(tl.int64)
    if HAS_MAP:
        ids += tl.load(d2t_ptr + own, mask=is_own, other=0)
    p_at = logits_ptr + request * request_stride + place * row_stride + ids
    p_x = tl.load(p_at, mask=is_own, other=float("-inf")).to(tl.float32)
    p_rate, _ = rate_of(temperature_ptr, temperature_ptr, request, False)
    q_rate, _ = rate_of(q_temperature_ptr, q_greedy_ptr, request, Q_GREEDY)
    p_row = request * (K + 1) + place
    p = weight(
        p_x, ids, tl.load(law_ptr + p_row * 3), tl.load(law_ptr + p_row * 3 + 1),
        tl.load(last_ptr + p_row), p_rate,
    ) / tl.load(law_ptr + p_row * 3 + 2)  # fmt: skip
    q = weight(
        q_x, own, tl.load(q_law_ptr + row * 3), tl.load(q_law_ptr + row * 3 + 1),
        tl.load(q_last_ptr + row), q_rate,
    ) / tl.load(q_law_ptr + row * 3 + 2)  # fmt: skip
    pi = tl.load(pi_ptr + p_row).to(tl.float32)
    slot = row * num_parts + part
    tl.store(overlap_ptr + slot * 2, tl.sum(tl.minimum(p, q), axis=0))
    tl.store(overlap_ptr + slot * 2 + 1, tl.sum(tl.minimum(pi * p, q), axis=0))


@triton.jit
def _left_over(
    request, stop, x, ids, token, num_drafted, pi, temperature_ptr, law_ptr, last_ptr,
    q_ptr, q_request_stride, q_row_stride, q_temperature_ptr, q_greedy_ptr, q_law_ptr, q_last_ptr,
    certain_ptr, t2d_ptr, vocab, K, DENSE: tl.constexpr, HAS_MAP: tl.constexpr,
    Q_GREEDY: tl.constexpr, HAS_CERTAIN: tl.constexpr,
):  # fmt: skip
    """p and max(pi p - q, 0) for one part of the row where a chain stopped."""
    row = request * (K + 1) + stop
    rate, _ = rate_of(temperature_ptr, temperature_ptr, request, False)
    p = weight(
        x, ids, tl.load(law_ptr + row * 3), tl.load(law_ptr + row * 3 + 1),
        tl.load(last_ptr + row), rate,
    ) / tl.load(law_ptr + row * 3 + 2)  # fmt: skip
    rest = p
    if stop < num_drafted:
        if DENSE:
            own = ids
            is_known = ids < vocab
            if HAS_MAP:
                own = tl.load(t2d_ptr + ids, mask=is_known, other=-1)
                is_known = own >= 0
            q_row = request * K + stop
            if HAS_CERTAIN:
                is_certain = tl.load(certain_ptr + q_row) != 0
                is_known = is_known & (is_certain == 0)
            at = q_ptr + request * q_request_stride + stop * q_row_stride + own
            q_x = tl.load(at, mask=is_known, other=float("-inf")).to(tl.float32)
            q_rate, _ = rate_of(q_temperature_ptr, q_greedy_ptr, request, Q_GREEDY)
            q_top = tl.load(q_law_ptr + q_row * 3)
            if HAS_CERTAIN:
                q_top = tl.where(is_certain, 0.0, q_top)  # infinite, as q_x is, in unsound rows
            q = weight(
                q_x, own, q_top, tl.load(q_law_ptr + q_row * 3 + 1), tl.load(q_last_ptr + q_row),
                q_rate,
            ) / tl.load(q_law_ptr + q_row * 3 + 2)  # fmt: skip
            q = tl.where(is_known, q, 0.0)
            rest = tl.maximum(pi.to(tl.float32) * p - q, 0.0)
            if HAS_CERTAIN:
                rest = tl.where(is_certain, tl.where(ids == token, 0.0, p), rest)
        else:
            rest = tl.where(ids == token, 0.0, p)
    return p, rest


@triton.jit(do_not_specialize=["K"], do_not_specialize_on_alignment=_PER_REQUEST)
def _stop(
    logits_ptr, request_stride, row_stride, temperature_ptr, law_ptr, last_ptr, draft_ptr, lens_ptr,
    q_ptr, q_request_stride, q_row_stride, q_temperature_ptr, q_greedy_ptr, q_law_ptr, q_last_ptr,
    certain_ptr, t2d_ptr, rules_ptr, keys_ptr, nonces_ptr, positions_ptr, own_ptr,
    logp_ptr, keep_ptr, pi_ptr, overlap_part_ptr, accepted_ptr, stop_pi_ptr, overlap_ptr,
    rest_ptr, vocab, K, num_parts, num_draft_parts,
    PART: tl.constexpr, K_UP: tl.constexpr, DRAFT_PARTS_UP: tl.constexpr, STREAM: tl.constexpr,
    DENSE: tl.constexpr, HAS_MAP: tl.constexpr, Q_GREEDY: tl.constexpr, HAS_CERTAIN: tl.constexpr,
):  # fmt: skip
    """One part of one request's vocabulary: where the chain stops, the same in all parts, and the
    sums of p and of the residual there."""
    request, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    place = tl.arange(0, K_UP)
    num_drafted = tl.load(lens_ptr + request)
    is_drafted = place < num_drafted
    rule = tl.load(rules_ptr + request)
    is_match = (rule == 0) | (tl.load(temperature_ptr + request) == 0)
    index = request * K + place
    logp = tl.load(logp_ptr + index, mask=is_drafted, other=0.0)
    overlap = tl.exp(logp)
    if DENSE:
        piece = tl.arange(0, DRAFT_PARTS_UP)
        slot = index[:, None] * num_draft_parts + piece[None, :]
        is_piece = is_drafted[:, None] & (piece < num_draft_parts)[None, :]
        if HAS_CERTAIN:
            is_certain = tl.load(certain_ptr + index, mask=is_drafted, other=1) != 0
            is_piece = is_piece & (is_certain == 0)[:, None]
        pieces = tl.load(overlap_part_ptr + slot * 2, mask=is_piece, other=0.0)
        overlap = tl.sum(pieces, axis=1)
        pieces = tl.load(overlap_part_ptr + slot * 2 + 1, mask=is_piece, other=0.0)
        common = tl.sum(pieces, axis=1)
        if HAS_CERTAIN:
            overlap = tl.where(is_certain, tl.exp(logp), overlap)
    number = uniform(
        tl.load(keys_ptr + request), tl.load(nonces_ptr + request),
        tl.load(positions_ptr + request) + place, STREAM,
    )  # fmt: skip
    if is_match:
        token = tl.load(draft_ptr + index, mask=is_drafted, other=0)
        own = tl.load(own_ptr + request * (K + 1) + place, mask=is_drafted, other=0)
        is_lost = is_drafted & (token != own)
        stop = tl.min(tl.where(is_lost, place, num_drafted), axis=0)
    elif rule == 1:
        keep = tl.load(keep_ptr + index, mask=is_drafted, other=1.0)
        is_lost = is_drafted & (number >= keep)
        stop = tl.min(tl.where(is_lost, place, num_drafted), axis=0)
    else:
        # Mass of max(pi p - q, 0) after 1 .. lens - 1 tokens, shifted by one: index i stands for
        # i + 1 tokens, whose mass comes from row i + 1.
        pi = tl.load(pi_ptr + request * (K + 1) + place, mask=place <= num_drafted, other=1.0)
        mass = pi * (1.0 - overlap.to(tl.float64))
        if DENSE:
            drawn = tl.maximum(pi - common.to(tl.float64), 0.0)
            mass = tl.where(is_certain, mass, drawn) if HAS_CERTAIN else drawn
        mass = tl.where(is_drafted, mass, 0.0)
        is_next = place[None, :] == place[:, None] + 1
        mass = tl.sum(tl.where(is_next, mass[None, :], 0.0), axis=1)
        is_inner = place + 1 < num_drafted
        pi = tl.load(pi_ptr + request * (K + 1) + 1 + place, mask=is_drafted, other=0.0)
        slack = tl.where(is_inner, mass + 1.0 - pi, 1.0)
        inner = tl.where(slack > 0, mass / tl.where(slack > 0, slack, 1.0), 1.0)
        chance = tl.where(is_inner, inner, pi)
        is_taken = is_drafted & (number < chance)
        stop = tl.max(tl.where(is_taken, place + 1, 0), axis=0).to(tl.int64)
    pi = tl.full((), 1.0, tl.float64)
    if rule == 2:
        pi = tl.load(pi_ptr + request * (K + 1) + stop)
    if part == 0:
        tl.store(accepted_ptr + request, stop)
        tl.store(stop_pi_ptr + request, pi)
        tl.store(overlap_ptr + index, tl.where(is_drafted, overlap, 0.0), mask=place < K)
    has_law = is_sound(tl.load(law_ptr + (request * (K + 1) + stop) * 3))
    if is_match | (has_law == 0):
        return
    ids = part * PART + tl.arange(0, PART)
    at = logits_ptr + request * request_stride + stop * row_stride + ids
    x = tl.load(at, mask=ids < vocab, other=float("-inf")).to(tl.float32)
    token = tl.load(draft_ptr + request * K + stop, mask=stop < num_drafted, other=0)
    p, rest = _left_over(
        request, stop, x, ids, token, num_drafted, pi, temperature_ptr, law_ptr, last_ptr,
        q_ptr, q_request_stride, q_row_stride, q_temperature_ptr, q_greedy_ptr, q_law_ptr,
        q_last_ptr, certain_ptr, t2d_ptr, vocab, K, DENSE, HAS_MAP, Q_GREEDY, HAS_CERTAIN,
    )  # fmt: skip
    slot = request * num_parts + part
    tl.store(rest_ptr + slot * 2, tl.sum(p, axis=0))
    tl.store(rest_ptr + slot * 2 + 1, tl.sum(rest, axis=0))


@triton.jit(do_not_specialize=["K"], do_not_specialize_on_alignment=_PER_REQUEST)
def _emit(
    logits_ptr, request_stride, row_stride, temperature_ptr, law_ptr, last_ptr, draft_ptr, lens_ptr,
    q_ptr, q_request_stride, q_row_stride, q_temperature_ptr, q_greedy_ptr, q_law_ptr, q_last_ptr,
    certain_ptr, t2d_ptr, rules_ptr, keys_ptr, nonces_ptr, positions_ptr, own_ptr,
    accepted_ptr, stop_pi_ptr, rest_ptr, stats_ptr, next_ptr, logprob_ptr, entropy_ptr,
    vocab, K, num_parts,
    PART: tl.constexpr, K_UP: tl.constexpr, PARTS_UP: tl.constexpr, STREAM: tl.constexpr,
    DENSE: tl.constexpr, HAS_MAP: tl.constexpr, Q_GREEDY: tl.constexpr, HAS_CERTAIN: tl.constexpr,
    PLAIN: tl.constexpr,
):  # fmt: skip
    """One request: its next token, and the log probabilities of the emitted tokens."""
    request = tl.program_id(0).to(tl.int64)
    num_drafted = tl.load(lens_ptr + request)
    stop = tl.load(accepted_ptr + request)
    rule = tl.load(rules_ptr + request)
    is_match = (rule == 0) | (tl.load(temperature_ptr + request) == 0)
    # Of a row without a law: UNSOUND.
    following = tl.load(own_ptr + request * (K + 1) + stop).to(tl.int64)
    if (not is_match) & (following >= 0):
        piece = tl.arange(0, PARTS_UP)
        is_part = piece < num_parts
        slot = request * num_parts + piece
        shares = tl.load(rest_ptr + slot * 2 + 1, mask=is_part, other=0.0)
        is_left = tl.sum(shares, axis=0) > 0
        if not is_left:  # p equals q up to rounding: p keeps the row finite
            shares = tl.load(rest_ptr + slot * 2, mask=is_part, other=0.0)
        number = uniform(
            tl.load(keys_ptr + request), tl.load(nonces_ptr + request),
            tl.load(positions_ptr + request), STREAM,
        )  # fmt: skip
        part, portion = choose_part(shares, number, PARTS_UP)
        index = tl.arange(0, PART)
        ids = part * PART + index
        at = logits_ptr + request * request_stride + stop * row_stride + ids
        x = tl.load(at, mask=ids < vocab, other=float("-inf")).to(tl.float32)
        token = tl.load(draft_ptr + request * K + stop, mask=stop < num_drafted, other=0)
        p, rest = _left_over(
            request, stop, x, ids, token, num_drafted, tl.load(stop_pi_ptr + request),
            temperature_ptr, law_ptr, last_ptr, q_ptr, q_request_stride, q_row_stride,
            q_temperature_ptr, q_greedy_ptr, q_law_ptr, q_last_ptr, certain_ptr, t2d_ptr, vocab, K,
            DENSE, HAS_MAP, Q_GREEDY, HAS_CERTAIN,
        )  # fmt: skip
        weights = tl.where(is_left, rest, p).to(tl.float64)
        inside = first_beyond(weights, portion * tl.sum(weights, axis=0), PART)
        following = (part * PART + inside).to(tl.int64)
    tl.store(next_ptr + request, following)
    if PLAIN:
        place = tl.arange(0, K_UP)
        row = request * (K + 1) + place
        is_row = place <= K
        is_emitted = place <= stop
        token = tl.load(draft_ptr + request * K + place, mask=place < stop, other=0)
        token = tl.where(place == stop, tl.maximum(following, 0), token)
        at = logits_ptr + request * request_stride + place * row_stride + token
        x = tl.load(at, mask=is_emitted, other=0.0).to(tl.float32)
        log_sum = tl.load(stats_ptr + row * 2, mask=is_emitted, other=0.0)
        tl.store(logprob_ptr + row, tl.where(is_emitted, x - log_sum, 0.0), mask=is_row)
        entropy = tl.load(stats_ptr + row * 2 + 1, mask=is_row, other=0.0)
        tl.store(entropy_ptr + row, entropy, mask=is_row)


def verify_logits(
    logits_RK1V: Tensor,
    sampling: SamplingRows,
    draft_RK: Tensor,
    lens_R: Tensor,
    rules_R: Tensor,
    numbering: Numbering,
    drafted: DraftLaw | None = None,
    with_logprobs: bool = True,
    tiles: Tiles = TILES,
) -> LogitVerdict:
    """See ``specops.verify_logits.verify_logits``, which has the same arguments and result. Can be
    captured in a CUDA graph, which fixes K, ``sampling.truncates``, whether drafts are dense and
    whether some may be certain; all other parameters are read at each replay.

    Args:
        draft_RK, lens_R, rules_R: contiguous.
        drafted: ``laws`` from ``sample_draft`` save one pass over its logits.

    Raises:
        ValueError: shapes do not match, or a row of logits or another tensor is not contiguous.
    """
    check_shapes(logits_RK1V, draft_RK, lens_R, rules_R, drafted)
    check_packed(sampling, numbering, draft=draft_RK, lens=lens_R, rules=rules_R)
    if drafted is not None:
        check_packed(drafted.sampling, None, greedy=drafted.greedy_R, certain=drafted.certain_RK)
    return _launch(
        logits_RK1V, sampling, draft_RK, lens_R, rules_R, numbering, drafted, with_logprobs, tiles
    )[0]


@dataclass(frozen=True, slots=True)
class _Steps:
    """Intermediate results that the kernels share."""

    keep_RK: Tensor
    """[R, K] float64, acceptance of each draft token by the standard rule."""
    pi_RK1: Tensor
    """[R, K + 1] float64, pi of block verification."""
    common_RKP2: Tensor | None
    """[R, K, P, 2] sums of min(p, q) and min(pi p, q), not written where the draft token is
    certain; ``None`` for delta drafts."""
    rest_RP2: Tensor
    """[R, P, 2] sums of p and of the residual where the chain stopped."""


def _launch(
    logits_RK1V: Tensor,
    sampling: SamplingRows,
    draft_RK: Tensor,
    lens_R: Tensor,
    rules_R: Tensor,
    numbering: Numbering,
    drafted: DraftLaw | None,
    with_logprobs: bool,
    tiles: Tiles,
) -> tuple[LogitVerdict, _Steps]:
    num_requests, num_draft = draft_RK.shape
    vocab_size = logits_RK1V.shape[-1]
    tiles = tiles.within(vocab_size)
    device = logits_RK1V.device
    joined = join_rows(
        logits_RK1V, sampling, None, lens_R, rules_R, numbering, Stream.TARGET, 1, with_logprobs,
        tiles,
    )  # fmt: skip

    def scratch(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty((num_requests, *shape), dtype=dtype, device=device)

    parts = triton.cdiv(vocab_size, tiles.part)
    accepted, following = scratch(dtype=torch.int64), scratch(dtype=torch.int64)
    logp, overlap = scratch(num_draft), scratch(num_draft)
    logprob = scratch(num_draft + 1) if with_logprobs else None
    entropy = scratch(num_draft + 1) if with_logprobs else None
    verdict = LogitVerdict(accepted, following, logp, overlap, logprob, entropy)
    keep, pi = scratch(num_draft, dtype=torch.float64), scratch(num_draft + 1, dtype=torch.float64)
    stop_pi, rest = scratch(dtype=torch.float64), scratch(parts, 2)
    laws = (joined.laws.tops_cuts_masses, joined.laws.lasts)
    target = (
        logits_RK1V, logits_RK1V.stride(0), logits_RK1V.stride(1), sampling.temperature_R, *laws,
    )  # fmt: skip
    is_dense = drafted is not None and num_draft > 0
    q, d2t, t2d, draft_size = _draft_arguments(drafted if is_dense else None, lens_R, tiles)
    kinds = {
        "DENSE": is_dense,
        "HAS_MAP": d2t is not None,
        "Q_GREEDY": q[4] is not None,
        "HAS_CERTAIN": q[7] is not None,
    }
    k_up = _places(num_draft)
    draft_parts = triton.cdiv(draft_size, tiles.part)
    overlap_parts = scratch(num_draft, draft_parts, 2) if is_dense else None
    steps = _Steps(keep, pi, overlap_parts, rest)
    if not num_requests:
        return verdict, steps
    judged = scratch(dtype=torch.int64)
    _judge[(num_requests,)](
        *target, draft_RK, lens_R, *q, t2d, logp, keep, pi, judged, num_draft, **kinds, K_UP=k_up,
        num_warps=1,
    )  # fmt: skip
    drafts = (draft_RK, judged)
    if is_dense:
        of_rows = {name: kinds[name] for name in ("HAS_MAP", "Q_GREEDY", "HAS_CERTAIN")}
        _overlap[(num_requests * num_draft, draft_parts)](
            *target, judged, *q, d2t, pi, overlap_parts, draft_size, num_draft, draft_parts,
            **of_rows, PART=tiles.part, num_warps=2 * tiles.part_warps,
        )  # fmt: skip
    numbers = (numbering.keys_R, numbering.nonces_R, numbering.positions_R)
    _stop[(num_requests, parts)](
        *target, *drafts, *q, t2d, rules_R, *numbers, joined.own_N, logp, keep, pi, overlap_parts,
        accepted, stop_pi, overlap, rest, vocab_size, num_draft, parts, draft_parts,
        **kinds, PART=tiles.part, K_UP=k_up, DRAFT_PARTS_UP=triton.next_power_of_2(draft_parts),
        STREAM=int(Stream.ACCEPT), num_warps=tiles.part_warps,
    )  # fmt: skip
    _emit[(num_requests,)](
        *target, *drafts, *q, t2d, rules_R, *numbers, joined.own_N, accepted, stop_pi, rest,
        joined.stats_N2, following, logprob, entropy, vocab_size, num_draft, parts,
        **kinds, PART=tiles.part, K_UP=k_up, PARTS_UP=triton.next_power_of_2(parts),
        STREAM=int(Stream.RESIDUAL), PLAIN=with_logprobs, num_warps=tiles.part_warps,
    )  # fmt: skip
    return verdict, steps


def _draft_arguments(
    drafted: DraftLaw | None, lens_R: Tensor, tiles: Tiles
) -> tuple[tuple[object, ...], Tensor | None, Tensor | None, int]:
    """Kernel arguments: logits, strides, temperature, greedy flags and laws of q, and where it is
    certain; both maps; D."""
    if drafted is None:
        return (None, 0, 0, None, None, None, None, None), None, None, 1
    logits = drafted.logits_RKD
    laws: RowLaws | None = drafted.laws
    if laws is None:
        laws = join_rows(
            logits, drafted.sampling, drafted.greedy_R, lens_R, None, None, Stream.DRAFT, 0, False,
            tiles,
        ).laws  # fmt: skip
    q = (
        logits, logits.stride(0), logits.stride(1), drafted.sampling.temperature_R,
        drafted.greedy_R, laws.tops_cuts_masses, laws.lasts, drafted.certain_RK,
    )  # fmt: skip
    vocab = drafted.vocab
    maps = (None, None) if vocab is None else (vocab.d2t_D, vocab.t2d_V)
    return q, *maps, logits.shape[-1]
