"""Draft laws some of whose tokens are certain: judged as if q were written out as one-hot."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from specops import verify_logits
from specops import verify_logits_triton as kernels
from specops.draft_sampling import DraftLaw, RowLaws, target_distribution
from specops.laws_triton import join_rows
from specops.rng import Stream
from specops.verify_logits import Rule
from tests.specops.test_verify_logits import DEVICE, SMALL, assert_alike, by_kernel, case, moved

GARBAGE = (float("nan"), float("inf"), float("-inf"), 1e30)
"""What the logits of a certain token may hold."""


def certain_case(num_requests, num_draft, vocab, seed, reduced, truncates, dtype=torch.float32):
    """``case`` with about half of the positions certain. Their tokens are likely ones of the target
    or any, also ones that a reduced vocabulary lacks, and their logits garbage."""
    *arguments, law = case(num_requests, num_draft, vocab, seed, reduced, True, truncates, dtype)
    logits, _, draft, lens, *_ = arguments
    generator = torch.Generator().manual_seed(seed)
    lens[:] = torch.randint(0, num_draft + 1, (2, num_requests), generator=generator).amax(0)

    def chosen(share):
        return torch.rand(draft.shape, generator=generator) < share

    certain = chosen(0.5)
    anything = torch.randint(0, vocab, draft.shape, generator=generator)
    likely = logits[:, :num_draft].float().argmax(-1)
    draft[:] = torch.where(certain, torch.where(chosen(0.7), likely, anything), draft)
    for number, (request, place) in enumerate(certain.nonzero().tolist()):
        law.logits_RKD[request, place, number % 3 :] = GARBAGE[number % 4]
    return *arguments, dataclasses.replace(law, certain_RK=certain)


def written_out(law, draft, vocab):
    """The same law without ``certain_RK``: the logits of certain tokens leave nothing else."""
    logits = target_distribution(law.logits_RKD, law.vocab, vocab)
    if law.vocab is not None:
        logits[..., law.vocab.t2d_V < 0] = float("-inf")
    one_hot = torch.full_like(logits, float("-inf")).scatter_(-1, draft[..., None], 0.0)
    return DraftLaw(
        torch.where(law.certain_RK[..., None], one_hot, logits), law.sampling, law.greedy_R
    )


SHAPES = [
    pytest.param(16, 3, False, False, torch.float32, id="one part"),
    pytest.param(140, 3, False, True, torch.float32, id="truncated"),
    pytest.param(140, 4, False, False, torch.bfloat16, id="bf16"),
    pytest.param(200, 3, True, False, torch.float32, id="reduced"),
    pytest.param(200, 2, True, True, torch.bfloat16, id="reduced, truncated, bf16"),
]


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(("vocab", "num_draft", "reduced", "truncates", "dtype"), SHAPES)
def test_the_definition_judges_as_if_q_were_written_out(
    vocab, num_draft, reduced, truncates, dtype, seed
):
    *arguments, law = certain_case(60, num_draft, vocab, seed, reduced, truncates, dtype)

    got = verify_logits.verify_logits(*arguments, law)
    want = verify_logits.verify_logits(*arguments, written_out(law, arguments[2], vocab))

    for field in dataclasses.fields(want):
        assert torch.equal(getattr(got, field.name), getattr(want, field.name)), field.name
    lens, kept = arguments[3], got.num_accepted_R
    last = law.certain_RK.gather(1, kept.clamp(max=num_draft - 1)[:, None])[:, 0]
    for rule in Rule:  # chains stop before certain tokens and before drawn ones, and pass both
        some = (kept < lens) & (arguments[4] == rule)
        assert (some & last).any() and (some & ~last).any()
        first = law.certain_RK[:, 0]
        assert ((kept > 0) & first).any() and ((kept > 0) & ~first).any()


@pytest.mark.parametrize("keeps_laws", [False, True], ids=["laws found again", "laws kept"])
@pytest.mark.parametrize(("vocab", "num_draft", "reduced", "truncates", "dtype"), SHAPES)
def test_the_kernel_judges_as_the_definition(
    vocab, num_draft, reduced, truncates, dtype, keeps_laws
):
    *arguments, law = certain_case(21, num_draft, vocab, vocab, reduced, truncates, dtype)
    want = verify_logits.verify_logits(*arguments, law)

    if keeps_laws:
        law = dataclasses.replace(law, laws=kept_laws(law))
    got = by_kernel(kernels.verify_logits, *arguments, law, tiles=SMALL)

    assert_alike(got, want)


@pytest.mark.parametrize("rule", [Rule.STANDARD, Rule.BLOCK])
def test_the_kernel_stops_many_chains_where_the_definition_does(rule):
    """Long chains of unlike drafters over few tokens, so that chances are neither 0 nor 1."""
    logits, rows, draft, lens, rules, numbers, law = certain_case(50, 4, 16, 3, False, False)
    lens[:], rules[:] = 4, int(rule)
    rows.temperature_R[:] = 2.0
    law = dataclasses.replace(law, greedy_R=torch.zeros(50, dtype=torch.bool))
    arguments = (logits, rows, draft, lens, rules, numbers, law)

    want = verify_logits.verify_logits(*arguments, with_logprobs=False)
    got = by_kernel(kernels.verify_logits, *arguments, with_logprobs=False, tiles=SMALL)

    assert_alike(got, want)
    assert want.num_accepted_R.unique().tolist() == [0, 1, 2, 3, 4]


def kept_laws(law):
    """What ``sample_draft`` would have left, NaN for the rows of certain tokens."""
    found = by_kernel(
        join_rows, law.logits_RKD, law.sampling, law.greedy_R, None, None, None, Stream.DRAFT, 0,
        False, SMALL,
    ).laws  # fmt: skip
    certain = law.certain_RK.flatten()
    return RowLaws(
        found.tops_cuts_masses.masked_fill(certain[:, None], float("nan")),
        found.lasts.masked_fill(certain, -7),
    )


@pytest.mark.parametrize("judge", [verify_logits.verify_logits, kernels.verify_logits])
def test_drafts_that_are_certain_throughout_are_delta_drafts(judge):
    *arguments, law = certain_case(21, 3, 90, 5, True, True)
    law.logits_RKD.fill_(float("nan"))
    law = dataclasses.replace(law, certain_RK=torch.ones_like(law.certain_RK))
    options = {} if judge is verify_logits.verify_logits else {"tiles": SMALL}

    got = by_kernel(judge, *arguments, law, **options)
    want = by_kernel(judge, *arguments, None, **options)

    assert_alike(got, want)
    assert got.num_accepted_R.any()


def test_no_distribution_is_computed_where_every_draft_is_certain_or_compared(monkeypatch):
    """Requests whose tokens are all certain, by any rule, beside greedy and seeded ones."""
    *arguments, law = certain_case(12, 3, 90, 5, True, True)
    rules, whole = arguments[4], torch.arange(12) % 2 == 0
    rules[~whole] = int(Rule.MATCH)
    law.certain_RK[whole] = True
    law = dataclasses.replace(law, greedy_R=~whole)
    want = verify_logits.verify_logits(*arguments, written_out(law, arguments[2], 90))

    def compute(*_):
        raise AssertionError("a distribution was computed")

    monkeypatch.setattr(verify_logits, "draft_distribution", compute)
    got = verify_logits.verify_logits(*arguments, law)

    assert_alike(got, want)
    assert not law.certain_RK.all() and {Rule.STANDARD, Rule.BLOCK} <= set(rules.tolist())


def test_a_row_of_the_target_that_is_not_finite_ends_a_certain_draft():
    logits, rows, draft, lens, rules, numbers, law = certain_case(12, 3, 90, 1, False, False)
    lens[:], law.certain_RK[:] = 3, True
    logits[:, 1, 5] = float("nan")
    arguments = (logits, rows, draft, lens, rules, numbers, law)

    want = verify_logits.verify_logits(*arguments, with_logprobs=False)
    got = by_kernel(kernels.verify_logits, *arguments, with_logprobs=False, tiles=SMALL)

    assert_alike(got, want)
    assert want.num_accepted_R.max() == 1
    assert torch.equal(want.next_R == verify_logits.UNSOUND, want.num_accepted_R == 1)


def test_flags_of_another_shape_or_layout_are_refused():
    *arguments, law = moved(certain_case(4, 2, 40, 0, False, False), DEVICE)
    short = dataclasses.replace(law, certain_RK=law.certain_RK[:, :1])
    for judge in (verify_logits.verify_logits, kernels.verify_logits):
        with pytest.raises(ValueError, match=r"certain must be \[4, 2\], got \(4, 1\)"):
            judge(*arguments, short)
    spread = dataclasses.replace(law, certain_RK=law.certain_RK[:, :1].expand(4, 2))
    with pytest.raises(ValueError, match="certain must be contiguous"):
        kernels.verify_logits(*arguments, spread)


@pytest.mark.gpu
@pytest.mark.parametrize("truncates", [False, True], ids=["whole", "truncated"])
@pytest.mark.parametrize("reduced", [False, True], ids=["whole vocabulary", "reduced"])
def test_the_compiled_kernel_judges_certain_drafts_of_a_real_vocabulary(reduced, truncates):
    """A number within about 1e-6 of a boundary may fall on either side: at most one row in 64."""
    *arguments, law = certain_case(64, 4, 151_936, 4, reduced, truncates, torch.bfloat16)
    want = moved(verify_logits.verify_logits(*moved((*arguments, law), "cuda")), "cpu")

    got = by_kernel(kernels.verify_logits, *arguments, law)

    is_same = (got.num_accepted_R == want.num_accepted_R) & (got.next_R == want.next_R)
    assert (~is_same).sum() <= 1
    for name in ("draft_logp_RK", "overlap_RK", "logprob_RK1", "entropy_RK1"):
        torch.testing.assert_close(
            getattr(got, name)[is_same], getattr(want, name)[is_same], atol=5e-5, rtol=1e-5
        )
