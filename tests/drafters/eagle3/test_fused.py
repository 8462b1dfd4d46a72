"""The fused drafter computes what the module does, over pages, and refuses what it would not."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch

from drafters.eagle3.fused import FusedEagle3, supports
from drafters.eagle3.model import Eagle3, Eagle3Config
from drafters.eagle3.paged import PagedEagle3
from serving.engine.drafts import AfterText, Best
from specops.attention import DecodePass
from specops.device import decode_attention, places_of
from specops.overlap_triton import can_overlap

PAGE, NUM_PAGES = 4, 41
VOCAB = 90


def make_drafter(draft_vocab=VOCAB, dtype=torch.float32, device="cpu", **changes):
    """A drafter whose every part matters, and an embedding."""
    shape = {
        "hidden_size": 48, "intermediate_size": 80, "num_heads": 4, "num_kv_heads": 2,
        "head_dim": 16,
    }  # fmt: skip
    config = Eagle3Config(
        target_vocab_size=VOCAB, draft_vocab_size=draft_vocab, layer_ids=(1, 2, 3),
        rms_norm_eps=1e-5, rope_theta=1e4, **shape | changes,
    )  # fmt: skip
    module = Eagle3(config)
    torch.manual_seed(0)
    for name, parameter in module.named_parameters():
        with torch.no_grad():
            if parameter.dim() == 1:
                parameter.copy_(1 + torch.randn_like(parameter) / 4)
            else:  # outputs of size 1
                parameter.normal_(std=parameter.shape[1] ** -0.5 * (3 if "head" in name else 1))
    if module.d2t is not None:
        module.d2t += 2 * torch.arange(draft_vocab)  # draft id i is target id 3 i
    embed = torch.nn.Embedding(VOCAB, config.hidden_size)
    models = (module.requires_grad_(False), embed.requires_grad_(False))
    return tuple(m.to(device=device, dtype=dtype) for m in models)


def make_pass(num_requests, device="cpu"):
    """Requests with shuffled pages of 3 and more positions before the pass."""
    order = torch.randperm(NUM_PAGES - 1, generator=torch.Generator().manual_seed(1)) + 1
    pages = order[: num_requests * 8].view(num_requests, 8).int().to(device)
    first = (3 + torch.arange(num_requests, dtype=torch.int32) % 5).to(device)
    return DecodePass(pages, first, PAGE, first_key=1)


def make_pool(config, dtype, device="cpu"):
    shape = (NUM_PAGES * PAGE, config.num_kv_heads, config.head_dim)
    generator = torch.Generator().manual_seed(2)
    return tuple(torch.randn(shape, generator=generator).to(device, dtype) for _ in range(2))


def by_module(module, embed, ids, hidden, at):
    """Outputs, logits, keys and values of a pass."""
    keys, values = make_pool(module.config, hidden.dtype, hidden.device)
    scale = module.config.head_dim**-0.5

    def attend(q, k, v):
        return decode_attention(q, k, v, keys, values, at, scale)

    angles = module.rope(at.positions(at.num_query(len(ids))).flatten())
    outputs = module(embed(ids), hidden, *angles, attend)
    return outputs, module.logits(outputs), keys, values


def by_fused(fused, ids, hidden, at):
    keys, values = make_pool(fused.module.config, hidden.dtype, hidden.device)
    scale = fused.module.config.head_dim**-0.5
    places = places_of(at, at.num_query(len(ids)))

    def attend(q):
        return decode_attention(q, None, None, keys, values, at, scale)

    outputs, squares = fused.forward(
        ids, hidden, places.positions.flatten(), places.slots.flatten(), attend, keys, values
    )
    return outputs, fused.logits(outputs, squares), keys, values


def relative_error(got, want):
    return ((got - want).float().norm() / want.float().norm()).item()


def make_rows(num_rows, width, dtype=torch.float32, device="cpu"):
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(0, VOCAB, (num_rows,), generator=generator)
    hidden = torch.randn(num_rows, width, generator=generator)
    return ids.to(device), hidden.to(device, dtype)


@pytest.mark.parametrize("use_kernels", [False, True])
@pytest.mark.parametrize("draft_vocab", [VOCAB, 30])
@pytest.mark.parametrize(("num_requests", "num_query"), [(1, 1), (1, 5), (5, 1), (2, 5), (3, 8)])
def test_a_pass_equals_the_module(use_kernels, draft_vocab, num_requests, num_query):
    """Both sides of ``few_rows``, and one or two rows, which have kernels of their own."""
    module, embed = make_drafter(draft_vocab)
    ids, hidden = make_rows(num_requests * num_query, 48)
    given = hidden.clone()
    at = make_pass(num_requests)

    fused = FusedEagle3(module, embed, 64, few_rows=10, use_kernels=use_kernels)
    got, want = by_fused(fused, ids, hidden, at), by_module(module, embed, ids, hidden, at)

    assert got[1].shape == (len(ids), draft_vocab)
    for ours, theirs in zip(got, want, strict=True):
        assert relative_error(ours, theirs) < 2e-6
    assert relative_error(fused.logits(got[0]), want[1]) < 2e-6  # without the squares
    assert torch.equal(hidden, given)


@pytest.mark.parametrize("num_rows", [4, 16])
@pytest.mark.parametrize(("dtype", "use_kernels"), [(torch.bfloat16, False), (torch.float16, True)])
def test_half_precision_is_hardly_further_off_than_the_module(num_rows, dtype, use_kernels):
    module, embed = make_drafter(dtype=dtype)
    ids, hidden = make_rows(num_rows, 48, dtype)
    at = make_pass(num_rows // 4)
    wide = [copy.deepcopy(m).double() for m in (module, embed)]
    exact = by_module(*wide, ids, hidden.double(), at)[:2]

    fused = FusedEagle3(module, embed, 64, few_rows=10, use_kernels=use_kernels)
    got = by_fused(fused, ids, hidden, at)
    theirs = by_module(module, embed, ids, hidden, at)

    assert fused.logits(got[0]).dtype == dtype
    for ours, other, best in zip(got[:2], theirs[:2], exact, strict=True):
        assert relative_error(ours, best) < 2 * relative_error(other, best)


@pytest.mark.parametrize("num_rows", [3, 12])
def test_fused_features_are_the_module_s(num_rows):
    module, embed = make_drafter()
    features = torch.randn(num_rows, 3 * 48, generator=torch.Generator().manual_seed(4))
    for use_kernels in (False, True):
        fused = FusedEagle3(module, embed, 64, few_rows=10, use_kernels=use_kernels)
        assert relative_error(fused.fuse(features), module.fuse(features)) < 2e-6


def test_new_weights_are_in_force_at_the_next_pass():
    """Copied into the parameters, or moved elsewhere as a flat buffer's views are."""
    module, embed = make_drafter()
    fused = FusedEagle3(module, embed, 64, few_rows=10)
    ids, hidden = make_rows(4, 48)
    at = make_pass(2)
    former = by_fused(fused, ids, hidden, at)

    for index, parameter in enumerate(module.parameters()):
        if index % 2:
            parameter.add_(torch.randn_like(parameter))
        else:
            parameter.data = parameter + torch.randn_like(parameter)
        got, want = by_fused(fused, ids, hidden, at), by_module(module, embed, ids, hidden, at)
        assert relative_error(got[1], want[1]) < 1e-5
        if index:  # fc is no part of a pass
            assert relative_error(got[1], former[1]) > 1e-3
        former = got


@pytest.mark.parametrize("draft_vocab", [VOCAB, 30])
def test_packed_weights_give_the_same_and_follow_new_ones(draft_vocab):
    module, embed = make_drafter(draft_vocab)
    fused = FusedEagle3(module, embed, 64, packs=True)
    ids, hidden = make_rows(4, 48)
    features = torch.randn(4, 3 * 48, generator=torch.Generator().manual_seed(4))
    at = make_pass(2)

    for new_weights in (False, True):
        if new_weights:
            for parameter in module.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))
            fused.follow()
        got, want = by_fused(fused, ids, hidden, at), by_module(module, embed, ids, hidden, at)
        for ours, theirs in zip(got, want, strict=True):
            assert relative_error(ours, theirs) < 2e-6
        assert relative_error(fused.fuse(features), module.fuse(features)) < 2e-6


@pytest.mark.parametrize("use_kernels", [False, True])
@pytest.mark.parametrize("draft_vocab", [VOCAB, 30])
def test_the_same_is_drafted_as_by_the_module(draft_vocab, use_kernels):
    """Rows of three verified tokens, then drafts behind them."""
    module, embed = make_drafter(draft_vocab)
    paged = [PagedEagle3(module, embed, NUM_PAGES * PAGE) for _ in range(2)]
    assert paged[1].fuse(num_positions=64, few_rows=10, use_kernels=use_kernels) is None
    assert [p.is_fused for p in paged] == [False, True]
    ids, _ = make_rows(4 * 3, 48)
    features = torch.randn(len(ids), 3, 48, generator=torch.Generator().manual_seed(5))
    at = make_pass(4)
    after = replace(at, first_R=at.first_R + 3)

    found = []
    for drafter in paged:
        outputs = drafter.observe(ids, features, at)
        seen = []

        def choose(logits, number, seen=seen):
            seen.append((number, logits))
            return module.to_target_ids(logits.argmax(-1))

        drafts = [drafter.propose(outputs[2::3], after, k, choose) for k in (5, 1)]
        found.append((outputs, drafts, seen))

    (want_outputs, want, want_seen), (outputs, got, seen) = found
    assert relative_error(outputs, want_outputs) < 2e-6
    assert all(map(torch.equal, got, want)) and got[0].shape == (4, 5)
    assert len(got[0].unique()) > 5
    for (number, logits), (want_number, want_logits) in zip(seen, want_seen, strict=True):
        assert number == want_number and relative_error(logits, want_logits) < 1e-5

    d2t = None if paged[1].vocab is None else paged[1].vocab.d2t_D
    best = [drafter.propose(outputs[2::3], after, 5, Best(d2t)) for drafter in paged]
    assert all(torch.equal(tokens, got[0]) for tokens in best)


@pytest.mark.parametrize("use_kernels", [False, True])
def test_a_draft_goes_on_behind_tokens_of_text(use_kernels):
    """Some requests' first tokens come from text, and the passes read those."""
    module, embed = make_drafter()
    paged = [PagedEagle3(module, embed, NUM_PAGES * PAGE) for _ in range(2)]
    assert paged[1].fuse(num_positions=64, few_rows=10, use_kernels=use_kernels) is None
    text, outputs = torch.randint(VOCAB, (4, 6)), torch.randn(4, 48)
    is_text = torch.arange(6) < torch.tensor([[0], [1], [3], [2]])

    def drafts(is_taken):
        best = Best(None, AfterText(text, is_taken, 5))
        return [drafter.propose(outputs, make_pass(4), 5, best) for drafter in paged]

    want, got = drafts(is_text)
    assert torch.equal(got, want)
    assert torch.equal(got[is_text[:, :5]], text[is_text])
    assert not torch.equal(got[:, 3:], drafts(torch.zeros_like(is_text))[1][:, 3:])


class Scaled(torch.nn.Embedding):
    """An embedding that does more than look up."""


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        pytest.param(lambda: make_drafter(), None, id="EAGLE-3"),
        pytest.param(lambda: make_drafter(30), None, id="reduced vocabulary"),
        pytest.param(lambda: make_drafter(dtype=torch.float64), "are torch.float64", id="64 bits"),
        pytest.param(lambda: make_drafter(head_dim=12), "12 is not a power of two", id="heads"),
        pytest.param(lambda: (make_drafter()[0], Scaled(VOCAB, 48)), "is a Scaled", id="scaled"),
        pytest.param(
            lambda: (make_drafter()[0], torch.nn.Embedding(VOCAB, 48, max_norm=1.0)),
            "max_norm",
            id="max_norm",
        ),
        pytest.param(
            lambda: (make_drafter()[0], torch.nn.Embedding(VOCAB - 1, 48)),
            "89 by 48, not 90 by 48",
            id="smaller embedding",
        ),
        pytest.param(
            lambda: (make_drafter()[0], make_drafter()[1].bfloat16()), "2 dtypes", id="dtypes"
        ),
    ],
)  # fmt: skip
def test_only_what_is_computed_the_same_way_is_supported(make, reason):
    module, embed = make()

    found = supports(module, embed)

    if reason is None:
        assert found is None
    else:
        assert found is not None and reason in found
        with pytest.raises(ValueError, match="cannot be fused"):
            FusedEagle3(module, embed, 64)
        assert PagedEagle3(module, embed, 8).fuse(64) == found


def test_a_bias_is_not_supported():
    module, embed = make_drafter()
    module.o_proj = torch.nn.Linear(64, 48)
    assert supports(module, embed) == "o_proj has a bias"


LARGE = {
    1024: {"hidden_size": 1024, "intermediate_size": 3072, "num_heads": 16, "num_kv_heads": 8},
    4096: {"hidden_size": 4096, "intermediate_size": 12_288, "num_heads": 32, "num_kv_heads": 8},
}


@pytest.mark.gpu
@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("hidden_size", LARGE)
@pytest.mark.parametrize(("num_requests", "num_query"), [(1, 1), (2, 1), (1, 5), (4, 4), (4, 8)])
def test_the_compiled_kernels_equal_the_module(hidden_size, num_requests, num_query, overlap):
    """In bfloat16 against the same weights in float32: hardly further off than the module."""
    if overlap and not can_overlap(torch.device("cuda")):
        pytest.skip("needs compute capability 9.0")
    shape = LARGE[hidden_size] | {"head_dim": 128}
    module, embed = make_drafter(dtype=torch.bfloat16, device="cuda", **shape)
    ids, hidden = make_rows(num_requests * num_query, hidden_size, torch.bfloat16, "cuda")
    at = make_pass(num_requests, "cuda")
    wide = [copy.deepcopy(m).float() for m in (module, embed)]
    exact = by_module(*wide, ids, hidden.float(), at)[:2]

    fused = FusedEagle3(module, embed, 64, overlap=overlap)
    got = by_fused(fused, ids, hidden, at)
    theirs = by_module(module, embed, ids, hidden, at)

    for ours, other, best in zip(got[:2], theirs[:2], exact, strict=True):
        assert relative_error(ours, best) < 2 * relative_error(other, best)
    for ours, other in zip(got[2:], theirs[2:], strict=True):
        assert relative_error(ours, other) < 1e-2
    features = torch.randn(len(ids), 3 * hidden_size, device="cuda").bfloat16()
    assert relative_error(fused.fuse(features), module.fuse(features)) < 1e-2


@pytest.mark.gpu
@pytest.mark.parametrize("overlap", [False, True])
def test_a_captured_draft_repeats_itself_and_follows_new_weights(overlap):
    if overlap and not can_overlap(torch.device("cuda")):
        pytest.skip("needs compute capability 9.0")
    shape = LARGE[1024] | {"head_dim": 128}
    module, embed = make_drafter(dtype=torch.bfloat16, device="cuda", **shape)
    at = make_pass(2, "cuda")
    drafter = PagedEagle3(module, embed, NUM_PAGES * PAGE)
    assert drafter.fuse(64, overlap=overlap) is None
    _, outputs = make_rows(2, 1024, torch.bfloat16, "cuda")
    kept = []

    def choose(logits, _number):
        kept.append(logits)
        return logits.argmax(-1)

    def draft():
        kept.clear()
        return drafter.propose(outputs, at, 4, choose), torch.stack(kept)

    first = [t.clone() for t in draft()]
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = draft()
    for _ in range(20):
        graph.replay()
        for one, again in zip(first, captured, strict=True):
            assert torch.equal(one, again)

    for parameter in module.parameters():
        parameter.add_(torch.randn_like(parameter) / 8)
    graph.replay()
    assert not torch.equal(first[1], captured[1])
    for one, again in zip(draft(), captured, strict=True):
        assert torch.equal(one, again)
