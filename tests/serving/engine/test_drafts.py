"""What a neural drafter drafts in a round, however its passes are computed: tokens, log q, and the
law that they were drawn from."""

from __future__ import annotations

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from drafters.eagle3.paged import PagedEagle3
from serving.engine.drafts import AfterText, drafted
from specops.lanes import Field, OpenedRound
from tests.drafters.eagle3.test_fused import NUM_PAGES, PAGE, VOCAB, make_drafter, make_pass
from tests.drafters.test_fused import make, paged_of

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


def eagle3_drafter(draft_vocab):
    module, embed = make_drafter(draft_vocab)
    return PagedEagle3(module, embed, NUM_PAGES * PAGE)


def mtp_drafter(kind):
    drafter = paged_of(make(kind))
    drafter._head_weight = drafter._head_weight.contiguous()  # kernels refuse a CPU's layout
    return drafter


REDUCED = "mtp, hidden state first, reduced vocabulary"
MAKE = {
    "eagle3": lambda: eagle3_drafter(VOCAB),
    "eagle3, reduced vocabulary": lambda: eagle3_drafter(30),
    "mtp": lambda: mtp_drafter("mtp"),
    REDUCED: lambda: mtp_drafter(REDUCED),
}
WAYS = {
    "kernels": {"few_rows": 10, "use_kernels": True, "packs": False},
    "few rows": {"few_rows": 10, "use_kernels": False, "packs": False},
    "many rows": {"few_rows": 1, "use_kernels": False, "packs": False},
    "many rows, packed": {"few_rows": 1, "use_kernels": False, "packs": True},
}


class Stacked(TorchDispatchMode):
    """Notes the shapes of what is stacked."""

    def __init__(self):
        super().__init__()
        self.shapes = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        found = function(*args, **(kwargs or {}))
        if function is torch.ops.aten.stack.default:
            self.shapes.append(tuple(found.shape))
        return found


@pytest.mark.parametrize("kind", MAKE)
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("num_passes", [None, 2, NUM_DRAFT])
def test_a_fused_drafter_draws_the_same_and_leaves_the_same_law(kind, way, num_passes):
    """Its logits are written where the law has them; those of a module's own code are copied."""
    text = torch.arange(4 * NUM_DRAFT).view(4, NUM_DRAFT)
    is_text = torch.arange(NUM_DRAFT) < torch.tensor([[0], [1], [4], [2]])
    after = None if num_passes is None else AfterText(text, is_text, num_passes)
    drafters = [MAKE[kind]() for _ in range(2)]
    width = drafters[0].module.config.hidden_size
    outputs = torch.randn(4, width, generator=torch.Generator().manual_seed(8))
    assert drafters[1].fuse(num_positions=64, **WAYS[way]) is None

    found, stacked = [], []
    for drafter in drafters:
        with Stacked() as seen:
            found.append(
                drafted(
                    drafter, outputs, make_pass(4), opened(4), NUM_DRAFT, draws=True, after=after
                )
            )
        stacked.append(seen.shapes)
    want, got = found

    assert torch.equal(got.tokens_RK, want.tokens_RK)
    assert len(got.tokens_RK.unique()) > 5
    torch.testing.assert_close(got.logq_RK, want.logq_RK, atol=1e-5, rtol=1e-5)
    assert got.logq_RK is not None and (got.logq_RK < 0).any()
    assert got.law is not None and want.law is not None
    torch.testing.assert_close(got.law.logits_RKD, want.law.logits_RKD, atol=1e-5, rtol=1e-5)
    assert got.law.logits_RKD.is_contiguous()
    shape = tuple(got.law.logits_RKD.shape)
    assert [shape in shapes for shapes in stacked] == [True, False]
    if after is not None:
        assert torch.equal(got.tokens_RK[is_text], text[is_text])
        assert torch.equal(got.law.certain_RK, is_text)
