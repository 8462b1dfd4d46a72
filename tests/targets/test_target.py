"""Neither the memory layout of a target's or drafter's weights nor the dtype of the logits changes
a value."""

from __future__ import annotations

import pytest
import torch

from drafters.eagle3.model import Eagle3, config_for_target
from oracles.engines import random_model
from serving.swap.flat_weights import FlatWeights
from targets.target import Target, by_columns


@pytest.mark.parametrize("is_tied", [True, False])
def test_matrices_by_columns_compute_the_same(is_tied):
    model = random_model("qwen3")
    if is_tied:
        model.lm_head.weight = model.model.embed_tokens.weight
    ids = torch.tensor([[1, 5, 3, 2]])
    with torch.no_grad():
        before = model(ids).logits
        by_columns(model)
        after = model(ids).logits

    torch.testing.assert_close(after, before)
    num_rows = model.config.vocab_size
    assert model.lm_head.weight.stride() == (1, num_rows + 16)
    assert model.model.embed_tokens.weight.is_contiguous()  # an embedding is read by rows


@pytest.mark.parametrize(
    ("is_fused", "softcap", "dtype"),
    [
        pytest.param(False, None, torch.bfloat16, id="Hugging Face code"),
        pytest.param(False, 5.0, torch.float32, id="a cap is computed in float32"),
        pytest.param(True, None, torch.bfloat16, id="fused"),
    ],
)
def test_logits_that_are_not_widened_have_the_same_values(is_fused, softcap, dtype):
    target = Target(random_model("qwen3", head_dim=16).bfloat16(), ())
    target.softcap = softcap
    assert not is_fused or target.fuse(64) is None
    hidden = torch.randn(40, 48, generator=torch.Generator().manual_seed(0)).bfloat16()

    wide, own = target.logits(hidden), target.logits(hidden, widen=False)

    assert (wide.dtype, own.dtype) == (torch.float32, dtype)
    assert torch.equal(wide, own.float())


def test_a_swap_keeps_the_memory_layout_of_the_drafter():
    config = config_for_target(random_model("qwen3").config)
    module, newer = Eagle3(config), Eagle3(config)
    module.initialise(0)
    newer.initialise(1)
    by_columns(module)
    weights = FlatWeights(module)
    address = module.lm_head.weight.data_ptr()

    weights.flat.copy_(weights.stage(newer.bundle_tensors()))

    assert module.lm_head.weight.stride() == (1, config.draft_vocab_size + 16)
    assert module.lm_head.weight.data_ptr() == address
    for name, tensor in newer.named_parameters():
        assert torch.equal(module.get_parameter(name), tensor), name
