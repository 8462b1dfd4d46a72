"""Drafting and verification from logits: kernels equal their definitions."""

from __future__ import annotations

import dataclasses
import os

import pytest
import torch

from specops import draft_sampling, draft_sampling_triton, verify, verify_logits
from specops import verify_logits_triton as kernels
from specops.draft_sampling import DraftLaw, Instead, vocab_map
from specops.laws_triton import TILES, Tiles
from specops.rng import Numbering
from specops.sampling import distribution, sampling_rows
from specops.verify_logits import Rule

# Kernels are compiled if there is a GPU, and interpreted otherwise.
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"
SMALL = Tiles(part=64, stretch=16, sweep=128, held=32)
"""Small tiles: many parts, and cuts with more candidates than are held, with few tokens."""
TRUNCATIONS = [
    (None, 1.0, 0.0), (3, 1.0, 0.0), (None, 0.9, 0.0), (None, 1.0, 0.02), (40, 0.7, 0.0),
    (90, 0.95, 0.001), (5, 0.3, 0.1), (1, 1.0, 0.0), (None, 0.999, 0.0),
]  # fmt: skip


def sampling(num_requests, vocab, truncates, device="cpu", all_sampled=False):
    """A different temperature and truncation for each request; every fifth is greedy."""
    temperatures = [(0.6, 1.0, 1.7)[r % 3] for r in range(num_requests)]
    if not all_sampled:
        temperatures = [0.0 if r % 5 == 4 else t for r, t in enumerate(temperatures)]
    chosen = [TRUNCATIONS[r % len(TRUNCATIONS) if truncates else 0] for r in range(num_requests)]
    top_k, top_p, min_p = zip(*chosen, strict=True)
    return sampling_rows(temperatures, top_k, top_p, min_p, vocab, device)


def numbering(num_requests, seed, device="cpu"):
    keys = torch.arange(num_requests, device=device) * 7919 - 5000 + 10_007 * seed
    nonces = torch.arange(num_requests, device=device) % 3
    return Numbering(keys, nonces, torch.arange(num_requests, device=device) + 11)


def case(num_requests, num_draft, vocab, seed, reduced, dense, truncates, dtype, device="cpu"):
    """Arguments of ``verify_logits``; dense drafts are sampled from their law."""
    generator = torch.Generator().manual_seed(seed)
    size = vocab // 3 if reduced else vocab
    chosen = torch.randperm(vocab, generator=generator)[:size].sort().values
    d2t = (chosen - torch.arange(size)).to(device)
    mapped = vocab_map(d2t, vocab) if reduced else None
    logits = 2.5 * torch.randn(num_requests, num_draft + 1, vocab, generator=generator)
    noise = torch.randn(num_requests, num_draft, size, generator=generator)
    logits = logits.to(dtype).to(device)
    q_logits = (logits[:, :num_draft].index_select(-1, chosen.to(device)) + noise.to(device)).to(
        dtype
    )
    rows = sampling(num_requests, vocab, truncates, device)
    greedy = torch.tensor([r % 4 == 3 for r in range(num_requests)], device=device)
    numbers = numbering(num_requests, seed, device)
    draft = torch.zeros(num_requests, num_draft, dtype=torch.int64, device=device)
    for j in range(num_draft):
        place = dataclasses.replace(numbers, positions_R=numbers.positions_R + j)
        if dense:
            drafted = draft_sampling.sample_draft(q_logits[:, j], rows, place, greedy, mapped)
            draft[:, j] = drafted.tokens_R
        else:
            draft[:, j] = logits[:, j].float().topk(2).indices[:, seed % 2]
    lens = (torch.arange(num_requests, device=device) + num_draft) % (num_draft + 1)
    rules = torch.arange(num_requests, device=device).flip(0) % 3
    law = DraftLaw(q_logits, rows, greedy, mapped) if dense and num_draft else None
    return logits, rows, draft, lens, rules, numbers, law


def moved(value, device):
    """Move tensors, also those in records and tuples, to a device."""
    if isinstance(value, torch.Tensor):
        return value.to(device)
    if isinstance(value, tuple):
        return tuple(moved(item, device) for item in value)
    if dataclasses.is_dataclass(value):
        names = [field.name for field in dataclasses.fields(value)]
        return type(value)(*(moved(getattr(value, name), device) for name in names))
    return value


def by_kernel(function, *arguments, **options):
    """Run a kernel on arguments from the CPU and return the result there."""
    return moved(function(*moved(arguments, DEVICE), **options), "cpu")


def assert_alike(got, want):
    assert got.num_accepted_R.tolist() == want.num_accepted_R.tolist()
    assert got.next_R.tolist() == want.next_R.tolist()
    for name in ("draft_logp_RK", "overlap_RK", "logprob_RK1", "entropy_RK1"):
        if getattr(want, name) is None:
            assert getattr(got, name) is None
            continue
        torch.testing.assert_close(
            getattr(got, name), getattr(want, name), atol=2e-5, rtol=2e-6, msg=name
        )


@pytest.mark.parametrize(
    ("vocab", "num_draft", "drafter", "truncates", "dtype"),
    [
        pytest.param(210, 0, "delta", True, torch.float32, id="no draft"),
        pytest.param(16, 3, "delta", False, torch.float32, id="delta"),
        pytest.param(16, 3, "delta", True, torch.float32, id="delta, truncated"),
        pytest.param(16, 3, "dense", False, torch.float32, id="dense"),
        pytest.param(140, 3, "dense", False, torch.bfloat16, id="dense, bf16"),
        pytest.param(140, 2, "dense", True, torch.float32, id="dense, truncated"),
        pytest.param(16, 3, "reduced", False, torch.float32, id="reduced"),
        pytest.param(200, 2, "reduced", True, torch.bfloat16, id="reduced, truncated, bf16"),
    ],
)
def test_the_kernel_gives_the_same_verdict(vocab, num_draft, drafter, truncates, dtype):
    seed = vocab + num_draft
    arguments = case(
        9, num_draft, vocab, seed, drafter == "reduced", drafter != "delta", truncates, dtype
    )

    want = verify_logits.verify_logits(*arguments)
    got = by_kernel(kernels.verify_logits, *arguments, tiles=SMALL)

    assert_alike(got, want)


def test_tokens_do_not_depend_on_whether_logprobs_are_wanted():
    arguments = case(6, 2, 100, 0, False, True, False, torch.float32)

    want = verify_logits.verify_logits(*arguments, with_logprobs=False)
    got = by_kernel(kernels.verify_logits, *arguments, with_logprobs=False, tiles=SMALL)

    assert_alike(got, want)
    with_them = by_kernel(kernels.verify_logits, *arguments, tiles=SMALL)
    assert got.next_R.tolist() == with_them.next_R.tolist()


def test_rows_of_logits_may_be_a_slice_of_padded_ones():
    logits, *rest = case(4, 1, 100, 3, False, True, True, torch.float32)
    wide = torch.full((4, 2, 128), 1e3, device=DEVICE)
    wide[..., :100] = logits

    got = kernels.verify_logits(wide[..., :100], *moved(tuple(rest), DEVICE), tiles=SMALL)
    got = moved(got, "cpu")

    assert_alike(got, verify_logits.verify_logits(logits, *rest))


def test_masked_logits_are_never_chosen():
    """A whole part may be masked, as by a grammar."""
    logits, rows, draft, lens, _, numbers, _ = case(5, 0, 200, 1, False, False, True, torch.float32)
    logits[..., 30:170] = float("-inf")
    for rule in (Rule.MATCH, Rule.BLOCK):
        rules = torch.full((5,), int(rule))
        want = verify_logits.verify_logits(logits, rows, draft, lens, rules, numbers)
        got = by_kernel(
            kernels.verify_logits, logits, rows, draft, lens, rules, numbers, tiles=SMALL
        )
        assert_alike(got, want)
        assert not ((got.next_R >= 30) & (got.next_R < 170)).any()


@pytest.mark.parametrize("tiles", [SMALL, Tiles(64, 64, 128, 256)], ids=["narrowing", "held"])
def test_ties_at_a_cut_survive_in_id_order(tiles):
    """Logits have few distinct values, so every cut falls among ties."""
    vocab, top_ks, top_ps = 150, [1, 7, 77, 149], [1.0, 0.5, 0.25]
    pairs = [(k, p) for k in top_ks for p in top_ps]
    num = len(pairs)
    generator = torch.Generator().manual_seed(0)
    row = torch.randint(0, 4, (vocab,), generator=generator) * torch.log(torch.tensor(2.0))
    logits = row.expand(num, vocab).contiguous()
    rows = sampling_rows(
        [1.0] * num, [k for k, _ in pairs], [p * 0.999 for _, p in pairs], [0.0] * num, vocab
    )
    law = distribution(logits[:, None].double(), rows)[:, 0]

    got = by_kernel(
        draft_sampling_triton.sample_draft, logits, rows, numbering(num, 0), tiles=tiles
    )

    assert got.laws is not None
    top, cut, mass = got.laws.tops_cuts_masses.unbind(-1)
    ids = torch.arange(vocab)
    tied = (logits == cut[:, None]) & (ids <= got.laws.lasts[:, None])
    kept = (logits > cut[:, None]) | tied
    assert torch.equal(kept, law > 0)
    rebuilt = torch.where(kept, (logits - top[:, None]).exp() / mass[:, None], 0.0)
    torch.testing.assert_close(rebuilt.double(), law, atol=0, rtol=2e-6)


def test_a_row_of_equal_logits_is_cut_to_its_first_ids():
    logits = torch.zeros(3, 150)
    rows = sampling_rows([1.0] * 3, [70, 150, 90], [1.0, 0.301, 0.5], [0.0] * 3, 150)

    got = by_kernel(draft_sampling_triton.sample_draft, logits, rows, numbering(3, 0), tiles=SMALL)

    assert got.laws is not None
    assert got.laws.lasts.tolist() == [69, 45, 44]
    assert got.laws.tops_cuts_masses[:, 2].tolist() == [70.0, 46.0, 45.0]


@pytest.mark.parametrize(
    ("vocab", "reduced", "dtype"),
    [
        pytest.param(16, True, torch.float32, id="one part, reduced"),
        pytest.param(300, False, torch.bfloat16, id="bf16"),
        pytest.param(300, True, torch.float32, id="reduced"),
    ],
)
def test_drafts_are_drawn_alike(vocab, reduced, dtype):
    num = 9
    generator = torch.Generator().manual_seed(vocab)
    size = vocab // 2 if reduced else vocab
    logits = (3 * torch.randn(num, size, generator=generator)).to(dtype)
    d2t = torch.randperm(vocab, generator=generator)[:size] - torch.arange(size)  # in any order
    mapped = vocab_map(d2t, vocab) if reduced else None
    greedy = torch.arange(num) % 6 == 1
    arguments = (logits, sampling(num, vocab, True), numbering(num, 1), greedy, mapped)

    want = draft_sampling.sample_draft(*arguments)
    got = by_kernel(draft_sampling_triton.sample_draft, *arguments, tiles=SMALL)

    assert got.tokens_R.tolist() == want.tokens_R.tolist()
    torch.testing.assert_close(got.logq_R, want.logq_R, atol=5e-6, rtol=2e-6)
    argmax = logits.float().argmax(-1)
    assert torch.equal(
        got.tokens_R[greedy], (argmax if not reduced else argmax + d2t[argmax])[greedy]
    )
    assert not got.logq_R[greedy].any()


@pytest.mark.parametrize("reduced", [False, True])
def test_a_draft_has_the_same_bits_whatever_the_other_requests_draft(reduced):
    """Requests that draft their argmax have no distribution computed for them."""
    _, rows, _, _, _, numbers, law = case(12, 2, 90, 3, reduced, True, True, torch.float32)
    logits = law.logits_RKD[:, 0].clone()
    logits[2, 5] = logits[4, 5] = float("nan")

    together = draft_sampling.sample_draft(logits, rows, numbers, law.greedy_R, law.vocab)

    cold = (rows.temperature_R == 0) | law.greedy_R
    assert cold.any() and not cold.all()
    assert not together.logq_R[cold].any()
    for r in range(12):
        one = torch.tensor([r])
        alone = draft_sampling.sample_draft(
            logits[one],
            rows.of(one),
            Numbering(*(getattr(numbers, f.name)[one] for f in dataclasses.fields(numbers))),
            law.greedy_R[one],
            law.vocab,
        )
        assert torch.equal(alone.tokens_R, together.tokens_R[one])
        assert torch.equal(alone.logq_R, together.logq_R[one])


@pytest.mark.parametrize("reduced", [False, True])
def test_drafts_that_are_certain_are_judged_as_one_hot_distributions(reduced):
    """Seeded requests beside one that is not, for which q is written out, and without it."""
    logits, rows, draft, lens, rules, numbers, law = case(
        8, 3, 90, 5, reduced, True, True, torch.float32
    )
    law = dataclasses.replace(law, greedy_R=torch.ones(8, dtype=torch.bool))
    for j in range(3):
        draft[:, j] = draft_sampling.sample_draft(
            law.logits_RKD[:, j], rows, numbers, law.greedy_R, law.vocab
        ).tokens_R
    rules = torch.full_like(rules, int(Rule.MATCH))
    by_rule = rules.clone()
    by_rule[-1], rows.temperature_R[-1] = int(Rule.BLOCK), 0.7

    certain = verify_logits.verify_logits(logits, rows, draft, lens, rules, numbers, law)
    written = verify_logits.verify_logits(logits, rows, draft, lens, by_rule, numbers, law)

    for name in ("num_accepted_R", "next_R", "draft_logp_RK", "overlap_RK"):
        assert torch.equal(getattr(certain, name)[:-1], getattr(written, name)[:-1]), name
    assert certain.overlap_RK[:-1].any()


def test_the_laws_that_drafting_left_are_those_that_verification_finds():
    """Bitwise: q is the law that the draft was sampled from."""
    logits, rows, draft, lens, rules, numbers, law = case(
        4, 2, 200, 5, True, True, True, torch.bfloat16
    )
    assert law is not None
    lens = torch.full_like(lens, 2)
    steps = []
    for j in range(2):
        one = (law.logits_RKD[:, j], rows, numbers, law.greedy_R, law.vocab, SMALL)
        steps.append(by_kernel(draft_sampling_triton.sample_draft, *one).laws)
    kept = draft_sampling.RowLaws(
        torch.stack([s.tops_cuts_masses for s in steps], 1),
        torch.stack([s.lasts for s in steps], 1),
    )
    arguments = (logits, rows, draft, lens, rules, numbers)

    again = by_kernel(kernels.verify_logits, *arguments, law, tiles=SMALL)
    with_laws = dataclasses.replace(law, laws=kept)
    reused = by_kernel(kernels.verify_logits, *arguments, with_laws, tiles=SMALL)

    for field in dataclasses.fields(again):
        assert torch.equal(getattr(again, field.name), getattr(reused, field.name)), field.name


def test_pieces_are_no_wider_than_the_vocabulary():
    assert TILES.within(151_936) == TILES
    assert TILES.within(4_096) == Tiles(4096, 1024, 4096, 4096)
    assert TILES.within(8) == Tiles(16, 16, 16, 16)


def test_wrong_shapes_are_refused():
    logits, rows, draft, lens, rules, numbers, law = case(
        3, 2, 30, 0, True, True, False, torch.float32
    )
    assert law is not None
    for check in (verify_logits.verify_logits, kernels.verify_logits):
        with pytest.raises(ValueError, match=r"logits must be \[3, 3, V\]"):
            check(logits[:, :2], rows, draft, lens, rules, numbers, law)
        with pytest.raises(ValueError, match=r"lens must be \[3\], got \(2,\)"):
            check(logits, rows, draft, lens[:2], rules, numbers, law)
        with pytest.raises(ValueError, match=r"draft logits must be \[3, 2, D\]"):
            check(
                logits, rows, draft, lens, rules, numbers,
                dataclasses.replace(law, logits_RKD=law.logits_RKD[:, :1]),
            )  # fmt: skip
        with pytest.raises(ValueError, match="needs a map to the target's of 30"):
            check(logits, rows, draft, lens, rules, numbers, dataclasses.replace(law, vocab=None))


@pytest.mark.parametrize("reduced", [False, True], ids=["whole", "reduced"])
def test_chances_and_residuals_are_those_of_the_rules(reduced):
    """The kernels' intermediate results equal those of the exact rules within 1e-6."""
    logits, rows, draft, _, _, numbers, law = case(
        6, 4, 100, 8, reduced, True, False, torch.float32
    )
    assert law is not None
    rows = dataclasses.replace(rows, temperature_R=rows.temperature_R.clamp(min=0.5))
    lens = torch.full((6,), 4)
    p = distribution(logits.double(), rows)
    own_q = draft_sampling.draft_distribution(law.logits_RKD, law.sampling, law.greedy_R)
    q = draft_sampling.target_distribution(own_q, law.vocab, 100)
    keep, _ = verify.acceptance(p[:, :4], q, draft)
    h_RK, pi_RK1, _ = verify.block_acceptance(p[:, :4], q, draft, lens)
    for rule in (Rule.STANDARD, Rule.BLOCK):
        rules = torch.full((6,), int(rule))
        arguments = (logits, rows, draft, lens, rules, numbers, law, False, SMALL)

        verdict, steps = by_kernel(kernels._launch, *arguments)

        stop = verdict.num_accepted_R
        is_inside = stop < 4
        assert is_inside.any()
        at, inside = torch.arange(6), stop.clamp(max=3)
        pi = pi_RK1[at, stop][:, None] if rule == Rule.BLOCK else 1.0
        wanted = verify.residual(p[at, stop], q[at, inside], pi)
        left = (pi * p[at, stop] - q[at, inside]).clamp(min=0).sum(-1)
        by_part = torch.nn.functional.pad(wanted, (0, 28)).view(6, 2, 64).sum(-1) * left[:, None]
        got = steps.rest_RP2[..., 1].double()
        torch.testing.assert_close(got[is_inside], by_part[is_inside], atol=1e-6, rtol=0)
    torch.testing.assert_close(steps.keep_RK, keep, atol=1e-6, rtol=0)
    torch.testing.assert_close(steps.pi_RK1, pi_RK1, atol=1e-6, rtol=0)
    assert steps.common_RKP2 is not None
    mass = (steps.pi_RK1[:, :4] - steps.common_RKP2[..., 1].sum(-1))[:, 1:].clamp(min=0)
    got_h = mass / (mass + 1 - steps.pi_RK1[:, 1:4])
    torch.testing.assert_close(got_h.nan_to_num(1.0), h_RK[:, :3], atol=1e-6, rtol=0)


@pytest.mark.gpu
@pytest.mark.parametrize("truncates", [False, True], ids=["whole", "truncated"])
@pytest.mark.parametrize("drafter", ["delta", "dense", "reduced"])
def test_the_compiled_kernel_gives_the_same_verdict_of_a_real_vocabulary(drafter, truncates):
    """A number within about 1e-6 of a boundary may fall on either side: at most one row in 64."""
    arguments = case(
        64, 4, 151_936, 4, drafter == "reduced", drafter != "delta", truncates, torch.bfloat16,
        "cuda",
    )  # fmt: skip

    want = verify_logits.verify_logits(*arguments)
    got = kernels.verify_logits(*arguments)

    is_same = (got.num_accepted_R == want.num_accepted_R) & (got.next_R == want.next_R)
    assert (~is_same).sum() <= 1
    for name in ("draft_logp_RK", "overlap_RK", "logprob_RK1", "entropy_RK1"):
        torch.testing.assert_close(
            getattr(got, name)[is_same], getattr(want, name)[is_same], atol=5e-5, rtol=1e-5
        )


@pytest.mark.gpu
@pytest.mark.parametrize("truncates", [False, True], ids=["whole", "truncated"])
def test_a_captured_graph_follows_what_its_tensors_hold(truncates):
    """Parameters, lengths, rules and numbers are read at each replay."""
    arguments = case(8, 3, 5000, 0, True, True, truncates, torch.bfloat16, "cuda")
    later = case(8, 3, 5000, 1, True, True, truncates, torch.bfloat16, "cuda")
    later = (*later[:3], later[3].flip(0), later[4].roll(1), *later[5:])
    want = kernels.verify_logits(*later)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        kernels.verify_logits(*arguments)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = kernels.verify_logits(*arguments)

    for old, new in zip(tensors_of(arguments), tensors_of(later), strict=True):
        old.copy_(new)
    graph.replay()

    for field in dataclasses.fields(want):
        assert torch.equal(getattr(got, field.name), getattr(want, field.name)), field.name


def tensors_of(value):
    """All tensors in records and tuples, in order."""
    if isinstance(value, torch.Tensor):
        return [value]
    if isinstance(value, tuple):
        return [tensor for item in value for tensor in tensors_of(item)]
    if dataclasses.is_dataclass(value):
        fields = dataclasses.fields(value)
        return [t for field in fields for t in tensors_of(getattr(value, field.name))]
    return []


def test_a_field_that_is_not_contiguous_over_the_requests_is_refused():
    arguments = list(case(2, 2, 40, 0, False, False, True, torch.float32, DEVICE))
    spread = torch.stack((arguments[1].top_p_R, arguments[1].top_p_R), dim=1)[:, 0]
    arguments[1] = dataclasses.replace(arguments[1], top_p_R=spread)
    with pytest.raises(ValueError, match="top_p must be contiguous"):
        kernels.verify_logits(*arguments)


def poisoned(arguments, seed):
    """The same arguments with some rows of target and drafter unsound."""
    logits, rows, draft, lens, rules, numbers, law = arguments
    generator = torch.Generator().manual_seed(seed)
    bad = (float("nan"), float("inf"), float("-inf"))
    num_requests, num_rows, vocab = logits.shape
    for request in range(num_requests):
        for place in range(num_rows):
            what, ids = bad[(request + place) % 3], torch.randperm(vocab, generator=generator)[:3]
            if torch.rand((), generator=generator) < 0.3:
                logits[request, place, ids if what != float("-inf") else slice(None)] = what
            is_chosen = torch.rand((), generator=generator) < 0.3
            if law is not None and place < num_rows - 1 and is_chosen:
                at = ids[0] % law.logits_RKD.shape[-1] if what != float("-inf") else slice(None)
                law.logits_RKD[request, place, at] = what
    return logits, rows, draft, lens, rules, numbers, law


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize(
    ("vocab", "drafter", "truncates", "dtype"),
    [
        pytest.param(16, "delta", True, torch.float32, id="delta"),
        pytest.param(140, "dense", False, torch.float32, id="dense"),
        pytest.param(140, "dense", True, torch.bfloat16, id="dense, truncated"),
        pytest.param(200, "reduced", True, torch.float32, id="reduced"),
    ],
)
def test_rows_that_are_not_finite_are_found_by_definition_and_kernel_alike(
    vocab, drafter, truncates, dtype, seed
):
    arguments = case(9, 3, vocab, seed, drafter == "reduced", drafter != "delta", truncates, dtype)
    clean = verify_logits.verify_logits(*moved(arguments, "cpu"), with_logprobs=False)
    arguments = poisoned(arguments, seed)

    want = verify_logits.verify_logits(*arguments, with_logprobs=False)
    got = by_kernel(kernels.verify_logits, *arguments, with_logprobs=False, tiles=SMALL)

    assert_alike(got, want)
    at = torch.arange(9)
    top = arguments[0].amax(-1)[at, want.num_accepted_R]
    assert torch.equal(want.next_R == verify_logits.UNSOUND, ~top.isfinite())
    assert (want.num_accepted_R <= arguments[3]).all()
    assert (want.next_R == verify_logits.UNSOUND).any() and (want.next_R >= 0).any()
    assert (clean.next_R >= 0).all()


@pytest.mark.parametrize("what", [float("nan"), float("inf"), float("-inf")])
def test_an_unsound_row_of_a_drafter_drafts_its_first_token(what):
    logits = torch.randn(5, 200, generator=torch.Generator().manual_seed(0))
    logits[3, 150 if what != float("-inf") else slice(None)] = what
    d2t = torch.arange(200) + 5
    mapped = vocab_map(d2t, 600)
    greedy = torch.tensor([False, True, False, False, False])
    arguments = (logits, sampling(5, 200, True, all_sampled=True), numbering(5, 1), greedy, mapped)

    want = draft_sampling.sample_draft(*arguments)
    got = by_kernel(draft_sampling_triton.sample_draft, *arguments, tiles=SMALL)

    assert got.tokens_R.tolist() == want.tokens_R.tolist()
    assert (want.tokens_R[3], want.logq_R[3], got.logq_R[3]) == (5, 0, 0)
    assert got.logq_R.isfinite().all()


def of_requests(value, chosen):
    """The rows of some requests, of tensors and of records of them."""
    if isinstance(value, torch.Tensor):
        return value[chosen].contiguous()
    if not dataclasses.is_dataclass(value):
        return value
    names = [field.name for field in dataclasses.fields(value)]
    return type(value)(*(of_requests(getattr(value, name), chosen) for name in names))


@pytest.mark.parametrize("by", ["definition", "kernel"])
def test_a_seeded_token_depends_on_its_row_and_numbers_alone(by):
    """Not on the draft, its length, or the other requests; untruncated rows and truncated ones."""
    logits, rows, _, _, _, numbers, _ = case(9, 4, 150, 2, False, False, True, torch.float32)
    judge = verify_logits.verify_logits if by == "definition" else kernels.verify_logits

    def first_tokens(chosen, num_draft):
        some = of_requests(logits[:, : num_draft + 1], chosen)
        draft = torch.full((len(chosen), num_draft), 149)
        lens, rules = torch.full((len(chosen),), num_draft), torch.zeros_like(chosen)
        law = of_requests(rows, chosen), draft, lens, rules, of_requests(numbers, chosen)
        verdict = by_kernel(judge, some, *law, with_logprobs=False)
        kept = verdict.num_accepted_R == 0
        return torch.where(kept, verdict.next_R, 149).tolist()

    alone = [first_tokens(torch.tensor([r]), 0)[0] for r in range(9)]
    assert len(set(alone)) > 4
    for num_draft in range(5):
        assert first_tokens(torch.arange(9), num_draft) == alone
        assert first_tokens(torch.tensor([8, 2, 5]), num_draft) == [alone[r] for r in (8, 2, 5)]


def test_tokens_of_others_are_returned_in_place_of_drawn_ones():
    """Their laws and log q stay those of the drawn tokens."""
    logits = torch.randn(5, 50, generator=torch.Generator().manual_seed(3))
    greedy = torch.zeros(5, dtype=torch.bool)
    arguments = (logits, sampling(5, 50, False), numbering(5, 1), greedy, None)
    tokens = 100 + torch.arange(10).view(5, 2)
    is_taken = torch.tensor([[1, 0, 1, 0, 0], [0, 1, 0, 0, 1]]).t() > 0
    instead = Instead(tokens[:, 1], is_taken[:, 0])  # rows that are not adjacent

    alone = draft_sampling.sample_draft(*arguments)
    want = draft_sampling.sample_draft(*arguments, instead=instead)

    def by_kernels(*given):
        *rest, other = given
        return draft_sampling_triton.sample_draft(*rest, instead=other, tiles=SMALL)

    got = by_kernel(by_kernels, *arguments, instead)

    assert want.tokens_R.tolist() == [101, alone.tokens_R[1], 105, *alone.tokens_R[3:]]
    assert got.tokens_R.tolist() == want.tokens_R.tolist()
    assert torch.equal(want.logq_R, alone.logq_R)
    torch.testing.assert_close(got.logq_R, want.logq_R, atol=5e-6, rtol=2e-6)
