"""Tokens drafted, verified and sampled from logits follow the target's law.

Every run drafts K tokens, verifies them, and continues by plain decoding to K + 1 tokens; the
frequency of each sequence is compared with its probability. Random numbers are serving's, keyed by
request, so using one twice is detected. There are two drafters, because a good one hides errors
that a hostile one reveals, and vice versa.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from specops import draft_sampling, draft_sampling_triton, verify, verify_logits
from specops import rng as numbers_of
from specops import verify_logits_triton as kernels
from specops.draft_sampling import DraftLaw
from specops.laws_triton import Tiles
from specops.rng import Numbering, Stream
from specops.sampling import SamplingRows, distribution, draw
from specops.verify_logits import Rule

V, K = 5, 2
TINY = Tiles(part=16, stretch=16, sweep=16, held=16)
WHOLE, CUT = (1.0, V, 1.0, 0.0), (1.3, 4, 0.95, 0.02)
"""Temperature, top-k, top-p, min-p of all requests."""


@dataclass(frozen=True)
class Laws:
    """Logits after each context: [V], [V, V] and [V, V, V], and the drafter's."""

    target: list[Tensor]
    drafter: list[Tensor]


def laws(hostile: bool, device="cpu") -> Laws:
    generator = torch.Generator().manual_seed(7)
    target = [torch.randn([V] * (n + 1), generator=generator) * 1.5 for n in range(K + 1)]
    noise = [torch.randn(t.shape, generator=generator) for t in target[:K]]
    drafter = [-t if hostile else t + 0.5 * n for t, n in zip(target, noise, strict=False)]
    return Laws([t.to(device) for t in target], [t.to(device) for t in drafter])


def rows_of(parameters, num, device) -> SamplingRows:
    temperature, top_k, top_p, min_p = parameters
    return SamplingRows(
        torch.full((num,), temperature, device=device),
        torch.full((num,), top_k, device=device),
        torch.full((num,), top_p, device=device),
        torch.full((num,), min_p, device=device),
        truncates=parameters != WHOLE,
    )


def shaped(logits, parameters):
    flat = logits.reshape(-1, 1, V).double()
    return distribution(flat, rows_of(parameters, len(flat), logits.device)).view(logits.shape)


def after(table, tokens):
    """Rows of a table after the contexts [N, n]; n may be 0."""
    if not tokens.shape[1]:
        return table.expand(len(tokens), V)
    return table[tuple(tokens.T)]


def certain_places(num, device):
    """[N, K] bool: requests with none certain, the first, the second, and both, of every length.
    [N] bool: half of each kind."""
    number = torch.arange(num, device=device) // 4
    places = torch.arange(K, device=device)
    return number[:, None] >> places & 1 == 1, number >> K & 1 == 1


def emitted(
    rule, law, parameters, num, seed, sample=None, check=None, device="cpu", has_certain=False
):
    """Counts of each sequence of K + 1 tokens over ``num`` requests, [V ** (K + 1)].

    ``has_certain``: at some positions the second likeliest token of the target is drafted, whatever
    the drafter says, which for half of these requests is NaN.
    """
    sample = sample or draft_sampling.sample_draft
    check = check or verify_logits.verify_logits
    rows = rows_of(parameters, num, device)
    keys = torch.arange(num, device=device) * 2_654_435_761 + seed
    anchors = torch.full((num,), 40, device=device)
    numbering = Numbering(keys, torch.full((num,), 3, device=device), anchors)
    greedy = torch.full((num,), rule == Rule.MATCH, device=device)
    draft = torch.zeros((num, 0), dtype=torch.int64, device=device)
    certain, is_nan = certain_places(num, device)
    q_logits = []
    for j in range(K):
        q_logits.append(after(law.drafter[j], draft).contiguous())
        place = Numbering(keys, numbering.nonces_R, anchors + j)
        drawn = sample(q_logits[-1], rows, place, greedy).tokens_R
        if has_certain:
            second = after(law.target[j], draft).topk(2).indices[:, 1]
            drawn = torch.where(certain[:, j], second, drawn)
            q_logits[-1][certain[:, j] & is_nan] = float("nan")
        draft = torch.cat((draft, drawn[:, None]), dim=1)
    logits = torch.stack([after(law.target[j], draft[:, :j]) for j in range(K + 1)], dim=1)
    lens = torch.arange(num, device=device) % 4 % (K + 1)
    rules = torch.full((num,), int(rule), device=device)
    drafted = DraftLaw(torch.stack(q_logits, dim=1), rows, greedy)
    if has_certain:
        drafted = replace(drafted, certain_RK=certain)
    verdict = check(logits, rows, draft, lens, rules, numbering, drafted, False)
    place = torch.arange(K + 1, device=device)
    stop, following = verdict.num_accepted_R[:, None], verdict.next_R[:, None]
    tokens = torch.nn.functional.pad(draft, (0, 1))
    tokens = torch.where(place == stop, following, tokens)
    generator = torch.Generator(device).manual_seed(seed)
    for j in range(1, K + 1):
        number = torch.rand(num, generator=generator, dtype=torch.float64, device=device)
        plain = draw(after(shaped(law.target[j], parameters), tokens[:, :j]), number)
        tokens[:, j] = torch.where(j > stop[:, 0], plain, tokens[:, j])
    index = (tokens * torch.tensor([V**2, V, 1], device=device)).sum(dim=1)
    return torch.bincount(index, minlength=V ** (K + 1))


def joint(law, parameters):
    """Probability of every sequence of K + 1 tokens, [V ** (K + 1)]."""
    first, second, third = (shaped(table, parameters) for table in law.target)
    return (first[:, None, None] * second[:, :, None] * third).flatten()


def excess(counts, wanted):
    """Chi-squared minus its mean, in standard deviations; above 10 is not chance."""
    expected = wanted.double() * counts.sum()
    assert not counts[wanted == 0].any(), "a token that was cut off came out"
    is_seen = expected > 5
    square = ((counts - expected) ** 2 / expected)[is_seen].sum()
    freedom = is_seen.sum() - 1
    return float((square - freedom) / (2 * freedom) ** 0.5)


@pytest.mark.parametrize("has_certain", [False, True], ids=["drawn", "some certain"])
@pytest.mark.parametrize("hostile", [False, True], ids=["good drafter", "hostile drafter"])
@pytest.mark.parametrize("parameters", [WHOLE, CUT], ids=["whole", "truncated"])
@pytest.mark.parametrize("rule", list(Rule))
def test_tokens_follow_the_target(rule, parameters, hostile, has_certain):
    law = laws(hostile)

    counts = emitted(rule, law, parameters, 100_000, seed=1, has_certain=has_certain)

    assert excess(counts, joint(law, parameters)) < 10


def forgetting(*arguments):
    """Mutant: tokens that are certain are judged as if the drafter had drawn them."""
    *others, drafted, with_logprobs = arguments
    return verify_logits.verify_logits(*others, replace(drafted, certain_RK=None), with_logprobs)


def shifting(*arguments):
    """Mutant: certainty is that of the position before."""
    *others, drafted, with_logprobs = arguments
    moved = replace(drafted, certain_RK=drafted.certain_RK.roll(1, 1))
    return verify_logits.verify_logits(*others, moved, with_logprobs)


@pytest.mark.parametrize("mutant", [forgetting, shifting])
@pytest.mark.parametrize("rule", [Rule.STANDARD, Rule.BLOCK])
def test_certain_tokens_with_the_law_of_drawn_ones_are_seen(rule, mutant):
    law = laws(hostile=True)

    counts = emitted(rule, law, WHOLE, 100_000, seed=1, check=mutant, has_certain=True)

    assert excess(counts, joint(law, WHOLE)) > 10


def reused(former: Stream):
    """Verification's random numbers, but the residual reuses those of the stream ``former``."""
    right = numbers_of.device_uniforms

    def wrong(keys_R, positions_RK, nonces_R, stream):
        chosen = former if stream == Stream.RESIDUAL else stream
        return right(keys_R, positions_RK, nonces_R, chosen)

    return wrong


@pytest.mark.parametrize("former", [Stream.ACCEPT, Stream.DRAFT])
@pytest.mark.parametrize("rule", [Rule.STANDARD, Rule.BLOCK])
def test_a_number_used_twice_is_seen(rule, former, monkeypatch):
    """Mutants shipped by other engines."""
    monkeypatch.setattr(verify_logits, "device_uniforms", reused(former))
    law = laws(hostile=True)

    counts = emitted(rule, law, WHOLE, 100_000, seed=1)

    assert excess(counts, joint(law, WHOLE)) > 10


@pytest.mark.parametrize("rule", [Rule.STANDARD, Rule.BLOCK])
def test_a_residual_that_is_the_target_itself_is_seen(rule, monkeypatch):
    monkeypatch.setattr(verify, "residual", lambda p, q, pi=1.0: p)
    law = laws(hostile=True)

    counts = emitted(rule, law, WHOLE, 100_000, seed=1)

    assert excess(counts, joint(law, WHOLE)) > 10


def test_a_drafter_that_draws_from_another_law_than_it_says_is_seen(monkeypatch):
    """Mutant: q is rebuilt without the truncation that drafting used."""
    right = verify_logits.draft_distribution

    def whole(logits, rows, greedy):
        return right(logits, rows_of(WHOLE, len(logits), "cpu"), greedy)

    monkeypatch.setattr(verify_logits, "draft_distribution", whole)
    law = laws(hostile=False)

    counts = emitted(Rule.BLOCK, law, CUT, 100_000, seed=1)

    assert excess(counts, joint(law, CUT)) > 10


def compiled(rule, law, parameters, num, seed, has_certain=False):
    """``emitted`` by the compiled kernels, a million requests at once."""

    def sample(logits, rows, numbering, greedy):
        return draft_sampling_triton.sample_draft(logits, rows, numbering, greedy, tiles=TINY)

    def check(*arguments):
        return kernels.verify_logits(*arguments, tiles=TINY)

    chunk = 1_000_000
    return sum(
        emitted(
            rule, law, parameters, chunk, seed + 7 * i, sample, check, "cuda", has_certain
        ).cpu()
        for i in range(num // chunk)
    )


@pytest.mark.gpu
@pytest.mark.parametrize("has_certain", [False, True], ids=["drawn", "some certain"])
@pytest.mark.parametrize("hostile", [False, True], ids=["good drafter", "hostile drafter"])
@pytest.mark.parametrize("parameters", [WHOLE, CUT], ids=["whole", "truncated"])
@pytest.mark.parametrize("rule", list(Rule))
def test_tokens_of_the_kernels_follow_the_target(rule, parameters, hostile, has_certain):
    law = laws(hostile, "cuda")

    counts = compiled(rule, law, parameters, 8_000_000, seed=1, has_certain=has_certain)

    assert excess(counts, joint(law, parameters).cpu()) < 10


@pytest.mark.gpu
def test_a_number_used_twice_by_the_kernels_is_seen(monkeypatch):
    streams = {stream.name: stream for stream in Stream} | {"RESIDUAL": Stream.ACCEPT}
    monkeypatch.setattr(kernels, "Stream", SimpleNamespace(**streams))
    law = laws(True, "cuda")

    counts = compiled(Rule.BLOCK, law, WHOLE, 1_000_000, seed=1)

    assert excess(counts, joint(law, WHOLE).cpu()) > 10


def tail_draws(vocab, num, device):
    """Samples of a heavy token 0 and a tail of equally likely tokens that share 1 %: 7e-8 each at
    V = 151,936, about the step of a 24-bit number, and lost in a float32 sum after token 0."""
    logits = torch.zeros(vocab, device=device)
    logits[0] = torch.log(torch.tensor(99.0 * (vocab - 1)))
    chunk = 65_536
    rows = rows_of((1.0, vocab, 1.0, 0.0), chunk, device)
    rows = replace(rows, truncates=False)
    for i in range(num // chunk):
        keys = torch.arange(i * chunk, (i + 1) * chunk, device=device)
        yield logits.expand(chunk, vocab), rows, Numbering(keys, keys * 0, keys * 0 + 5)


@pytest.mark.gpu
def test_the_tail_of_a_real_vocabulary_is_drawn_at_its_rate():
    vocab, wanted = 151_936, 128 * 65_536
    counts = torch.zeros(vocab, device="cuda", dtype=torch.int64)
    for logits, rows, numbering in tail_draws(vocab, wanted, "cuda"):
        tokens = draft_sampling_triton.sample_draft(logits, rows, numbering).tokens_R
        counts += torch.bincount(tokens, minlength=vocab)

    tail = counts[1:].double()
    expected = 0.01 * wanted
    assert abs(float(tail.sum()) - expected) < 5 * expected**0.5
    # After token 0 in its own part, and everywhere.
    own_part = expected * 4095 / (vocab - 1)
    assert abs(float(tail[:4095].sum()) - own_part) < 5 * own_part**0.5
    never = (vocab - 1) * torch.tensor(-expected / (vocab - 1)).exp()
    assert abs(float((tail == 0).sum() - never)) < 5 * float(never) ** 0.5
