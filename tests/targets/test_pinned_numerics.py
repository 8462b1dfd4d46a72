"""With pinned numerics, a token's hidden state and logits are bitwise independent of the rest of
the batch, so batches, prompt chunks and drafts never decide between two tokens."""

from __future__ import annotations

import os

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM

from configs.schema import Settings
from serving.build import build_service
from specops import attention_triton, linear, linear_triton
from specops.attention import DecodePass, decode_slots
from specops.linear import Norm
from targets.fused import FusedDecoder
from targets.target import KvPool

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
PAGE, LENGTH = 8, 24
SMALL = {
    "vocab_size": 90, "hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16,
    "max_position_embeddings": 64, "bos_token_id": None, "eos_token_id": None,
}  # fmt: skip
LARGE = {"vocab_size": 5000, "hidden_size": 1024, "intermediate_size": 3072, "head_dim": 128}
BLOCKS, ROUNDS = (16, LENGTH), (16, 17, 22, LENGTH)
"""Ends of the passes over each sequence."""


@pytest.fixture(autouse=True)
def sums_in_order(monkeypatch):
    """Make the interpreter add products in order, as a compiled kernel does: it uses NumPy's
    matmul, whose order of summation depends on a row's position in the matrix."""
    if INTERPRETED:

        def matmul(a, b, dtype):
            return (a[:, :, None].astype(dtype) * b[None].astype(dtype)).sum(axis=1)

        monkeypatch.setattr(np, "matmul", matmul)


def model_of(make, make_config, shape):
    torch.manual_seed(0)
    model = make(make_config(**SMALL | shape)).eval().requires_grad_(False)
    for parameter in model.parameters():
        parameter.mul_(4 if parameter.dim() > 1 and not shape else 1)
    return model


def decode(model, decoder, ids_NS, ends, pinned=True):
    """[N, S, H] hidden states and [N, S, V] logits of N sequences, decoded in step."""
    num, length = ids_NS.shape
    pages_each = length // PAGE
    parameter = next(model.parameters())
    pool = KvPool(
        model.config.num_hidden_layers, (num * pages_each + 1) * PAGE,
        model.config.num_key_value_heads, model.config.head_dim, parameter.dtype, parameter.device,
    )  # fmt: skip
    pages = torch.arange(1, num * pages_each + 1, device=parameter.device, dtype=torch.int32)
    start, hidden, logits = 0, [], []
    for end in ends:
        first = torch.full((num,), start, dtype=torch.int32, device=parameter.device)
        here = DecodePass(pages.view(num, pages_each), first, PAGE)

        def attend(layer, q, here=here):
            kept = pool.keys[layer], pool.values[layer]
            return attention_triton.attend_pages(q, *kept, here, decoder.scale, pinned=pinned)

        positions = here.positions(end - start).flatten()
        slots = decode_slots(here, end - start)
        _, rows = decoder.forward(ids_NS[:, start:end].flatten(), positions, slots, attend, pool)
        hidden.append(rows.view(num, end - start, -1))
        logits.append(decoder.logits(rows).view(num, end - start, -1))
        start = end
    return torch.cat(hidden, dim=1), torch.cat(logits, dim=1)


def assert_same_bits(model, num):
    decoder = FusedDecoder(model, use_kernels=True, pinned=True)
    vocab, device = model.config.vocab_size, next(model.parameters()).device
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(0, vocab, (num, LENGTH), generator=generator).to(device)
    want = decode(model, decoder, ids, (LENGTH,))
    for rows, ends in ((slice(0, 1), BLOCKS), (slice(0, num), ROUNDS), (slice(1, num), ROUNDS)):
        got = decode(model, decoder, ids[rows], ends)
        for one, other in zip(got, want, strict=True):
            assert torch.equal(one, other[rows])
    exact = model.float()(input_ids=ids, use_cache=False).logits
    error = (want[1] - exact).norm() / exact.norm()
    assert error < (1e-5 if want[0].dtype == torch.float32 else 0.05)


MODELS = [
    pytest.param(Qwen3ForCausalLM, Qwen3Config, id="Qwen3"),
    pytest.param(LlamaForCausalLM, LlamaConfig, id="Llama"),
]


@pytest.mark.parametrize(("make", "make_config"), MODELS[:1])
def test_a_token_is_computed_alike_in_any_company(make, make_config):
    assert_same_bits(model_of(make, make_config, {}).to(DEVICE), num=2)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("make", "make_config"), MODELS)
def test_the_compiled_kernels_compute_a_token_alike_in_any_company(make, make_config, dtype):
    assert_same_bits(model_of(make, make_config, LARGE).cuda().to(dtype), num=30)


def attended(q_THD, keys, values, start, end, pinned):
    """Attention of rows start .. end - 1 of one request."""
    num_pages = len(keys) // PAGE
    pages = torch.arange(num_pages, dtype=torch.int32, device=DEVICE)[None]
    here = DecodePass(pages, torch.tensor([start], dtype=torch.int32, device=DEVICE), PAGE)
    return attention_triton.attend_pages(q_THD[start:end], keys, values, here, 0.25, pinned=pinned)


@pytest.mark.parametrize("pinned", [True, False])
def test_rows_of_a_pinned_pass_attend_in_one_order(pinned):
    """A row does not depend on how rows are divided into passes; unpinned, it does."""
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(300, 4, 16, generator=generator).to(DEVICE)
    keys, values = (torch.randn(300, 2, 16, generator=generator).to(DEVICE) for _ in range(2))
    want = attended(q, keys, values, 260, 300, pinned)

    parts = [attended(q, keys, values, *at, pinned) for at in ((260, 261), (261, 277), (277, 300))]

    assert torch.equal(torch.cat(parts), want) == pinned


@pytest.mark.parametrize("gated", [False, True])
def test_a_pinned_product_takes_any_number_of_rows(gated):
    generator = torch.Generator().manual_seed(0)
    x, weight = (torch.randn(n, 100, generator=generator).to(DEVICE) for n in (75, 74))
    norm = Norm(1 + 0.1 * torch.randn(100, generator=generator).to(DEVICE), 1e-6)

    got = linear_triton.few_row_linear(x, weight, norm, gated=gated, pinned=True)

    want = linear.few_row_linear(x, weight, norm, gated=gated)
    torch.testing.assert_close(got, want, atol=2e-5, rtol=1e-5)
    for rows in (slice(0, 1), slice(3, 20), slice(17, 75), slice(74, 75)):
        alone = linear_triton.few_row_linear(x[rows], weight, norm, gated=gated, pinned=True)
        assert torch.equal(alone, got[rows])


def test_without_kernels_nothing_is_pinned(tiny_target_dir, tmp_path):
    model = model_of(Qwen3ForCausalLM, Qwen3Config, {})
    with pytest.raises(ValueError, match="pinned numerics need the kernels"):
        FusedDecoder(model, use_kernels=False, pinned=True)
    settings = Settings.model_validate(
        {
            "target": str(tiny_target_dir),
            "run_dir": tmp_path,
            "device": "cpu",
            "engine": {"numerics": "pinned", "max_model_len": 64},
        }
    )
    with pytest.raises(ValueError, match=r"engine\.numerics is 'pinned'.*device is cpu"):
        build_service(settings)
