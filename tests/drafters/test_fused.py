"""Fused passes of drafters with layers of Llama's form compute what their modules do, over pages,
follow new weights, and refuse what they would not compute."""

from __future__ import annotations

import copy
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from drafters.dflash.model import DFlash, DFlashConfig
from drafters.dflash.paged import PagedDFlash
from drafters.eagle3.model import Eagle3Config
from drafters.mtp import Mtp, MtpConfig, PagedMtp
from drafters.p_eagle import PagedPEagle, PEagle, PEagleConfig
from drafters.protocol import weights_were_overwritten
from serving.swap.flat_weights import FlatWeights
from specops.attention import DecodePass
from specops.device import best_ids
from specops.overlap_triton import can_overlap

PAGE, NUM_PAGES, VOCAB = 4, 41, 90
SMALL = {
    "hidden_size": 40, "intermediate_size": 56, "num_heads": 4, "num_kv_heads": 2, "head_dim": 16,
}  # fmt: skip
LARGE = {
    "hidden_size": 1024, "intermediate_size": 3072, "num_heads": 16, "num_kv_heads": 8,
    "head_dim": 128,
}  # fmt: skip
TAPS = (1, 2, 3)


def p_eagle(shape, num_layers=2, draft_vocab=VOCAB):
    first = Eagle3Config(
        target_vocab_size=VOCAB, draft_vocab_size=draft_vocab, layer_ids=TAPS, rms_norm_eps=1e-5,
        rope_theta=1e4, **shape,
    )  # fmt: skip
    return PEagle(PEagleConfig(first, num_layers, VOCAB - 1))


def dflash(shape, windows=(None, None), causal=(False, False)):
    config = DFlashConfig(
        target_vocab_size=VOCAB, layer_ids=TAPS, block_size=8, mask_token_id=VOCAB - 2,
        windows=windows, causal=causal, rms_norm_eps=1e-5, rope_theta=1e4, **shape,
    )  # fmt: skip
    return DFlash(config)


def mtp(shape, order="deepseek_v3", draft_vocab=VOCAB, **parts):
    config = MtpConfig(
        target_vocab_size=VOCAB, draft_vocab_size=draft_vocab, layer_ids=(3,), rms_norm_eps=1e-5,
        rope_theta=1e4, order=order, **{"rotary_dim": shape["head_dim"], **shape, **parts},
    )  # fmt: skip
    return Mtp(config)


KINDS = {
    "p_eagle": p_eagle,
    "p_eagle, one layer": lambda shape: p_eagle(shape, num_layers=1),
    "p_eagle, reduced vocabulary": lambda shape: p_eagle(shape, draft_vocab=30),
    "dflash": dflash,
    "dflash, a window and causal": lambda shape: dflash(shape, (6, None), (True, False)),
    "mtp": mtp,
    "mtp, hidden state first, reduced vocabulary": lambda s: mtp(s, "mimo", draft_vocab=30),
    "mtp, biases and norms of heads": lambda s: mtp(s, has_bias=True, has_head_norms=True),
}
DRAFTERS = ("p_eagle", "dflash", "mtp")


def make(kind, dtype=torch.float32, device="cpu", shape=SMALL):
    """A module of which every part matters, the target's embedding, and its lm_head [V, H]."""
    module = KINDS[kind](shape)
    generator = torch.Generator().manual_seed(0)
    for name, parameter in module.named_parameters():
        drawn = torch.randn(parameter.shape, generator=generator)
        with torch.no_grad():
            if parameter.dim() == 2:  # outputs of size 1
                drawn *= parameter.shape[1] ** -0.5 * (3 if "head" in name else 1)
            elif "mask" not in name:
                drawn = drawn / 4 + ("bias" not in name)
            parameter.copy_(drawn)
    if getattr(module, "d2t", None) is not None:
        module.d2t += 2 * torch.arange(len(module.d2t))  # draft id i is target id 3 i
    embed = torch.nn.Embedding(VOCAB, shape["hidden_size"])
    with torch.no_grad():
        embed.weight.copy_(torch.randn(embed.weight.shape, generator=generator))
    head = torch.randn(VOCAB, shape["hidden_size"], generator=generator) / 4
    for one in (module, embed):
        one.requires_grad_(False).to(device=device, dtype=dtype)
    return module, embed, head.to(device, dtype)


def paged_of(made):
    """A drafter over pages that uses the parts of ``make``."""
    module, embed, head = made
    slots = NUM_PAGES * PAGE
    if isinstance(module, DFlash):
        return PagedDFlash(module, embed, lambda x: torch.nn.functional.linear(x, head), slots)
    if isinstance(module, Mtp):
        return PagedMtp(module, embed, slots, head)
    return PagedPEagle(module, embed, slots)


def make_rows(drafter, num_requests, num_query, dtype=torch.float32, device="cpu"):
    """Tokens and features of verified rows, and a pass over them: shuffled pages, and positions
    from 1 on."""
    order = torch.randperm(NUM_PAGES - 1, generator=torch.Generator().manual_seed(1)) + 1
    pages = order[: num_requests * 8].view(num_requests, 8).int().to(device)
    first = (1 + torch.arange(num_requests, dtype=torch.int32) % 3).to(device)
    generator = torch.Generator().manual_seed(5)
    ids = torch.randint(0, VOCAB, (num_requests * num_query,), generator=generator)
    shape = (len(ids), len(drafter.layer_ids), drafter.output_size)
    features = torch.randn(shape, generator=generator)
    at = DecodePass(pages, first, PAGE, first_key=1)
    return ids.to(device), features.to(device, dtype), at


def draft(drafter, rows, num_query, sizes):
    """Outputs of verified rows, and tokens and logits of drafts behind each request's last."""
    ids, features, at = rows
    outputs = drafter.observe(ids, features, at)
    after = replace(at, first_R=at.first_R + num_query)
    d2t = None if drafter.vocab is None else drafter.vocab.d2t_D
    tokens, seen = [], []
    for size in sizes:

        def choose(logits, number):
            assert logits.is_contiguous()
            seen.append((number, logits))
            return best_ids(logits, d2t)

        tokens.append(drafter.propose(outputs[num_query - 1 :: num_query], after, size, choose))
    return SimpleNamespace(outputs=outputs, tokens=tokens, numbers=[n for n, _ in seen],
                           logits=[x for _, x in seen])  # fmt: skip


def disturb(parameter):
    generator = torch.Generator(parameter.device).manual_seed(parameter.numel())
    noise = torch.randn(parameter.shape, generator=generator, device=parameter.device)
    parameter.add_((noise * 0.2).to(parameter.dtype))


def kept(drafter):
    """Keys and values of all layers at slots of requests; padding goes to page 0."""
    if isinstance(drafter, PagedMtp):
        pools = (drafter.keys, drafter.values)
    else:
        pools = (*drafter.pool.keys, *drafter.pool.values)
    return torch.stack([pool[PAGE:] for pool in pools])


def relative_error(got, want):
    return ((got - want).float().norm() / want.float().norm()).item()


@pytest.mark.parametrize("use_kernels", [False, True])
@pytest.mark.parametrize("num_requests", [1, 5])
@pytest.mark.parametrize("kind", KINDS)
def test_the_same_is_drafted_as_by_the_module(kind, num_requests, use_kernels):
    """Rows of three verified tokens, then drafts behind them; both sides of ``few_rows``."""
    made = make(kind)
    module, fused = paged_of(made), paged_of(made)
    if use_kernels and isinstance(fused, PagedMtp):  # a CPU has its copy by columns
        fused._head_weight = fused._head_weight.contiguous()
    assert fused.fuse(64, few_rows=10, use_kernels=use_kernels, packs=False) is None
    assert [one.is_fused for one in (module, fused)] == [False, True]
    rows, sizes = make_rows(module, num_requests, 3), (3,) if use_kernels else (5, 1)

    want, got = (draft(one, rows, 3, sizes) for one in (module, fused))

    assert relative_error(got.outputs, want.outputs) < 2e-6
    assert all(map(torch.equal, got.tokens, want.tokens))
    assert [t.shape for t in got.tokens] == [(num_requests, size) for size in sizes]
    assert got.numbers == want.numbers == [number for size in sizes for number in range(size)]
    for ours, theirs in zip(got.logits, want.logits, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(kept(fused), kept(module), atol=1e-4, rtol=1e-4)
    assert relative_error(got.logits[1], got.logits[2]) > 0.02, "positions differ"


@pytest.mark.parametrize("num_requests", [1, 5])
@pytest.mark.parametrize(("dtype", "use_kernels"), [(torch.bfloat16, False), (torch.float16, True)])
@pytest.mark.parametrize("kind", DRAFTERS)
def test_half_precision_is_hardly_further_off_than_the_module(
    kind, dtype, use_kernels, num_requests
):
    made = make(kind, dtype)
    exact = paged_of([copy.deepcopy(one).double() for one in made])
    module, fused = paged_of(made), paged_of(made)
    assert fused.fuse(64, few_rows=10, use_kernels=use_kernels) is None
    ids, features, at = make_rows(module, num_requests, 3, dtype)

    best = draft(exact, (ids, features.double(), at), 3, (2,))
    theirs, ours = (draft(one, (ids, features, at), 3, (2,)) for one in (module, fused))

    for own, other, right in zip(ours.logits[:1], theirs.logits, best.logits, strict=False):
        assert own.dtype == dtype
        assert relative_error(own, right) < 2 * relative_error(other, right) + 1e-3


@pytest.mark.parametrize("is_flat", [False, True])
@pytest.mark.parametrize("how", ["kernels", "packed"])
@pytest.mark.parametrize("kind", DRAFTERS)
def test_new_weights_are_in_force_when_they_were_announced(kind, how, is_flat):
    """Each parameter, overwritten where it lies, as a swap does."""
    made = make(kind)
    if is_flat:
        FlatWeights(made[0])
    module, fused = paged_of(made), paged_of(made)
    options = {"few_rows": 10, "use_kernels": True} if how == "kernels" else {}
    assert fused.fuse(64, **options) is None
    rows = make_rows(module, 2, 3)
    before = draft(fused, rows, 3, (3,))

    for parameter in made[0].parameters():
        disturb(parameter)
    weights_were_overwritten(fused)
    want, got = (draft(one, rows, 3, (3,)) for one in (module, fused))

    for ours, theirs, former in zip(got.logits, want.logits, before.logits, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)
        assert relative_error(ours, former) > 1e-2


@pytest.mark.parametrize("kind", DRAFTERS)
def test_every_parameter_of_a_draft_is_followed(kind):
    made = make(kind)
    module, fused = paged_of(made), paged_of(made)
    assert fused.fuse(64) is None
    rows = make_rows(module, 1, 2)

    for name, parameter in made[0].named_parameters():
        before = draft(fused, rows, 2, (3,)).logits
        disturb(parameter)
        weights_were_overwritten(fused)
        want, got = (draft(one, rows, 2, (3,)).logits for one in (module, fused))
        assert not all(map(torch.equal, before, got)), name
        for ours, theirs in zip(got, want, strict=True):
            torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4, msg=name)


def test_weights_that_swaps_overwrite_are_read_where_they_lie():
    """Except those of the context, which are joined over all layers."""
    module, embed, head = make("dflash")
    flat = FlatWeights(module).flat
    drafter = paged_of((module, embed, head))
    assert drafter.fuse(64, use_kernels=True) is None

    weights = drafter._fused.layers._parts.weights
    own = [w for w in weights if w.untyped_storage().data_ptr() == flat.data_ptr()]
    assert len(weights) == 2 + 4 * 2 and len(own) == len(weights) - 1


class Scaled(torch.nn.Embedding):
    """An embedding that does more than look up."""


def with_embedding(embed):
    return lambda kind: (make(kind)[0], embed, make(kind)[2])


COMMON = [
    (lambda kind: make(kind, torch.float64), "the weights are torch.float64"),
    (lambda kind: make(kind, shape={**SMALL, "head_dim": 12}), "12 is not a power of two"),
    (with_embedding(Scaled(VOCAB, 40)), "embedding is a Scaled"),
    (with_embedding(torch.nn.Embedding(VOCAB, 40, max_norm=1.0)), "max_norm"),
    (with_embedding(torch.nn.Embedding(VOCAB - 1, 40)), "89 by 40, not 90 by 40"),
]


@pytest.mark.parametrize("case", range(len(COMMON)))
@pytest.mark.parametrize("kind", DRAFTERS)
def test_only_what_is_computed_the_same_way_is_fused(kind, case):
    change, reason = COMMON[case]
    drafter = paged_of(change(kind))

    found = drafter.fuse(64)

    assert found is not None and reason in found
    assert not drafter.is_fused


@pytest.mark.parametrize(
    ("parts", "reason"),
    [
        ({"has_output_gate": True}, "has a gate"),
        ({"rotary_dim": 8}, "RoPE rotates only 8 of 16 elements"),
    ],
)
def test_heads_with_further_parts_are_not_fused(parts, reason):
    embed = torch.nn.Embedding(VOCAB, 40)
    drafter = PagedMtp(mtp(SMALL, **parts), embed, NUM_PAGES * PAGE, embed.weight)

    found = drafter.fuse(64)

    assert found is not None and reason in found


# ---- on a GPU ----------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("num_requests", [1, 4, 5])
@pytest.mark.parametrize("kind", KINDS)
def test_the_compiled_kernels_equal_the_module(kind, num_requests, overlap):
    """In float32 within 1e-4; in bfloat16 the error against float32 is hardly larger than the
    module's. Four requests observe 16 rows, which are few; five do not."""
    if overlap and not can_overlap(torch.device("cuda")):
        pytest.skip("needs compute capability 9.0")
    made = make(kind, torch.bfloat16, "cuda", LARGE)
    wide = [copy.deepcopy(one).float() for one in made]
    exact, exact_fused, module, fused = (paged_of(own) for own in (wide, wide, made, made))
    for one in (exact_fused, fused):
        assert one.fuse(64, overlap=overlap) is None
    ids, features, at = make_rows(module, num_requests, 4, torch.bfloat16, "cuda")

    best, same = (draft(one, (ids, features.float(), at), 4, (5,)) for one in (exact, exact_fused))
    theirs, ours = (draft(one, (ids, features, at), 4, (5,)) for one in (module, fused))

    for own, right in zip(same.logits, best.logits, strict=True):
        torch.testing.assert_close(own, right, atol=1e-4 * right.std().item(), rtol=1e-4)
    # Later tokens of a chain follow those drawn, which may differ where two are nearly as likely.
    own, other, right = (one.logits[0] for one in (ours, theirs, best))
    assert relative_error(own, right) < 2 * relative_error(other, right) + 1e-3


@pytest.mark.gpu
@pytest.mark.parametrize("kind", DRAFTERS)
def test_a_captured_draft_repeats_itself_and_follows_new_weights(kind):
    made = make(kind, torch.bfloat16, "cuda", LARGE)
    FlatWeights(made[0])
    drafter = paged_of(made)
    assert drafter.fuse(64) is None
    rows = make_rows(drafter, 2, 4, torch.bfloat16, "cuda")

    def once():
        found = draft(drafter, rows, 4, (4,))
        return [found.outputs, *found.tokens, *found.logits]

    first = [t.clone() for t in once()]
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = once()
    for _ in range(20):
        graph.replay()
        assert all(map(torch.equal, first, captured))

    for parameter in made[0].parameters():
        disturb(parameter)
    weights_were_overwritten(drafter)
    graph.replay()
    assert not torch.equal(first[-1], captured[-1])
    assert all(map(torch.equal, once(), captured))
