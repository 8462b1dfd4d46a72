"""The sampling distribution (law) of rows of logits, without writing probabilities.

The vocabulary is split into parts. One program per part computes its largest logit and its sum of
weights. A second kernel combines the parts of a row, finds the cut of a truncated row, and samples
a token if one is needed.

The target's own tokens of seeded requests win a race (``sampling.race``): each part finds its
winner, and the second kernel the row's, whose parts it races itself if the row is truncated. The
maximum is the same in any order, so the winner depends on the row and its numbers alone.

A draft token is sampled by inverting the cumulative sum at one 53-bit number, as ``sampling.draw``
does: first the part, then the token within it. Sums over parts and within the chosen part are
float64, so the tail is sampled at its true rate; a part's own sum is float32, which scales all of
its tokens alike.

A row whose largest logit is NaN or infinite has no law: ``top`` is then infinite, and its token is
``UNSOUND``.

The cut: the tokens that survive min-p and top-k, and then those that survive top-p, are a prefix of
the order (logit descending, id ascending). The last surviving logit is found by bisection between
two logits of the row. After each pass over the row, the bounds move to the nearest existing logits,
until one program can hold the rest in registers.

Shapes: N rows of logits, R requests with ``per`` rows each, P parts of a row, S stretches of a
part.
"""

from __future__ import annotations

from dataclasses import astuple, dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from specops.draft_sampling import Instead, RowLaws
from specops.overlap_triton import let_next_start, wait_for_previous
from specops.rng import Numbering, Stream
from specops.sampling import SamplingRows
from specops.verify_logits import UNSOUND


@dataclass(frozen=True, slots=True)
class Tiles:
    """Sizes of the pieces that programs process; all powers of two."""

    part: int = 4096
    """Tokens of one part of a row."""
    stretch: int = 1024
    """Tokens whose maximum is kept: the k-th largest of a row's maxima bounds its top-k."""
    sweep: int = 8192
    """Tokens read at once by the program that finds a row's cut."""
    held: int = 4096
    """Maximum number of candidates for the cut held in registers."""

    def within(self, vocab_size: int) -> Tiles:
        """Limit the sizes to a small vocabulary; otherwise each row takes 32 KB of scratch."""
        most = max(16, int(triton.next_power_of_2(vocab_size)))
        return Tiles(*(min(size, most) for size in astuple(self)))

    @property
    def part_warps(self) -> int:
        return max(1, min(4, self.part // 512))

    @property
    def sweep_warps(self) -> int:
        return max(1, min(16, self.sweep // 512))


TILES = Tiles()
PER_REQUEST = (
    "temperature_ptr", "greedy_ptr", "lens_ptr", "rules_ptr",
    "top_k_ptr", "top_p_ptr", "min_p_ptr", "keys_ptr", "nonces_ptr", "positions_ptr",
)  # fmt: skip
"""One number per request, read individually. They are fields of one matrix, so their alignment
depends on the batch size: specialised on it, a kernel would be compiled three times."""
_GAMMA = tl.constexpr(0x9E3779B97F4A7C15)
_UNSOUND = tl.constexpr(UNSOUND)
_LOWEST = tl.constexpr(-3.0e38)  # below every finite logit that a model computes


@triton.jit
def _mix(x):
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB
    return x ^ (x >> 31)


@triton.jit
def word_of(key, nonce, position, STREAM: tl.constexpr):
    """64 bits for a purpose and a position, from which its numbers are mixed."""
    gamma = tl.full((), _GAMMA, tl.uint64)
    state = _mix(key.to(tl.uint64) + gamma * tl.full((), STREAM, tl.uint64))
    state = _mix(state + gamma * (nonce + 1).to(tl.uint64))
    return _mix(state + gamma * (position + 1).to(tl.uint64))


@triton.jit
def exponential(word, ids):
    """``rng.device_exponentials`` in float32, accurate to 1e-6 of each number: what is near 0
    decides the race, so it is computed as a series there."""
    bits = _mix(word + tl.full((), _GAMMA, tl.uint64) * (ids + 1).to(tl.uint64)) >> 12
    v = (bits.to(tl.int64).to(tl.float32) + 0.5) * 2.220446049250313e-16  # 2**-52
    rest = (0xFFFFFFFFFFFFF - bits.to(tl.int64)).to(tl.float32) + 0.5
    series = v * (1 + v * (1 / 2 + v * (1 / 3 + v * (1 / 4 + v * (1 / 5 + v / 6)))))
    return tl.where(v < 0.0625, series, -tl.log(rest * 2.220446049250313e-16))


@triton.jit
def uniform(key, nonce, position, STREAM: tl.constexpr):
    """``rng.uniforms`` for int64 scalars or tensors, float64."""
    word = word_of(key, nonce, position, STREAM)
    return (_mix(word) >> 11).to(tl.float64) * 1.1102230246251565e-16  # 2**-53


@triton.jit
def is_sound(top):
    """Whether a row with this largest logit has a law."""
    return tl.abs(top) < float("inf")


@triton.jit
def _above_nan(x):
    """Infinity in place of NaN, which a maximum would skip."""
    return tl.where(x != x, float("inf"), x)


@triton.jit
def _difference(x, top):
    """x - top, kept finite for infinite x, so that 0 times it is 0."""
    return tl.maximum(x - top, -1e30)


@triton.jit
def weight(x, ids, top, cut, last, rate):
    """Unnormalised probabilities of logits under a row's law; ``rate`` is 1 / temperature."""
    is_kept = (x > cut) | ((x == cut) & (ids <= last))
    return tl.where(is_kept, tl.exp((x - top) * rate), 0.0)


@triton.jit
def rate_of(temperature_ptr, greedy_ptr, request, HAS_GREEDY: tl.constexpr):
    """(1 / temperature, is greedy); greedy rows have rate 1."""
    temperature = tl.load(temperature_ptr + request).to(tl.float32)
    is_greedy = temperature == 0
    if HAS_GREEDY:
        is_greedy = is_greedy | (tl.load(greedy_ptr + request) != 0)
    return 1.0 / tl.where(is_greedy, 1.0, temperature), is_greedy


@triton.jit
def first_beyond(weights, threshold, SIZE: tl.constexpr):
    """Index of the first float64 weight whose cumulative sum exceeds the threshold; the last
    nonzero weight if rounding leaves none. Never an index of weight 0 unless all are 0."""
    index = tl.arange(0, SIZE)
    sums = tl.cumsum(weights, 0)
    has_weight = weights > 0
    found = tl.min(tl.where(has_weight & (sums > threshold), index, SIZE), axis=0)
    fallback = tl.max(tl.where(has_weight, index, 0), axis=0)
    return tl.minimum(found, fallback)


@triton.jit
def choose_part(shares, number, SIZE: tl.constexpr):
    """The part that the number falls into, and how far into that part's share, in 0..1."""
    index = tl.arange(0, SIZE)
    shares = shares.to(tl.float64)
    threshold = number * tl.sum(shares, axis=0)
    part = first_beyond(shares, threshold, SIZE)
    before = tl.sum(tl.where(index < part, shares, 0.0), axis=0)
    own = tl.sum(tl.where(index == part, shares, 0.0), axis=0)
    return part, (threshold - before) / own


@triton.jit
def _is_cut(top_k_ptr, top_p_ptr, min_p_ptr, request, vocab):
    """Whether a request's rows are truncated."""
    top_k, top_p = tl.load(top_k_ptr + request), tl.load(top_p_ptr + request)
    return (top_k < vocab) | (top_p < 1) | (tl.load(min_p_ptr + request) > 0)


@triton.jit
def _winner(ratio, ids, vocab):
    """The largest ratio of a race, and the lowest id that has it."""
    best = tl.max(ratio, axis=0)
    return best, tl.min(tl.where(ratio == best, ids, vocab), axis=0)


@triton.jit(do_not_specialize=["per"], do_not_specialize_on_alignment=PER_REQUEST)
def _split_rows(
    logits_ptr, request_stride, row_stride, temperature_ptr, greedy_ptr, lens_ptr,
    top_k_ptr, top_p_ptr, min_p_ptr, rules_ptr, keys_ptr, nonces_ptr, positions_ptr,
    part_top_ptr, stretch_top_ptr, best_ptr, sum_ptr, plain_ptr, ratio_ptr, winner_ptr,
    vocab, num_parts, per,
    EXTRA: tl.constexpr, PART: tl.constexpr, STRETCH: tl.constexpr, STREAM: tl.constexpr,
    HAS_GREEDY: tl.constexpr, HAS_LENS: tl.constexpr, PLAIN: tl.constexpr,
    TRUNCATES: tl.constexpr, RACES: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """One part of one row: its largest logit, that logit's lowest id, the sum of weights, and the
    winner of its race if the row is raced and not truncated."""
    if OVERLAP:
        let_next_start()
        wait_for_previous()
    row, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    request, place = row // per, row % per
    if HAS_LENS:  # noqa: SIM102  (known when compiled; what is inside is not)
        if place >= tl.load(lens_ptr + request) + EXTRA:
            return
    stretch = tl.arange(0, PART // STRETCH)
    ids = part * PART + stretch[:, None] * STRETCH + tl.arange(0, STRETCH)[None, :]
    at = logits_ptr + request * request_stride + place * row_stride + ids
    x = _above_nan(tl.load(at, mask=ids < vocab, other=float("-inf")).to(tl.float32))
    stretch_top = tl.max(x, axis=1)
    top = tl.max(stretch_top, axis=0)
    best = tl.min(tl.min(tl.where(x == top, ids, vocab), axis=1), axis=0)
    z = _difference(x, tl.where(is_sound(top), top, 0.0))
    rate, is_greedy = rate_of(temperature_ptr, greedy_ptr, request, HAS_GREEDY)
    slot = row * num_parts + part
    total = 1.0
    if PLAIN:
        plain = tl.exp(z)
        plain_total = tl.sum(tl.sum(plain, axis=1), axis=0)
        slope = tl.sum(tl.sum(plain * z, axis=1), axis=0)
        tl.store(plain_ptr + slot * 2, plain_total)
        tl.store(plain_ptr + slot * 2 + 1, slope)
        total = plain_total
        if rate != 1.0:
            total = tl.sum(tl.sum(tl.exp(z * rate), axis=1), axis=0)
    else:
        if not is_greedy:
            total = tl.sum(tl.sum(tl.exp(z * rate), axis=1), axis=0)
    tl.store(part_top_ptr + slot, top)
    tl.store(best_ptr + slot, best)
    tl.store(sum_ptr + slot, total)
    if RACES:
        is_raced = (not is_greedy) & (tl.load(rules_ptr + request) == 0)
        if TRUNCATES:
            is_raced = is_raced & (not _is_cut(top_k_ptr, top_p_ptr, min_p_ptr, request, vocab))
        if is_raced:
            word = word_of(
                tl.load(keys_ptr + request), tl.load(nonces_ptr + request),
                tl.load(positions_ptr + request) + place, STREAM,
            )  # fmt: skip
            flat = tl.reshape(ids, [PART])
            weights = tl.reshape(tl.exp(z * rate), [PART])
            ratio, winner = _winner(weights / exponential(word, flat), flat, vocab)
            tl.store(ratio_ptr + slot, ratio)
            tl.store(winner_ptr + slot, winner)
    if TRUNCATES:
        tl.store(stretch_top_ptr + slot * (PART // STRETCH) + stretch, stretch_top)


@triton.jit
def _load(row_ptr, start, vocab, SWEEP: tl.constexpr):
    ids = start + tl.arange(0, SWEEP)
    x = tl.load(row_ptr + ids, mask=ids < vocab, other=float("-inf")).to(tl.float32)
    return ids, x


@triton.jit
def _sweep(row_ptr, vocab, pivot, top, rate, SWEEP: tl.constexpr):
    """Count, weight (float64) and minimum of the logits above the pivot, and the maximum of the
    others."""
    count = tl.zeros([SWEEP], tl.int32)
    mass = tl.zeros([SWEEP], tl.float32)
    least = tl.full([SWEEP], float("inf"), tl.float32)
    greatest = tl.full([SWEEP], float("-inf"), tl.float32)
    for start in tl.range(0, vocab, SWEEP, num_stages=3):
        ids = start + tl.arange(0, SWEEP)
        x = tl.load(row_ptr + ids, mask=ids < vocab, other=float("-inf")).to(tl.float32)
        is_above = x > pivot
        count += is_above.to(tl.int32)
        mass += tl.where(is_above, tl.exp(tl.maximum(x - top, -1e30) * rate), 0.0)
        least = tl.minimum(least, tl.where(is_above, x, float("inf")))
        greatest = tl.maximum(greatest, tl.where(is_above, float("-inf"), x))
    return (
        tl.sum(count, axis=0), tl.sum(mass.to(tl.float64), axis=0),
        tl.min(least, axis=0), tl.max(greatest, axis=0),
    )  # fmt: skip


@triton.jit
def _gather(
    row_ptr, vocab, lo, hi, held_ptr, held_ids_ptr, SWEEP: tl.constexpr, HELD: tl.constexpr
):
    """Write the first HELD logits in lo..hi and their ids, in id order. Returns the count and the
    minimum of all of them."""
    tl.debug_barrier()  # the previous candidates have been read
    count = 0
    least = tl.full([SWEEP], float("inf"), tl.float32)
    for start in tl.range(0, vocab, SWEEP, num_stages=3):
        ids = start + tl.arange(0, SWEEP)
        x = tl.load(row_ptr + ids, mask=ids < vocab, other=float("-inf")).to(tl.float32)
        is_wanted = (x >= lo) & (x <= hi)
        slot = count + tl.cumsum(is_wanted.to(tl.int32), 0) - 1
        fits = is_wanted & (slot < HELD)
        tl.store(held_ptr + slot, x, mask=fits)
        tl.store(held_ids_ptr + slot, ids, mask=fits)
        count += tl.sum(is_wanted.to(tl.int32), axis=0)
        least = tl.minimum(least, tl.where(is_wanted, x, float("inf")))
    tl.debug_barrier()  # what other threads wrote is visible
    return count, tl.min(least, axis=0)


@triton.jit
def _between(lo, hi):
    """A pivot with lo <= pivot < hi."""
    pivot = 0.5 * lo + 0.5 * hi
    return tl.where((pivot >= lo) & (pivot < hi), pivot, lo)


@triton.jit
def _least_within(x, lo, hi, base, limit, top, rate):
    """The least held logit for which the weight above it, plus ``base``, is below the limit. It
    lies in lo..hi, both held. At rate 0 every logit weighs 1."""
    weights = tl.where(x > float("-inf"), tl.exp(_difference(x, top) * rate), 0.0)
    tries = 0
    while (lo < hi) & (tries < 100):
        pivot = _between(lo, hi)
        is_above = x > pivot
        above = base + tl.sum(tl.where(is_above, weights, 0.0), axis=0).to(tl.float64)
        greatest = tl.max(tl.where(is_above, float("-inf"), x), axis=0)
        least = tl.min(tl.where(is_above, x, float("inf")), axis=0)
        is_less = above < limit
        hi = tl.where(is_less, greatest, hi)
        lo = tl.where(is_less, lo, least)
        tries += 1
    return hi


@triton.jit
def _find_cut(
    row_ptr, vocab, lo, count, top, search_rate, limit, held_ptr, held_ids_ptr,
    SWEEP: tl.constexpr, HELD: tl.constexpr,
):  # fmt: skip
    """The least logit above which the weight is below the limit, and how many logits are now held
    (more than HELD if they are all equal). ``count`` logits from ``lo`` up were gathered; ``lo`` is
    a logit of the row."""
    hi = top
    base = tl.full((), 0.0, tl.float64)
    from_lo = count
    above_hi = 0
    if count > HELD:
        tries = 0
        while (count > HELD) & (lo < hi) & (tries < 100):
            pivot = _between(lo, hi)
            num_above, above, least, greatest = _sweep(
                row_ptr, vocab, pivot, top, search_rate, SWEEP
            )
            is_less = above < limit
            hi = tl.where(is_less, greatest, hi)
            base = tl.where(is_less, above, base)
            above_hi = tl.where(is_less, num_above, above_hi)
            lo = tl.where(is_less, lo, least)
            from_lo = tl.where(is_less, from_lo, num_above)
            count = from_lo - above_hi
            tries += 1
        _gather(row_ptr, vocab, lo, hi, held_ptr, held_ids_ptr, SWEEP, HELD)
    index = tl.arange(0, HELD)
    x = tl.load(held_ptr + index, mask=index < count, other=float("-inf"))
    return _least_within(x, lo, hi, base, limit, top, search_rate), count


@triton.jit
def _above_cut(
    row_ptr, vocab, cut, count, is_whole, top, rate, held_ptr, SWEEP: tl.constexpr,
    HELD: tl.constexpr,
):  # fmt: skip
    """Count and weight of the logits above the cut, and the number equal to it. ``is_whole``: all
    logits from the cut up are held."""
    index = tl.arange(0, HELD)
    x = tl.load(held_ptr + index, mask=index < count, other=float("-inf"))
    ties = tl.where(count > HELD, count, tl.sum((x == cut).to(tl.int32), axis=0))
    is_above = x > cut
    num_above = tl.sum(is_above.to(tl.int32), axis=0)
    held_mass = tl.sum(tl.where(is_above, tl.exp(_difference(x, top) * rate), 0.0), axis=0)
    mass = held_mass.to(tl.float64)
    if not is_whole:
        num_above, mass, _, _ = _sweep(row_ptr, vocab, cut, top, rate, SWEEP)
    return num_above, mass, ties


@triton.jit
def _last_tie(
    row_ptr, vocab, cut, num_kept, ties, count, held_ptr, held_ids_ptr, SWEEP: tl.constexpr,
    HELD: tl.constexpr,
):  # fmt: skip
    """The last kept id among logits equal to the cut; the vocabulary size if all are kept."""
    last = vocab
    if num_kept < ties:
        if count <= HELD:
            index = tl.arange(0, HELD)
            x = tl.load(held_ptr + index, mask=index < count, other=float("-inf"))
            ids = tl.load(held_ids_ptr + index, mask=index < count, other=0)
            is_tie = x == cut
            rank = tl.cumsum(is_tie.to(tl.int32), 0)
            last = tl.max(tl.where(is_tie & (rank <= num_kept), ids, -1), axis=0)
        else:
            seen = 0
            last = -1
            for start in range(0, vocab, SWEEP):
                ids, x = _load(row_ptr, start, vocab, SWEEP)
                is_tie = x == cut
                rank = seen + tl.cumsum(is_tie.to(tl.int32), 0)
                kept = tl.where(is_tie & (rank <= num_kept), ids, -1)
                last = tl.maximum(last, tl.max(kept, axis=0))
                seen += tl.sum(is_tie.to(tl.int32), axis=0)
    return last


@triton.jit
def _truncated(
    row_ptr, vocab, top, mass, temperature, rate, top_k, top_p, min_p,
    stretch_top_ptr, num_stretches, held_ptr, held_ids_ptr,
    STRETCHES_UP: tl.constexpr, SWEEP: tl.constexpr, HELD: tl.constexpr,
):  # fmt: skip
    """Cut, last id at the cut and mass of a row under min-p and top-k, then top-p.

    One loop body finds both in two iterations: written out one after the other, they take twice as
    long to compile.
    """
    cut = _LOWEST + 0.0 * top
    last = vocab
    total = mass.to(tl.float64)
    count = 0
    is_whole = tl.full((), False, tl.int1)
    floor = cut
    if min_p > 0:
        floor = tl.maximum(floor, tl.minimum(top, top + temperature * tl.log(min_p)))
    num_ties_kept = vocab
    for turn in tl.range(0, 2, num_stages=1):
        by_mass = turn == 1
        is_wanted = (top_k < vocab) | (min_p > 0)
        if by_mass:
            is_wanted = top_p < 1
        if is_wanted:
            limit = top_k.to(tl.float64)
            if by_mass:
                limit = top_p.to(tl.float64) * total
                # Logits below this are not needed to reach p: V of them weigh less than 1 - p.
                bound = tl.log(total.to(tl.float32) * (1 - top_p) / vocab) * temperature + top
                bound -= 1e-3 * temperature + 1e-5 * tl.abs(top)
                floor = tl.minimum(top, tl.maximum(cut, bound))
            else:
                # The k-th largest stretch maximum is a lower bound: k logits are at least as large.
                stretch = tl.arange(0, STRETCHES_UP)
                is_stretch = stretch < num_stretches
                tops = tl.load(stretch_top_ptr + stretch, mask=is_stretch, other=float("-inf"))
                if top_k <= tl.sum((tops > _LOWEST).to(tl.int32), axis=0):
                    lowest = tl.min(tl.where(tops > _LOWEST, tops, float("inf")), axis=0)
                    none = tl.full((), 0.0, tl.float64)
                    bound = _least_within(tops, lowest, top, none, limit, top, 0.0)
                    floor = tl.maximum(floor, bound)
            least = cut
            if not is_whole:
                count, least = _gather(
                    row_ptr, vocab, floor, top, held_ptr, held_ids_ptr, SWEEP, HELD
                )
                is_whole = count <= HELD
            num_from_least = count
            found = least
            is_cut = by_mass | (top_k < count)
            if is_cut:
                search_rate = tl.where(by_mass, rate, 0.0)
                found, count = _find_cut(
                    row_ptr, vocab, least, count, top, search_rate, limit, held_ptr, held_ids_ptr,
                    SWEEP, HELD,
                )  # fmt: skip
            num_above, above, ties = _above_cut(
                row_ptr, vocab, found, count, is_whole, top, rate, held_ptr, SWEEP, HELD
            )
            each = tl.exp((found - top) * rate).to(tl.float64)
            num_kept = num_from_least - num_above
            if by_mass:
                wanted = tl.minimum((limit - above) / tl.maximum(each, 1e-300), ties.to(tl.float64))
                num_kept = wanted.to(tl.int32)
                num_kept += (num_kept.to(tl.float64) < wanted).to(tl.int32)
                num_kept = tl.maximum(num_kept, 1)
                if found == cut:
                    num_kept = tl.minimum(num_kept, num_ties_kept)
            elif is_cut:
                num_kept = tl.minimum(ties, top_k.to(tl.int32) - num_above)
            if is_cut:
                num_ties_kept = num_kept
                last = _last_tie(
                    row_ptr, vocab, found, num_kept, ties, count, held_ptr, held_ids_ptr,
                    SWEEP, HELD,
                )  # fmt: skip
            cut = found
            total = above + num_kept.to(tl.float64) * each
    return cut, last, total.to(tl.float32)


@triton.jit
def _mass_by_part(
    row_ptr, vocab, num_parts, top, cut, last, rate, sums_ptr, part_top_ptr, PART: tl.constexpr
):
    """Replace the sums of a row's parts by the sums of the tokens that are kept."""
    tl.debug_barrier()  # the previous sums have been read
    for part in range(0, num_parts):
        total = 0.0
        if tl.load(part_top_ptr + part) >= cut:
            ids, x = _load(row_ptr, part * PART, vocab, PART)
            total = tl.sum(weight(x, ids, top, cut, last, rate), axis=0)
        tl.store(sums_ptr + part, total)
    tl.debug_barrier()


@triton.jit
def _race_kept(
    row_ptr, vocab, num_parts, top, cut, last, rate, word, part_top_ptr, PART: tl.constexpr
):
    """The winner of a truncated row's race, part after part."""
    leading, leader = -1.0, vocab
    for part in range(0, num_parts):
        if tl.load(part_top_ptr + part) >= cut:
            ids, x = _load(row_ptr, part * PART, vocab, PART)
            weights = weight(x, ids, top, cut, last, rate)
            ratio, winner = _winner(weights / exponential(word, ids), ids, vocab)
            leader = tl.where(ratio > leading, winner, leader)
            leading = tl.maximum(ratio, leading)
    return leader


@triton.jit
def draw_within(x, ids, top, cut, last, rate, portion, PART: tl.constexpr):
    """The id at ``portion`` of the cumulative weight of one part of a row."""
    weights = weight(x, ids, top, cut, last, rate).to(tl.float64)
    inside = first_beyond(weights, portion * tl.sum(weights, axis=0), PART)
    return tl.sum(tl.where(tl.arange(0, PART) == inside, ids, 0), axis=0)


@triton.jit(
    do_not_specialize=["per", "given_stride", "is_given_stride"],
    do_not_specialize_on_alignment=(*PER_REQUEST, "given_ptr", "is_given_ptr"),
)
def _join_rows(
    logits_ptr, request_stride, row_stride, temperature_ptr, top_k_ptr, top_p_ptr, min_p_ptr,
    greedy_ptr, lens_ptr, rules_ptr, keys_ptr, nonces_ptr, positions_ptr,
    part_top_ptr, stretch_top_ptr, best_ptr, sum_ptr, plain_ptr, ratio_ptr, winner_ptr,
    held_ptr, held_ids_ptr, law_ptr, last_ptr, own_ptr, stats_ptr, d2t_ptr, token_ptr, logq_ptr,
    given_ptr, is_given_ptr, given_stride, is_given_stride, vocab, num_parts, per,
    EXTRA: tl.constexpr, PART: tl.constexpr, STRETCH: tl.constexpr,
    PARTS_UP: tl.constexpr, SWEEP: tl.constexpr, HELD: tl.constexpr, STREAM: tl.constexpr,
    HAS_GREEDY: tl.constexpr, HAS_LENS: tl.constexpr,
    PLAIN: tl.constexpr, TRUNCATES: tl.constexpr, RACES: tl.constexpr, DRAWS: tl.constexpr,
    DRAFTS: tl.constexpr, HAS_MAP: tl.constexpr, HAS_GIVEN: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """One row: its law, and a token sampled from it if one is needed; with DRAFTS also the token's
    target id and log q."""
    if OVERLAP:
        let_next_start()
        wait_for_previous()
    row = tl.program_id(0).to(tl.int64)
    request, place = row // per, row % per
    if HAS_LENS:  # noqa: SIM102  (known when compiled; what is inside is not)
        if place >= tl.load(lens_ptr + request) + EXTRA:
            if PLAIN:
                tl.store(stats_ptr + row * 2, 0.0)
                tl.store(stats_ptr + row * 2 + 1, 0.0)
            return
    row_ptr = logits_ptr + request * request_stride + place * row_stride
    part = tl.arange(0, PARTS_UP)
    is_part = part < num_parts
    slot = row * num_parts + part
    tops = tl.load(part_top_ptr + slot, mask=is_part, other=float("-inf"))
    top = tl.max(tops, axis=0)
    bests = tl.load(best_ptr + slot, mask=is_part, other=vocab)
    best = tl.min(tl.where(tops == top, bests, vocab), axis=0)
    has_law = is_sound(top)
    best = tl.where(has_law, best, _UNSOUND)
    if PLAIN:
        gap = _difference(tops, tl.where(has_law, top, 0.0))
        shrink = tl.exp(gap)
        totals = tl.load(plain_ptr + slot * 2, mask=is_part, other=0.0)
        slopes = tl.load(plain_ptr + slot * 2 + 1, mask=is_part, other=0.0)
        plain_total = tl.sum(totals * shrink, axis=0)
        # Sum of e^z z with z relative to the row's maximum, not to the part's.
        moved = shrink * slopes + totals * (shrink * gap)
        log_total = tl.log(plain_total)
        tl.store(stats_ptr + row * 2, top + log_total)
        tl.store(stats_ptr + row * 2 + 1, log_total - tl.sum(moved, axis=0) / plain_total)
    rate, is_greedy = rate_of(temperature_ptr, greedy_ptr, request, HAS_GREEDY)
    # A greedy row is truncated to its argmax.
    cut = top
    last = best
    mass = 1.0
    if has_law & (not is_greedy):
        sums = tl.load(sum_ptr + slot, mask=is_part, other=0.0)
        shares = sums * tl.exp((tops - top) * rate)
        cut = float("-inf")
        last = vocab
        mass = tl.sum(shares, axis=0)
        is_cut = False
        if TRUNCATES:
            temperature = tl.load(temperature_ptr + request).to(tl.float32)
            top_k = tl.load(top_k_ptr + request)
            top_p = tl.load(top_p_ptr + request).to(tl.float32)
            min_p = tl.load(min_p_ptr + request).to(tl.float32)
            is_cut = (top_k < vocab) | (top_p < 1) | (min_p > 0)
            if is_cut:
                cut, last, mass = _truncated(
                    row_ptr, vocab, top, mass, temperature, rate, top_k, top_p, min_p,
                    stretch_top_ptr + row * num_parts * (PART // STRETCH),
                    num_parts * (PART // STRETCH), held_ptr + row * HELD,
                    held_ids_ptr + row * HELD, PARTS_UP * (PART // STRETCH), SWEEP, HELD,
                )  # fmt: skip
        first_slot = row * num_parts
        if RACES:
            if tl.load(rules_ptr + request) == 0:
                if is_cut:
                    word = word_of(
                        tl.load(keys_ptr + request), tl.load(nonces_ptr + request),
                        tl.load(positions_ptr + request) + place, STREAM,
                    )  # fmt: skip
                    best = _race_kept(
                        row_ptr, vocab, num_parts, top, cut, last, rate, word,
                        part_top_ptr + first_slot, PART,
                    )  # fmt: skip
                else:
                    ratios = tl.load(ratio_ptr + slot, mask=is_part, other=0.0)
                    winners = tl.load(winner_ptr + slot, mask=is_part, other=vocab)
                    _, best = _winner(ratios * tl.exp((tops - top) * rate), winners, vocab)
        elif DRAWS:
            if TRUNCATES:  # noqa: SIM102
                if is_cut:
                    _mass_by_part(
                        row_ptr, vocab, num_parts, top, cut, last, rate, sum_ptr + first_slot,
                        part_top_ptr + first_slot, PART,
                    )  # fmt: skip
                    shares = tl.load(sum_ptr + slot, mask=is_part, other=0.0)
            number = uniform(
                tl.load(keys_ptr + request), tl.load(nonces_ptr + request),
                tl.load(positions_ptr + request) + place, STREAM,
            )  # fmt: skip
            chosen, portion = choose_part(shares, number, PARTS_UP)
            ids, x = _load(row_ptr, chosen * PART, vocab, PART)
            best = draw_within(x, ids, top, cut, last, rate, portion, PART)
    tl.store(law_ptr + row * 3, top)
    tl.store(law_ptr + row * 3 + 1, cut)
    tl.store(law_ptr + row * 3 + 2, mass)
    tl.store(last_ptr + row, last)
    if DRAFTS:
        own = tl.maximum(best, 0).to(tl.int64)
        temperature = tl.load(temperature_ptr + request).to(tl.float32)
        x = tl.load(row_ptr + own).to(tl.float32)
        gap = x - tl.where(has_law, top, 0.0)
        logq = gap / tl.where(is_greedy, 1.0, temperature) - tl.log(mass)
        tl.store(logq_ptr + row, tl.where(has_law, logq, 0.0))
        if HAS_MAP:
            own += tl.load(d2t_ptr + own)
        if HAS_GIVEN:
            is_given = tl.load(is_given_ptr + row * is_given_stride) != 0
            own = tl.where(is_given, tl.load(given_ptr + row * given_stride), own)
        tl.store(token_ptr + row, own)
    else:
        tl.store(own_ptr + row, best)


@dataclass(frozen=True, slots=True)
class DraftTokens:
    """Where ``join_rows`` writes draft tokens."""

    tokens_N: Tensor
    """[N] int64 target ids; that of draft id 0 for rows without a law."""
    logq_N: Tensor
    """[N] float32, log q of the token; 0 for rows without a law."""
    d2t_D: Tensor | None
    """See ``draft_sampling.VocabMap``; ``None``: the draft vocabulary is the target's."""
    instead: Instead | None = None
    """Tokens that are taken in place of the drawn ones."""


@dataclass(frozen=True, slots=True)
class JoinedRows:
    """Result of ``join_rows``."""

    laws: RowLaws
    """Laws of the N rows; rows beyond ``lens`` are not written."""
    own_N: Tensor | None
    """[N] int32: the argmax of greedy rows, the sampled token of others, or ``UNSOUND``; ``None``
    for drafts, whose tokens go to ``DraftTokens``."""
    stats_N2: Tensor | None
    """[N, 2] float32: logsumexp, and the entropy in nats at temperature 1 without truncation; 0
    beyond ``lens``."""


def check_packed(
    sampling: SamplingRows, numbering: Numbering | None, **others: Tensor | None
) -> None:
    """Check that tensors with one number per request are contiguous.

    Raises:
        ValueError: a tensor is not contiguous; the message names it.
    """
    tensors = {
        "temperature": sampling.temperature_R,
        "top_k": sampling.top_k_R,
        "top_p": sampling.top_p_R,
        "min_p": sampling.min_p_R,
        **others,
    }
    if numbering is not None:
        tensors |= {
            "keys": numbering.keys_R,
            "nonces": numbering.nonces_R,
            "positions": numbering.positions_R,
        }
    for name, tensor in tensors.items():
        if tensor is not None and not tensor.is_contiguous():
            raise ValueError(f"{name} must be contiguous, got strides {tensor.stride()}")


def join_rows(
    logits_RPV: Tensor,
    sampling: SamplingRows,
    greedy_R: Tensor | None,
    lens_R: Tensor | None,
    rules_R: Tensor | None,
    numbering: Numbering | None,
    stream: Stream,
    extra: int,
    with_stats: bool,
    tiles: Tiles = TILES,
    drafts: DraftTokens | None = None,
    overlap: bool = False,
) -> JoinedRows:
    """The laws of N = R * ``per`` rows, and a token sampled from each if needed.

    Args:
        logits_RPV: [R, PER, V] float; the last dimension is contiguous.
        greedy_R: [R] bool, rows that take their argmax regardless of temperature.
        lens_R: only the first ``lens + extra`` rows of a request are read.
        rules_R: requests with rule 0 sample, by a race; ``None``: all of them, by inversion.
        numbering: random numbers of the samples; ``None``: no sampling.
        extra: see ``lens_R``.
        with_stats: compute ``stats_N2``.
        drafts: filled instead of ``own_N``.
        overlap: start while the previous kernel still runs (``specops.overlap_triton``).

    Raises:
        ValueError: the last dimension, or a tensor with one number per request, is not
            contiguous.
    """
    num_requests, per, vocab_size = logits_RPV.shape
    tiles = tiles.within(vocab_size)
    if logits_RPV.stride(2) != 1:
        raise ValueError(f"each row must be contiguous, got strides {logits_RPV.stride()}")
    check_packed(sampling, numbering, greedy=greedy_R, lens=lens_R, rules=rules_R)
    device = logits_RPV.device
    num_rows = num_requests * per
    parts = triton.cdiv(vocab_size, tiles.part)
    stretches = tiles.part // tiles.stretch
    truncates = sampling.truncates

    def scratch(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty((num_rows, *shape), dtype=dtype, device=device)

    tops, sums, bests = scratch(parts), scratch(parts), scratch(parts, dtype=torch.int32)
    plain = scratch(parts, 2) if with_stats else None
    races = rules_R is not None
    ratios = scratch(parts) if races else None
    winners = scratch(parts, dtype=torch.int32) if races else None
    stretch_tops = scratch(parts, stretches) if truncates else None
    held = scratch(tiles.held) if truncates else None
    held_ids = scratch(tiles.held, dtype=torch.int32) if truncates else None
    laws = RowLaws(scratch(3), scratch(dtype=torch.int32))
    own = scratch(dtype=torch.int32) if drafts is None else None
    stats = scratch(2) if with_stats else None
    instead = None if drafts is None else drafts.instead
    if not num_rows:
        return JoinedRows(laws, own, stats)
    rows = (logits_RPV, logits_RPV.stride(0), logits_RPV.stride(1), sampling.temperature_R)
    kinds = {
        "EXTRA": extra,
        "PART": tiles.part,
        "STRETCH": tiles.stretch,
        "HAS_GREEDY": greedy_R is not None,
        "HAS_LENS": lens_R is not None,
        "PLAIN": with_stats,
        "TRUNCATES": truncates,
        "RACES": races,
        "STREAM": int(stream),
        "OVERLAP": overlap,
        "launch_pdl": overlap,
    }
    cuts = (sampling.top_k_R, sampling.top_p_R, sampling.min_p_R)
    numbers: tuple[Tensor | None, ...] = (None,) * 3
    if numbering is not None:
        numbers = (numbering.keys_R, numbering.nonces_R, numbering.positions_R)
    _split_rows[(num_rows, parts)](
        *rows, greedy_R, lens_R, *cuts, rules_R, *numbers, tops, stretch_tops, bests, sums, plain,
        ratios, winners, vocab_size, parts, per, **kinds, num_warps=tiles.part_warps,
    )  # fmt: skip
    _join_rows[(num_rows,)](
        *rows, *cuts, greedy_R, lens_R, rules_R, *numbers,
        tops, stretch_tops, bests, sums, plain, ratios, winners, held, held_ids,
        laws.tops_cuts_masses, laws.lasts, own, stats,
        *((None,) * 3 if drafts is None else (drafts.d2t_D, drafts.tokens_N, drafts.logq_N)),
        *((None, None, 0, 0) if instead is None else (
            instead.tokens_M, instead.is_taken_M.view(torch.uint8), instead.tokens_M.stride(0),
            instead.is_taken_M.stride(0),
        )),
        vocab_size, parts, per,
        **kinds, PARTS_UP=triton.next_power_of_2(parts), SWEEP=tiles.sweep, HELD=tiles.held,
        DRAWS=numbering is not None, DRAFTS=drafts is not None,
        HAS_MAP=drafts is not None and drafts.d2t_D is not None, HAS_GIVEN=instead is not None,
        num_warps=tiles.sweep_warps if truncates else tiles.part_warps,
    )  # fmt: skip
    return JoinedRows(laws, own, stats)
