"""The fused decoder computes the same as the Hugging Face model, over pages, and refuses models for
which it would not."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from specops.attention import group_attention, make_group
from specops.cpu_operations import can_pack
from specops.overlap_triton import can_overlap
from targets.fused import FusedDecoder, supports
from targets.target import KvPool

SMALL = {
    "vocab_size": 90,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 64,
    "bos_token_id": None,
    "eos_token_id": None,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}


def qwen3(**changes):
    torch.manual_seed(0)
    return roughen(Qwen3ForCausalLM(Qwen3Config(**SMALL | changes)))


def llama(**changes):
    torch.manual_seed(0)
    config = LlamaConfig(**SMALL | {"rope_parameters": LLAMA3} | changes)
    return roughen(LlamaForCausalLM(config))


def qwen2(**changes):
    torch.manual_seed(0)
    return roughen(Qwen2ForCausalLM(Qwen2Config(**SMALL | changes)))


def mistral(**changes):
    torch.manual_seed(0)
    return roughen(MistralForCausalLM(MistralConfig(**SMALL | {"sliding_window": None} | changes)))


def gemma3(**changes):
    """Layers 0 and 1 see 6 keys; all four kinds of its norms and both rotary bases matter."""
    torch.manual_seed(0)
    shape = {
        "query_pre_attn_scalar": 24,
        "sliding_window": 6,
        "layer_types": ["sliding_attention", "sliding_attention", "full_attention"],
    }
    return roughen(Gemma3ForCausalLM(Gemma3TextConfig(**SMALL | shape | changes)))


def roughen(model):
    """Vary norm weights and enlarge matrices, so that every layer matters."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter += torch.randn_like(parameter) / 4
            else:
                parameter *= 4
    return model.eval().requires_grad_(False)


MODELS = [
    pytest.param(partial(qwen3, tie_word_embeddings=True), id="Qwen3, tied"),
    pytest.param(partial(qwen3, tie_word_embeddings=False), id="Qwen3, untied"),
    pytest.param(partial(llama, tie_word_embeddings=True), id="Llama, tied"),
    pytest.param(partial(llama, tie_word_embeddings=False), id="Llama, untied"),
    pytest.param(partial(qwen2, tie_word_embeddings=True), id="Qwen2"),
    pytest.param(partial(mistral, sliding_window=5), id="Mistral, window"),
    pytest.param(mistral, id="Mistral, no window"),
    pytest.param(gemma3, id="Gemma 3"),
]
KERNELS = [MODELS[0], MODELS[3], MODELS[4], MODELS[7]]
"""To a kernel a tied head is only another address: one of each kind is enough."""


class Pages:
    """Two sequences of ``length`` positions in shuffled slots of one pool."""

    def __init__(self, config, length, dtype=torch.float32, device="cpu"):
        num_slots = 2 * length + 3
        self.pool = KvPool(
            config.num_hidden_layers, num_slots, config.num_key_value_heads, config.head_dim,
            dtype, torch.device(device),
        )  # fmt: skip
        generator = torch.Generator().manual_seed(1)
        order = torch.randperm(num_slots - 1, generator=generator)[: 2 * length] + 1
        self.slots = order.view(2, length).to(device)

    def run(self, decoder, ids, start, end, taps):
        """One causal pass over positions start..end - 1 of both sequences."""
        positions = torch.arange(start, end, device=ids.device).expand(2, -1).contiguous()
        group = make_group(0, self.slots[:, :end], positions)

        def attend(layer, q):
            q = q.view(2, end - start, *q.shape[1:])
            keys, values = self.pool.keys[layer], self.pool.values[layer]
            window = decoder.layers[layer].window
            mixed = group_attention(q, keys, values, group, decoder.scale, window, None)
            return mixed.flatten(0, 1)

        return decoder.forward(
            ids[:, start:end].flatten(), positions.flatten(), self.slots[:, start:end].flatten(),
            attend, self.pool, taps,
        )  # fmt: skip


def by_hugging_face(model, ids, taps):
    """Features [2, S, m, H], hidden [2, S, H] and logits [2, S, V] of both sequences at once."""
    stream = {}
    hooks = [
        model.model.embed_tokens.register_forward_hook(lambda *a: stream.update({0: a[2]})),
        model.model.norm.register_forward_hook(lambda *a: stream.update(hidden=a[2])),
    ]
    for index, layer in enumerate(model.model.layers):
        hooks.append(
            layer.register_forward_hook(lambda *a, at=index + 1: stream.update({at: a[2]}))
        )
    logits = model(input_ids=ids, use_cache=False).logits
    for hook in hooks:
        hook.remove()
    return torch.stack([stream[k] for k in taps], dim=2), stream["hidden"], logits


def relative_error(got, want):
    return ((got - want).norm() / want.norm()).item()


def compare(decoder, pages, want, ids, pieces, taps):
    """Largest relative error over passes that end at ``pieces``."""
    start, worst = 0, 0.0
    for end in pieces:
        features, hidden = pages.run(decoder, ids, start, end, taps)
        logits = decoder.logits(hidden)
        for got, whole in zip((features, hidden, logits), want, strict=True):
            worst = max(worst, relative_error(got, whole[:, start:end].flatten(0, 1)))
        start = end
    return worst


@pytest.mark.parametrize(
    ("make_model", "use_kernels"),
    [
        *(pytest.param(*model.values, False, id=model.id) for model in MODELS),
        *(pytest.param(*model.values, True, id=f"{model.id}, kernels") for model in KERNELS),
    ],
)
def test_every_pass_equals_hugging_face(make_model, use_kernels):
    """A long prompt chunk, then steps of 1, 2 and 5 tokens: above and below ``few_rows``."""
    model, taps = make_model(), (3, 0, 2)
    ids = torch.randint(0, 90, (2, 24), generator=torch.Generator().manual_seed(2))
    want = by_hugging_face(model, ids, taps)

    decoder = FusedDecoder(model, few_rows=10, use_kernels=use_kernels)
    pages = Pages(model.config, 24)

    assert compare(decoder, pages, want, ids, (16, 17, 19, 24), taps) < 1e-5
    # The model's own forward still works on the fused weights.
    assert relative_error(by_hugging_face(model, ids, taps)[2], want[2]) < 1e-6


@pytest.mark.parametrize("make_model", MODELS)
def test_packed_weights_give_the_same_and_follow_new_ones(make_model):
    model, taps = make_model(), (3, 0, 2)
    ids = torch.randint(0, 90, (2, 24), generator=torch.Generator().manual_seed(2))
    decoder = FusedDecoder(model, packs=True)
    if not can_pack([decoder.head]):
        pytest.skip("this build of torch has no oneDNN")

    for new_weights in (False, True):
        if new_weights:
            for parameter in model.parameters():
                parameter.add_(0.02 * torch.randn_like(parameter))
            decoder.follow()
        want = by_hugging_face(model, ids, taps)
        got = compare(decoder, Pages(model.config, 24), want, ids, (16, 17, 19, 24), taps)
        assert got < 1e-5


def test_weights_are_read_in_place():
    model = qwen3()
    memory = sum(p.numel() for p in model.parameters())
    decoder = FusedDecoder(model)
    layer = model.model.layers[1]
    fused = decoder.layers[1]
    storages = {p.untyped_storage().data_ptr(): p.untyped_storage() for p in model.parameters()}

    c = model.config
    padding = 2 * 16 * c.hidden_size * c.num_hidden_layers  # of the two joined weights of a layer
    stored = sum(s.nbytes() for s in storages.values())
    assert stored == 4 * (memory + padding), "nothing is stored twice"
    layer.self_attn.v_proj.weight.fill_(3.0)
    layer.mlp.up_proj.weight.fill_(5.0)
    assert (fused.qkv[96:] == 3).all() and not (fused.qkv[:96] == 3).any()
    assert (fused.gate_up[80:] == 5).all() and not (fused.gate_up[:80] == 5).any()


def test_a_tap_is_not_overwritten_by_later_layers():
    model = llama()
    decoder, pages = FusedDecoder(model), Pages(model.config, 3)
    ids = torch.tensor([[1, 2, 3], [4, 5, 6]])

    all_taps, hidden = pages.run(decoder, ids, 0, 3, (0, 1, 2, 3))
    none, same = pages.run(decoder, ids, 0, 3, ())

    assert none.shape == (6, 0, 0)
    torch.testing.assert_close(same, hidden, atol=0, rtol=0)
    assert len({all_taps[:, k].sum().item() for k in range(4)}) == 4
    with pytest.raises(ValueError, match="tapped only once"):
        pages.run(decoder, ids, 0, 3, (1, 1))


@pytest.mark.parametrize(
    ("make_model", "reason"),
    [
        pytest.param(qwen3, None, id="Qwen3"),
        pytest.param(llama, None, id="Llama"),
        pytest.param(
            lambda: llama(rope_parameters={"rope_type": "default", "rope_theta": 1e4}),
            None,
            id="plain RoPE",
        ),
        pytest.param(
            lambda: qwen3(attention_bias=True), "self_attn.o_proj has a bias", id="attention bias"
        ),
        pytest.param(lambda: llama(mlp_bias=True), "gate_proj has a bias", id="MLP bias"),
        pytest.param(
            lambda: qwen3(use_sliding_window=True, sliding_window=8, max_window_layers=1),
            None,
            id="sliding layers",
        ),
        pytest.param(lambda: llama(hidden_act="gelu"), "mlp.act_fn is a GELU", id="activation"),
        pytest.param(
            lambda: llama(
                rope_parameters={"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}
            ),
            "type dynamic depends on",
            id="RoPE by length",
        ),
        pytest.param(
            lambda: qwen3(head_dim=24), "24 is below 4 or not a power of two", id="head dimension"
        ),
        pytest.param(
            lambda: Gemma2ForCausalLM(Gemma2Config(**SMALL)),
            "Gemma2ForCausalLM is not among Gemma3ForCausalLM, LlamaForCausalLM",
            id="Gemma 2",
        ),
        pytest.param(
            lambda: gemma3(final_logit_softcapping=30.0), "logits are capped at 30.0", id="softcap"
        ),
        pytest.param(
            lambda: gemma3(use_bidirectional_attention=True), "bidirectional", id="bidirectional"
        ),
    ],
)
def test_only_models_that_come_out_the_same_are_supported(make_model, reason):
    model = make_model()

    found = supports(model)

    if reason is None:
        assert found is None
    else:
        assert found is not None and reason in found
        with pytest.raises(ValueError, match="cannot be fused"):
            FusedDecoder(model)


def test_a_replaced_module_is_not_supported():
    model = qwen3()
    model.model.layers[2].mlp.down_proj = torch.nn.Bilinear(2, 2, 2)
    assert supports(model) == "model.layers.2.mlp.down_proj is a Bilinear"


@pytest.mark.gpu
@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("make_model", MODELS)
def test_the_compiled_kernels_equal_hugging_face(make_model, overlap):
    """In bfloat16, the error against float32 is at most twice that of Hugging Face."""
    if overlap and not can_overlap(torch.device("cuda")):
        pytest.skip("needs compute capability 9.0")
    shape = {"hidden_size": 1024, "intermediate_size": 3072, "head_dim": 128, "vocab_size": 2000}
    model, taps = make_model(**shape), (0, 3)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.div_(4 if parameter.dim() > 1 else 1).copy_(parameter.bfloat16())
    model.cuda()
    ids = torch.randint(0, 2000, (2, 40), device="cuda")
    exact = by_hugging_face(model, ids, taps)
    model.bfloat16()
    model.model.rotary_emb = type(model.model.rotary_emb)(model.config).cuda()
    pairs = zip(by_hugging_face(model, ids, taps), exact, strict=True)
    theirs = [relative_error(got.float(), want) for got, want in pairs]

    decoder = FusedDecoder(model, overlap=overlap, ahead_bytes=1 << 20)
    pages = Pages(model.config, 40, torch.bfloat16, "cuda")
    worst = compare(decoder, pages, exact, ids, (20, 21, 22, 27, 35, 40), taps)

    assert worst < 2 * max(theirs)


@pytest.mark.gpu
@pytest.mark.parametrize("overlap", [False, True])
def test_a_captured_step_repeats_itself(overlap):
    if overlap and not can_overlap(torch.device("cuda")):
        pytest.skip("needs compute capability 9.0")
    model = qwen3(hidden_size=1024, head_dim=128).cuda().bfloat16()
    decoder = FusedDecoder(model, overlap=overlap)
    pages = Pages(model.config, 24, torch.bfloat16, "cuda")
    ids = torch.randint(0, 90, (2, 24), device="cuda")
    pages.run(decoder, ids, 0, 20, ())
    eager = [t.clone() for t in pages.run(decoder, ids, 20, 24, (1, 2))]

    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = pages.run(decoder, ids, 20, 24, (1, 2))

    for _ in range(20):
        graph.replay()
        for first, again in zip(eager, captured, strict=True):
            assert torch.equal(first, again)
