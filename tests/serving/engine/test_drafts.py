"""What a neural drafter drafts in a round, however its passes are computed: tokens, log q, and the
law that they were drawn from."""

from __future__ import annotations

import pytest
import torch

from drafters.eagle3.paged import PagedEagle3
from serving.engine.drafts import AfterText, drafted
from specops.lanes import Field, OpenedRound
from tests.drafters.eagle3.test_fused import NUM_PAGES, PAGE, VOCAB, make_drafter, make_pass

NUM_DRAFT = 4


def opened(num):
    """A round of sampled requests and one at temperature 0."""
    ints = torch.zeros(len(Field), num, dtype=torch.int64)
    ints[Field.TOP_K], ints[Field.KEY] = VOCAB, 17 * torch.arange(num)
    floats = torch.tensor([[0.8] * (num - 1) + [0.0], [1.0] * num, [0.0] * num])
    whole = torch.full((num,), NUM_DRAFT)
    positions = 5 + torch.arange(NUM_DRAFT)[:, None].repeat(1, num)
    none = torch.zeros(num, dtype=torch.int64)
    at = make_pass(num)
    return OpenedRound(
        none.int(), ints, floats, at.pages_RP, none > 0, none, none, whole, at.first_R - 1,
        at.first_R, positions, none, none, none[:, None], None,
    )  # fmt: skip


@pytest.mark.parametrize("draft_vocab", [VOCAB, 30])
@pytest.mark.parametrize("num_passes", [2, NUM_DRAFT])
@pytest.mark.parametrize("has_text", [False, True])
def test_a_joined_drafter_draws_the_same_and_leaves_the_same_law(draft_vocab, num_passes, has_text):
    """Its logits are written where the law has them; the others' are copied."""
    module, embed = make_drafter(draft_vocab)
    drafters = [PagedEagle3(module, embed, NUM_PAGES * PAGE) for _ in range(2)]
    options = {"few_rows": 10, "use_kernels": False, "joins": True}
    assert drafters[1].fuse(num_positions=64, **options) is None
    outputs = torch.randn(4, 48, generator=torch.Generator().manual_seed(8))
    text = torch.arange(4 * NUM_DRAFT).view(4, NUM_DRAFT)
    is_text = torch.arange(NUM_DRAFT) < torch.tensor([[0], [1], [4], [2]])
    if not has_text and num_passes < NUM_DRAFT:
        pytest.skip("without text every place is drafted")
    after = AfterText(text, is_text, num_passes) if has_text else None

    want, got = (
        drafted(one, outputs, make_pass(4), opened(4), NUM_DRAFT, draws=True, after=after)
        for one in drafters
    )

    assert torch.equal(got.tokens_RK, want.tokens_RK)
    assert len(got.tokens_RK.unique()) > 5
    torch.testing.assert_close(got.logq_RK, want.logq_RK, atol=1e-5, rtol=1e-5)
    assert got.logq_RK is not None and (got.logq_RK < 0).any()
    assert got.law is not None and want.law is not None
    torch.testing.assert_close(got.law.logits_RKD, want.law.logits_RKD, atol=1e-5, rtol=1e-5)
    assert got.law.logits_RKD.is_contiguous()
    if has_text:
        assert torch.equal(got.tokens_RK[is_text], text[is_text])
        assert torch.equal(got.law.certain_RK, is_text)
